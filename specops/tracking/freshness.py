"""Whether a weight is still the one for which a state's norms were measured."""

from __future__ import annotations

from collections.abc import Sequence

from specops import arrays
from specops.tracking.matrices import TrackedBlocks, TrackedKernel
from specops.tracking.operator import TrackedOperator
from specops.typing import Array, State

_SAME = 1e-3
"""A larger relative change of a norm along the same vectors is more than rounding, even in half
precision."""
_ROUNDING = 1e-5
"""The same for the rounding of sums in single precision, in another order."""


def saw_zeros(follow: TrackedBlocks | TrackedKernel | TrackedOperator, s: State) -> bool:
    """Whether a matrix was zero when its norm was measured, so that its vectors mean nothing."""
    norms = (n if n.ndim == 0 else arrays.namespace(n).all(n != 0) for n in follow.measured(s))
    return not all(map(bool, norms))


def norms_along(
    follow: TrackedBlocks | TrackedKernel | TrackedOperator, w: Array, s: State
) -> tuple[Array, ...]:
    """The norms of a weight along a state's vectors, which may be behind it."""
    return tuple(follow.norms(arrays.to_compute(arrays.namespace(w), w), s))


def is_measured(
    follow: TrackedBlocks | TrackedKernel | TrackedOperator,
    w: Array,
    s: State,
    *,
    before: Sequence[Array] | None = None,
    closely: bool = False,
) -> bool:
    """Whether the norms along a state's vectors are those in the state; True if not finite.

    With `before`, whether they are those, which `norms_along` has found. With `closely`, only the
    rounding of products may differ.
    """
    xp, within = arrays.namespace(w), _ROUNDING if closely else _SAME
    w = arrays.to_compute(xp, w)
    expected = tuple(follow.measured(s) if before is None else before)
    changed = [
        xp.any(xp.abs(now - then) > within * xp.abs(then))
        for now, then in zip(follow.norms(w, s), expected, strict=True)
    ]
    if isinstance(follow, TrackedOperator):
        # A weight of zeros has a zero gradient, along which the norm of every kernel is zero.
        (then,) = expected
        changed.append((then == 0) & (xp.max(xp.abs(w)) > 0))
    return not any(bool(flag) for flag in changed)
