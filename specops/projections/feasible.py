"""The end of a projection: a result that is feasible, and tested, in the dtype it is stored in."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from specops import arrays
from specops.typing import Array, Namespace

_ATTEMPTS = 40
"""Most attempts. Steps double, from about a unit of rounding up to a half. So many scale down by
5e-4 in double precision, and to a factor of 2^-18 and less in all others; what is inside in theory
fits long before."""
_SCALE_ALL_FROM = 20
"""Attempt from which the offset is scaled as well. By then the rest has been scaled down by 5e-10
in double precision, a quarter in single and 98 % in half, so that the rounding of the offset itself
must be the reason."""


def store_within(
    xp: Namespace,
    x: Array,
    dtype: Any,
    fits: Callable[[Array], Array],
    batch: int = 0,
    offset: Array | None = None,
) -> Array:
    """Cast `x` to `dtype`, scaled down a little more each round until it `fits` as stored.

    ``fits`` takes the stored array in compute precision and returns booleans, one for each
    index of the first `batch` axes. An `offset` is added, which is scaled only if nothing else
    helps. While torch compiles, three rounds run and the result may exceed its limit by the
    rounding of `dtype`.
    """
    eps = arrays.epsilon(dtype)
    # In half precision a whole unit would be too much for the first attempt.
    first = -6 if eps > 1e-4 else 1
    factor = xp.ones_like(arrays.real_part(xp, x))
    factor = factor[(..., *([0] * (x.ndim - batch)))]

    def stored(x: Array, offset: Array | None, factor: Array, late: Any) -> Array:
        scaled = x * arrays.along_first(factor, x)
        if offset is not None:
            # Its own rounding may be the reason why the sum does not fit.
            plain = xp.ones_like(factor)
            by = xp.where(late, factor, plain) if arrays.is_traced(late) else plain
            scaled = scaled + offset * arrays.along_first(factor if late is True else by, x)
        return arrays.rounded(xp, scaled, dtype)

    def fit(x: Array, offset: Array | None, factor: Array, late: Any) -> Array:
        return fits(arrays.to_compute(xp, stored(x, offset, factor, late)))

    if arrays.is_staged(x):
        # The factor is a constant for differentiation, so that the result can be differentiated.
        fixed = arrays.stop_gradient(x)
        shift = None if offset is None else arrays.stop_gradient(offset)

        def attempt(carry: Any) -> Any:
            index, factor, inside = carry
            exponent = xp.astype(index - 1, factor.dtype) + first
            step = xp.where(index > 0, 1.0 - eps * 2.0**exponent, xp.ones_like(exponent))
            step = xp.where(step > 0.5, step, xp.full_like(step, 0.5))
            factor = xp.where(inside, factor, factor * step)
            return index + 1, factor, fit(fixed, shift, factor, index >= _SCALE_ALL_FROM)

        # The first attempt is part of the loop, so that it is not compiled twice.
        start = xp.asarray(0), factor, xp.zeros_like(factor, dtype=xp.bool)
        index, factor, _ = arrays.while_loop(
            xp, lambda carry: (carry[0] < _ATTEMPTS) & ~xp.all(carry[2]), attempt, start
        )
        return stored(x, offset, factor, index > _SCALE_ALL_FROM)
    for round_ in range(_ATTEMPTS):
        result = stored(x, offset, factor, round_ >= _SCALE_ALL_FROM)
        inside = fits(arrays.to_compute(xp, result))
        done = arrays.truth(xp.all(inside))
        if done or (done is None and round_ == 2):
            break
        step = max(0.5, 1.0 - eps * 2.0 ** (round_ + first))
        factor = xp.where(inside, factor, factor * step)
    return result
