"""Whether a weight is still the one that a state's norms were measured of."""

from __future__ import annotations

from specops import arrays
from specops.tracking.matrices import TrackedBlocks, TrackedKernel
from specops.tracking.operator import TrackedOperator
from specops.typing import Array, State

_SAME = 1e-3
"""Relative change of a norm along the same vectors that no rounding, of half precision either,
explains."""
_ROUNDING = 1e-5
"""The same of the order in which single precision adds up."""


def saw_nothing(follow: TrackedBlocks | TrackedKernel | TrackedOperator, s: State) -> bool:
    """Whether a matrix was zero when its norm was measured, so that its vectors mean nothing."""
    norms = (n if n.ndim == 0 else arrays.namespace(n).all(n != 0) for n in follow.measured(s))
    return not all(map(bool, norms))


def is_measured(
    follow: TrackedBlocks | TrackedKernel | TrackedOperator,
    w: Array,
    s: State,
    *,
    closely: bool = False,
) -> bool:
    """Whether norms along the vectors of a state are those it has; true of what is not finite.

    With `closely`, but for the rounding of their products.
    """
    xp, within = arrays.namespace(w), _ROUNDING if closely else _SAME
    w = arrays.to_compute(xp, w)
    changed = [
        xp.any(xp.abs(now - then) > within * xp.abs(then))
        for now, then in zip(follow.norms(w, s), follow.measured(s), strict=True)
    ]
    if isinstance(follow, TrackedOperator):
        # Zeros leave a gradient of zeros, along which the norm of any kernel is zero.
        (then,) = follow.measured(s)
        changed.append((then == 0) & (xp.max(xp.abs(w)) > 0))
    return not any(bool(flag) for flag in changed)
