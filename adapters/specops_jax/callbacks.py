"""Firings that a compiled program leaves to the host, where rules act on NumPy arrays.

There iterations can stop as soon as they have converged, and no time is spent on compiling them
for each shape.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType

from specops_jax.numbers import parted, with_numbers
from specops_jax.one_firing import checked
from specops_jax.program import Item
from specops_jax.state import Arrays

try:
    from jax.experimental.buffer_callback import buffer_callback
except ImportError:  # it is experimental and may move: without it everything is compiled
    buffer_callback = None


def is_left_to_host(item: Item, weight: Any) -> bool:
    """Whether the host should run the rule, in a program that runs on a single CPU.

    Not within ``shard_map``, where JAX 0.7.0 cannot lower every callback.
    """
    if not isinstance(weight, jax.core.Tracer) or item.stage != "weights":
        return False
    if buffer_callback is None:
        return False
    alone = jax.default_backend() == "cpu" and jax.device_count() == 1
    mapped = AxisType.Manual in jax.sharding.get_abstract_mesh().axis_types
    return alone and not mapped and item.weight_rule.costly_to_compile(item.geometry)


def call_host(
    items: Sequence[Item],
    compiled: Callable[..., Any],
    weights: Mapping[str, Any],
    states: Arrays,
    figures: Arrays,
    step: Any,
) -> Any:
    """The results of `compiled(items, weights, states, step)`, computed by the host.

    By name (array, state, figures, whether all was finite), in the dtypes of the arguments. If a
    program asks for derivatives, it computes `compiled` itself.
    """
    parts = [parted(item, step) for item in items]
    bare, numbers = [item for item, _ in parts], {item.name: found for item, found in parts}
    own: Any = {name: (weights[name], states[name]) for name in numbers}
    like = {name: (*pair, figures[name], jnp.ones((), bool)) for name, pair in own.items()}
    structs = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), like)

    def by_host(*given: Any) -> Any:
        # Not `jax.pure_callback`, which first puts its arguments on the device. That waits for a
        # thread that other programs may hold until this one ends.
        host = partial(_on_host, bare)
        return buffer_callback(host, structs, vmap_method="sequential")(*given)

    def by_program(own: Any, numbers: Any, step: Any) -> Any:
        rebuilt = [with_numbers(item, numbers[item.name]) for item in bare]
        weights, states = ({name: pair[k] for name, pair in own.items()} for k in (0, 1))
        found = compiled(rebuilt, weights, states, step)
        return jax.tree.map(lambda x, s: x.astype(s.dtype), found, structs)

    fire = jax.custom_jvp(by_host)
    fire.defjvp(lambda given, tangents: jax.jvp(by_program, given, tangents))
    return fire(own, numbers, step)


def _on_host(items: Sequence[Item], context: Any, out: Any, *given: Any) -> None:
    """Fill the output buffers, without JAX, which must not be called within its programs."""
    del context
    own, numbers, step = jax.tree.map(_view, given)
    for item in items:
        weight, state = own[item.name]
        known = {key: x.item() for key, x in numbers[item.name].items()}
        if any(map(math.isnan, known.values())):  # a schedule gave an invalid bound
            none = jax.tree.map(lambda _: math.nan, out[item.name][2])
            found: Any = weight, state, none, False
        else:
            found = checked(with_numbers(item, known), weight, state, int(step))
        jax.tree.map(_fill, out[item.name], found)


def _view(buffer: Any) -> np.ndarray:
    array = np.asarray(buffer)
    array.flags.writeable = False
    return array


def _fill(buffer: Any, value: Any) -> None:
    np.asarray(buffer)[...] = value
