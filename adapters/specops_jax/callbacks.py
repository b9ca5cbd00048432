"""Firings that a compiled program leaves to the host: to the rules, on NumPy's arrays.

Their rounds end when the values say so, and no compiler spends seconds on each shape.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType

from specops.rules.base import at
from specops_jax.one_firing import checked
from specops_jax.program import Item
from specops_jax.state import Arrays

Numbers = Mapping[str, Any]
Rebuild = Callable[[Numbers], Item]
Structs = tuple[Any, Any, Any, Any]
"""Shapes and dtypes of (array, state, figures, whether all was finite)."""


def is_left_to_host(item: Item, weight: Any) -> bool:
    """Whether a program that runs on one CPU alone had better not be compiled for the rule.

    Within ``shard_map`` it is: before JAX 0.8 callbacks cannot be lowered there.
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
    parts = {item.name: _parted(item, step) for item in items}
    numbers = {name: found for name, (found, _) in parts.items()}
    rebuild = {name: again for name, (_, again) in parts.items()}
    own: Any = {name: (weights[name], states[name]) for name in parts}
    like = {name: (*pair, figures[name], jnp.ones((), bool)) for name, pair in own.items()}
    structs = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), like)

    def by_host(*given: Any) -> Any:
        host = partial(_fire_all, rebuild, structs)
        return jax.pure_callback(host, structs, *given, vmap_method="sequential")

    def by_program(own: Any, numbers: Any, step: Any) -> Any:
        rebuilt = [again(numbers[name]) for name, again in rebuild.items()]
        weights, states = ({name: pair[k] for name, pair in own.items()} for k in (0, 1))
        found = compiled(rebuilt, weights, states, step)
        return jax.tree.map(lambda x, s: x.astype(s.dtype), found, structs)

    fire = jax.custom_jvp(by_host)
    fire.defjvp(lambda given, tangents: jax.jvp(by_program, given, tangents))
    return fire(own, numbers, step)


def _parted(item: Item, step: Any) -> tuple[dict[str, Any], Rebuild]:
    """(numbers of its rule that are schedules or arrays, at this step; the item, from numbers).

    The latter holds no array, which may be traced.
    """
    rule: Any = item.rule
    constant = {field.name: getattr(rule, field.name) for field in fields(rule) if field.init}
    numbers = {
        name: jnp.asarray(at(value, step, item.name, item.geometry))
        for name, value in constant.items()
        if callable(value) or isinstance(value, jax.Array | np.ndarray | np.generic)
    }
    if not numbers:
        return {}, lambda numbers: item
    for name in numbers:
        del constant[name]
    bare = replace(item, assignment=replace(item.assignment, rule=None))
    return numbers, partial(_rebuilt, bare, type(rule), constant)


def _rebuilt(bare: Item, kind: type, constant: Numbers, numbers: Numbers) -> Item:
    rule = kind(**constant, **numbers)
    return replace(bare, assignment=replace(bare.assignment, rule=rule))


def _fire_all(
    rebuild: Mapping[str, Rebuild],
    structs: Mapping[str, Structs],
    own: Any,
    numbers: Any,
    step: Any,
) -> Any:
    """On NumPy's arrays alone: JAX is not to be called from within its own programs."""
    own, numbers, step = jax.tree.map(np.asarray, (own, numbers, step))
    found = {}
    for name, again in rebuild.items():
        weight, state = own[name]
        found[name] = _fire(again, weight, state, numbers[name], int(step), structs[name])
    return jax.tree.map(lambda x, s: np.asarray(x, s.dtype), found, dict(structs))


def _fire(
    again: Rebuild,
    weight: np.ndarray,
    state: dict[str, np.ndarray],
    numbers: Numbers,
    step: int,
    structs: Structs,
) -> tuple[Any, Any, Any, Any]:
    try:
        item = again({key: x.item() for key, x in numbers.items()})
    except ValueError:  # what a schedule gives is no bound
        figures = jax.tree.map(lambda s: np.full(s.shape, np.nan), structs[2])
        return weight, state, figures, False
    return checked(item, weight, state, step)
