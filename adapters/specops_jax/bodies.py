"""Weights that are alike under one rule: a single compiled body for them, one after the other."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from specops_jax.numbers import parted
from specops_jax.program import Item


def alike(
    items: Iterable[Item], weights: Mapping[str, Any], step: Any
) -> list[list[tuple[Item, dict[str, jax.Array]]]]:
    """Groups of (item without the numbers of a step, those numbers) that may share a body."""
    groups: dict[Any, list[tuple[Item, dict[str, jax.Array]]]] = {}
    for item in items:
        bare, numbers = parted(item, step)
        key = body_of(bare, weights[item.name]), *numbers
        groups.setdefault(key, []).append((bare, numbers))
    return list(groups.values())


def each(act: Callable[[Any], Any], given: Sequence[Any]) -> list[Any]:
    """`act` of everything given, which is alike."""
    if len(given) == 1:
        return [act(given[0])]
    found = lax.map(act, jax.tree.map(lambda *x: jnp.stack(x), *given))
    return [jax.tree.map(lambda x, k=k: x[k], found) for k in range(len(given))]


def body_of(item: Item, weight: Any) -> Any:
    """What equal bodies share; schedules that are left may depend on the name."""
    if item.rule.is_scheduled():
        return item.name
    rule = item.rule if item.is_key else id(item.rule)
    return rule, item.geometry, weight.shape, weight.dtype
