"""Whether a weight is still the one that a state's norms were measured of."""

from __future__ import annotations

from specops import arrays
from specops.tracking.matrices import TrackedBlocks, TrackedKernel
from specops.tracking.operator import TrackedOperator
from specops.typing import Array, State

_SAME = 1e-3
"""Relative change of a norm along the same vectors that no rounding, of half precision either,
explains."""


def is_measured(
    follow: TrackedBlocks | TrackedKernel | TrackedOperator, w: Array, s: State
) -> bool:
    """Whether norms along the vectors of a state are those it has; true of what is not finite."""
    xp = arrays.namespace(w)
    norms = follow.norms(arrays.to_compute(xp, w), s)
    changed = [
        xp.any(xp.abs(now - then) > _SAME * xp.abs(then))
        for now, then in zip(norms, follow.measured(s), strict=True)
    ]
    return not any(bool(flag) for flag in changed)
