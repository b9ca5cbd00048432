"""Ending a projection: feasible in the dtype that it is stored in, and tested there."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from specops import arrays
from specops.typing import Array

_ROUNDS = 40
_LATE = 20


@dataclass
class ProjectionInfo:
    """What a projection onto a ball did.

    Attributes
    ----------
    norm_before, norm_after : array
        The constrained norm of the weight given and of the weight returned, the latter as
        stored. Shape (\\*batch,), one more axis for ``Dense(splits=...)``; NaN for matrices
        that are not finite. For a zero-padded Conv, and a circular one whose stride does not
        divide its grid, these are norms on the torus that contains the layer. Measured from
        below, to about 1e-4, where a single matrix has more than 2^16 entries, and
        `norm_before` also from the directions of a warm start: what is certified is that the
        weight returned is inside.
    gap : array
        Certified: ``‖returned − nearest‖² ≤ gap·‖given‖²`` for the nearest weight in the ball
        of the constrained norm. Where that is the norm on a torus that contains the layer, the
        layer's own ball is larger, and nothing is certified of the nearest weight in that. It
        is twice the difference of the primal and the dual objective over ‖given‖², up to
        rounding; 0 where nothing changed. Shape as the norms.
    iterations : int
        Rounds that an iterative method took; 0 if the weight was inside, 1 for a direct one.
    state : dict of str to array
        What the next call on a similar weight may start from.
    """

    norm_before: Array
    norm_after: Array
    gap: Array
    iterations: int
    state: dict[str, Array] = field(default_factory=dict)


def store_within(
    xp: Any,
    x: Array,
    dtype: Any,
    fits: Callable[[Array], Array],
    batch: int = 0,
    offset: Array | None = None,
) -> Array:
    """Cast `x` to `dtype`, shrunk a little more each round until it `fits` as stored.

    ``fits`` takes the stored array in compute precision and returns booleans, one for each
    index of the first `batch` axes. An `offset` is added, which shrinks only if nothing else
    helps. While torch compiles, three rounds run and the result may exceed its limit by the
    rounding of `dtype`.
    """
    eps = arrays.epsilon(dtype)
    # Half precision is too coarse to give away a unit at the first attempt.
    first = -6 if eps > 1e-4 else 1
    shrink = xp.ones_like(xp.real(x) if arrays.is_complex(x) else x)
    shrink = shrink[(..., *([0] * (x.ndim - batch)))]

    def stored(x: Array, offset: Array | None, shrink: Array, late: Any) -> Array:
        scaled = x * _expand(shrink, x)
        if offset is not None:
            # Its own rounding may be what does not fit.
            plain = xp.ones_like(shrink)
            factor = xp.where(late, shrink, plain) if arrays.is_traced(late) else plain
            scaled = scaled + offset * _expand(shrink if late is True else factor, x)
        return arrays.rounded(xp, scaled, dtype)

    def fit(x: Array, offset: Array | None, shrink: Array, late: Any) -> Array:
        return fits(arrays.to_compute(xp, stored(x, offset, shrink, late)))

    if arrays.is_staged(x):
        # What is found is a constant of the result, so that it can still be differentiated.
        fixed = arrays.stop_gradient(x)
        shift = None if offset is None else arrays.stop_gradient(offset)

        def shrunk(carry: Any) -> Any:
            index, shrink, inside = carry
            step = 1.0 - eps * 2.0 ** (xp.astype(index, shrink.dtype) + first)
            step = xp.where(step > 0.5, step, xp.full_like(step, 0.5))
            shrink = xp.where(inside, shrink, shrink * step)
            return index + 1, shrink, fit(fixed, shift, shrink, index + 1 >= _LATE)

        start = xp.asarray(0), shrink, fit(fixed, shift, shrink, False)
        index, shrink, _ = arrays.while_loop(
            xp, lambda carry: (carry[0] < _ROUNDS - 1) & ~xp.all(carry[2]), shrunk, start
        )
        return stored(x, offset, shrink, index >= _LATE)
    for round_ in range(_ROUNDS):
        result = stored(x, offset, shrink, round_ >= _LATE)
        inside = fits(arrays.to_compute(xp, result))
        done = arrays.truth(xp.all(inside))
        if done or (done is None and round_ == 2):
            break
        step = max(0.5, 1.0 - eps * 2.0 ** (round_ + first))
        shrink = xp.where(inside, shrink, shrink * step)
    return result


def _expand(factor: Array, x: Array) -> Array:
    return factor[(..., *([None] * (x.ndim - factor.ndim)))]
