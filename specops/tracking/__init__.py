"""Norms of a weight followed from step to step by block iteration on its leading pairs.

A tracked norm keeps unit vectors u, v of each matrix that it measures, and a second pair that
finds singular values which grow elsewhere. `advance` takes one or more steps u ← Av/‖Av‖,
v ← Aᴴu/‖Aᴴu‖; in between, σ = ⟨u, Av⟩ is linear in the weight with the gradient uvᴴ, and a lower
bound of the norm. Vectors live in a flat dict of arrays, which is the state of the rules that use
them; only this package knows its keys. No function here changes its arguments.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, Literal, get_args

from specops.geometry import Dense, Geometry
from specops.geometry.arguments import check_choice
from specops.tracking.by_products import Steps, Wanted
from specops.tracking.freshness import is_measured, norms_along, saw_zeros
from specops.tracking.matrices import (
    NORM_KEYS,
    TrackedBlocks,
    TrackedKernel,
    are_alike,
    packed,
    unpacked,
    vectors,
)
from specops.tracking.operator import TrackedOperator
from specops.tracking.power import Pairs, checked, stepped_on_host
from specops.tracking.torus import TrackedTorus

__all__ = [
    "NORM_KEYS",
    "Norm",
    "Pairs",
    "Steps",
    "Tracked",
    "TrackedBlocks",
    "TrackedKernel",
    "TrackedOperator",
    "TrackedTorus",
    "Wanted",
    "are_alike",
    "check_norm",
    "checked",
    "is_measured",
    "norms_along",
    "packed",
    "saw_zeros",
    "stepped_on_host",
    "track",
    "unpacked",
    "vectors",
]

Norm = Literal["operator", "reshaped", "bidirectional"]
Tracked = TrackedBlocks | TrackedKernel | TrackedOperator


def check_norm(norm: Any, allowed: tuple[str, ...] = get_args(Norm)) -> None:
    """Raise unless `norm` is one of those allowed."""
    check_choice(norm, "norm", allowed)


@lru_cache(maxsize=1024)
def track(geometry: Geometry, norm: Norm) -> Tracked:
    """What tracks this norm; for a Dense geometry all three norms are the same."""
    if isinstance(geometry, Dense):
        return TrackedBlocks(geometry)
    if norm == "operator":
        return TrackedOperator(geometry)
    views = tuple(Dense((axis,)) for axis in geometry.channel_axes)
    return TrackedBlocks(views[0]) if norm == "reshaped" else TrackedKernel(geometry, views)
