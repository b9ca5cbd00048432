"""Weights on meshes with explicit axes, on which rules compute as on automatic axes.

There the partitioner decides how data move. Weights come back with the sharding that they had: a
firing that is not due returns them unchanged, and scales are applied where they are.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
from jax.sharding import AxisType, NamedSharding, PartitionSpec


def partitioned(
    function: Callable[..., Any], out: Any, weights: Mapping[str, Any], *others: Any
) -> Any:
    """`function(weights, *others)`, with explicit axes left to the partitioner meanwhile.

    `out(layouts, whole)` gives the layouts of the result from those of the weights, where `whole`
    is the replicated one.
    """
    found = {name: explicit(w) for name, w in weights.items()}
    mesh = next((layout.mesh for layout in found.values() if layout is not None), None)
    if mesh is None:
        return function(weights, *others)
    whole = NamedSharding(mesh, PartitionSpec())
    layouts = {name: layout or whole for name, layout in found.items()}
    # Without the manual axes of a surrounding shard_map, along which each device has its own part.
    axes = tuple(mesh.axis_names[i] for i, t in enumerate(mesh.axis_types) if t != AxisType.Manual)
    on_auto_axes = jax.sharding.auto_axes(function, axes=axes, out_sharding=out(layouts, whole))
    return on_auto_axes(weights, *others)


def replicated(state: Any) -> Any:
    """The state replicated on all devices, as rules return it; compilers may choose otherwise."""

    def whole(x: Any) -> Any:
        layout = explicit(x)
        if layout is None:
            return x
        return jax.sharding.reshard(x, NamedSharding(layout.mesh, PartitionSpec()))

    return jax.tree.map(whole, state)


def explicit(weight: Any) -> NamedSharding | None:
    """The sharding in the type of a weight, if any of its axes is sharded; else None."""
    layout = getattr(jax.typeof(weight), "sharding", None)
    return layout if any(getattr(layout, "spec", ())) else None
