"""One compiled body for all weights that are alike under a rule, which takes them in turn."""

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
    """Groups that may share a body: pairs of an item without numbers and its numbers now."""
    groups: dict[Any, list[tuple[Item, dict[str, jax.Array]]]] = {}
    for item in items:
        bare, numbers = parted(item, step)
        key = body_of(bare, weights[item.name]), *numbers
        groups.setdefault(key, []).append((bare, numbers))
    return list(groups.values())


def each(act: Callable[[Any], Any], given: Sequence[Any]) -> list[Any]:
    """The results of `act` for arguments of equal structure, shapes and dtypes."""
    if len(given) == 1:
        return [act(given[0])]
    found = lax.map(act, jax.tree.map(lambda *x: jnp.stack(x), *given))
    return [jax.tree.map(lambda x, k=k: x[k], found) for k in range(len(given))]


def body_of(item: Item, weight: Any) -> Any:
    """A key that is equal for items that can share a body.

    A rule that still has schedules shares none, because they may depend on the name.
    """
    if item.rule.is_scheduled():
        return item.name
    rule = item.rule if item.is_key else id(item.rule)
    return rule, item.geometry, weight.shape, weight.dtype
