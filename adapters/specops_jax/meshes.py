"""Weights on meshes whose axes are explicit: rules compute as on automatic ones.

There the partitioner decides what moves, and weights come back laid out as they went in, because a
firing gives them back as they were where it is not due, and scales are applied where they lie.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
from jax.sharding import AxisType, NamedSharding, PartitionSpec


def partitioned(
    function: Callable[..., Any], out: Any, weights: Mapping[str, Any], *others: Any
) -> Any:
    """`function(weights, *others)`, its explicit axes left to the partitioner meanwhile.

    `out(layouts, whole)` gives the layouts of the result from those of the weights, where `whole`
    is the replicated one.
    """
    found = {name: explicit(w) for name, w in weights.items()}
    mesh = next((layout.mesh for layout in found.values() if layout is not None), None)
    if mesh is None:
        return function(weights, *others)
    whole = NamedSharding(mesh, PartitionSpec())
    layouts = {name: layout or whole for name, layout in found.items()}
    # Not those of a shard_map around this, which each device has a part of its own along.
    axes = tuple(mesh.axis_names[i] for i, t in enumerate(mesh.axis_types) if t != AxisType.Manual)
    on_auto_axes = jax.sharding.auto_axes(function, axes=axes, out_sharding=out(layouts, whole))
    return on_auto_axes(weights, *others)


def replicated(state: Any) -> Any:
    """A state whole on each device, as rules give it: a compiler lays results out as it likes."""

    def whole(x: Any) -> Any:
        layout = explicit(x)
        if layout is None:
            return x
        return jax.sharding.reshard(x, NamedSharding(layout.mesh, PartitionSpec()))

    return jax.tree.map(whole, state)


def explicit(weight: Any) -> NamedSharding | None:
    """The layout that is part of its type, if any axis is sharded."""
    layout = getattr(jax.typeof(weight), "sharding", None)
    return layout if any(getattr(layout, "spec", ())) else None
