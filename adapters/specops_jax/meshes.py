"""Sharded weights: the partitioner computes as it likes; weights stay laid out as they were."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
from jax.experimental.shard_alike import shard_alike
from jax.sharding import NamedSharding, PartitionSpec


def alike(weight: Any, array: Any) -> Any:
    """The array, laid out as the weight it takes the place of: on axes that the compiler decides.

    Left alone it would be replicated where a decomposition was.
    """
    if array is weight or not isinstance(weight, jax.core.Tracer):
        return array
    return shard_alike(weight, array)[1]


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
    on_auto_axes = jax.sharding.auto_axes(function, out_sharding=out(layouts, whole))
    return on_auto_axes(weights, *others)


def explicit(weight: Any) -> NamedSharding | None:
    """The layout that is part of its type, if any axis is sharded."""
    layout = getattr(jax.typeof(weight), "sharding", None)
    return layout if any(getattr(layout, "spec", ())) else None
