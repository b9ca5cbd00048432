"""Firings that a compiled program leaves to the host: to the rules, on NumPy's arrays.

Their rounds end when the values say so, and no compiler spends seconds on each shape.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType

from specops_jax.one_firing import checked
from specops_jax.program import Item
from specops_jax.state import Arrays

Numbers = Mapping[str, Any]
Structs = tuple[Any, Any, Any, Any]
"""Shapes and dtypes of (array, state, figures, whether all was finite)."""


def is_left_to_host(item: Item, weight: Any) -> bool:
    """Whether a program that runs on one CPU alone had better not be compiled for the rule.

    Within ``shard_map`` it is: JAX 0.7.0 cannot lower a callback there.
    """
    if not isinstance(weight, jax.core.Tracer) or item.stage != "weights":
        return False
    alone = jax.default_backend() == "cpu" and jax.device_count() == 1
    mapped = AxisType.Manual in jax.sharding.get_abstract_mesh().axis_types
    return alone and not mapped and item.weight_rule.dear_to_compile(item.geometry)


def call_host(
    items: Sequence[Item],
    compiled: Callable[..., Any],
    weights: Mapping[str, Any],
    states: Arrays,
    figures: Arrays,
    step: Any,
) -> Any:
    """`compiled(items, weights, states, step)`, but computed by the host; with its derivative.

    By name (array, state, figures, whether all was finite), in the dtypes of what is given.
    """
    numbers = {i.name: i.weight_rule.numbers_at(step, i.name, i.geometry) for i in items}
    # What the program keeps must hold no array, which may be traced: any number will do.
    bare = [_with(item, dict.fromkeys(numbers[item.name], 1.0)) for item in items]
    own: Any = {name: (weights[name], states[name]) for name in numbers}
    like = {name: (*pair, figures[name], jnp.ones((), bool)) for name, pair in own.items()}
    structs = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), like)

    def by_host(*given: Any) -> Any:
        host = partial(_fire_all, bare, structs)
        return jax.pure_callback(host, structs, *given, vmap_method="sequential")

    def by_program(own: Any, numbers: Any, step: Any) -> Any:
        rebuilt = [_with(item, numbers[item.name]) for item in bare]
        weights, states = ({name: pair[k] for name, pair in own.items()} for k in (0, 1))
        found = compiled(rebuilt, weights, states, step)
        return jax.tree.map(lambda x, s: x.astype(s.dtype), found, structs)

    fire = jax.custom_jvp(by_host)
    fire.defjvp(lambda given, tangents: jax.jvp(by_program, given, tangents))
    return fire(own, numbers, step)


def _with(item: Item, numbers: Numbers) -> Item:
    rule = item.weight_rule.with_numbers(numbers)
    return replace(item, assignment=replace(item.assignment, rule=rule))


def _fire_all(
    items: Sequence[Item],
    structs: Mapping[str, Structs],
    own: Any,
    numbers: Any,
    step: Any,
) -> Any:
    """On NumPy's arrays alone: JAX is not to be called from within its own programs."""
    own, numbers, step = jax.tree.map(np.asarray, (own, numbers, step))
    found = {}
    for item in items:
        name, (weight, state) = item.name, own[item.name]
        found[name] = _fire(item, weight, state, numbers[name], int(step), structs[name])
    return jax.tree.map(lambda x, s: np.asarray(x, s.dtype), found, dict(structs))


def _fire(
    item: Item,
    weight: np.ndarray,
    state: dict[str, np.ndarray],
    numbers: Numbers,
    step: int,
    structs: Structs,
) -> tuple[Any, Any, Any, Any]:
    try:
        item = _with(item, {key: x.item() for key, x in numbers.items()})
    except ValueError:  # what a schedule gives is no bound
        figures = jax.tree.map(lambda s: np.full(s.shape, np.nan), structs[2])
        return weight, state, figures, False
    return checked(item, weight, state, step)
