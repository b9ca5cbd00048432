"""Functions of singular values for `spectral_function`: piecewise linear, with their slopes.

A value on a kink, up to rounding, counts half to either side: its derivative is the mean of both.
"""

from __future__ import annotations

from typing import Any

from specops import arrays
from specops.typing import Array, Namespace


def between(xp: Namespace, s: Array, lower: Any, upper: Any) -> tuple[Array, Array]:
    """(clip(σ, lower, upper), its slope); bounds broadcast with σ, None means no bound."""
    value, smooth, slope = s, xp.zeros_like(s), xp.ones_like(s)
    for bound, sign in ((lower, 1.0), (upper, -1.0)):
        if bound is not None:
            bound = bound + xp.zeros_like(s)
            value = xp.where(sign * (bound - value) > 0, bound, value)
            share = _step(xp, sign * (bound - s), s)
            # A bound may be infinite, also after division by the weight's scale.
            known = (share > 0) & xp.isfinite(bound)
            smooth = smooth + share * xp.where(known, bound, xp.zeros_like(s))
            slope = slope - share
    finite = xp.where(xp.isfinite(s), s, xp.zeros_like(s))
    return _of_value(value, smooth + slope * finite), slope


def above(xp: Namespace, s: Array, threshold: Any) -> tuple[Array, Array]:
    """(max(σ − threshold, 0), its slope)."""
    kept, slope = between(xp, s, None, threshold)
    return s - kept, 1.0 - slope


def above_for_sum(xp: Namespace, s: Array, total: Array) -> tuple[Array, Array]:
    """(max(σ − θ, 0), its slope), θ such that they sum to `total`; σ descend and sum to more.

    References
    ----------
    Duchi, Shalev-Shwartz, Singer & Chandra 2008.
    """
    # Differences to the largest value: a total far below it would vanish in rounding otherwise.
    below = s - s[..., :1]
    count = xp.cumulative_sum(xp.ones_like(s), axis=-1)
    kept = below * count - xp.cumulative_sum(below, axis=-1) > -total[..., None]

    def threshold(weights: Array) -> Array:
        number = xp.sum(weights, axis=-1)
        number = xp.where(number < 1.0, xp.ones_like(number), number)
        return ((xp.sum(below * weights, axis=-1) - total) / number)[..., None]

    ones, zeros = xp.ones_like(s), xp.zeros_like(s)
    least = threshold(xp.where(kept, ones, zeros))
    slope = _step(xp, below - least, s)
    strict, wide = xp.where(slope == 1.0, ones, zeros), xp.where(slope > 0.0, ones, zeros)
    smooth = 0.5 * sum(x * (below - threshold(x)) for x in (strict, wide))
    return _of_value(xp.where(below > least, below - least, zeros), smooth), slope


def _step(xp: Namespace, x: Array, s: Array) -> Array:
    """1 where x is positive, 0 where it is negative, ½ where it is zero up to rounding of σ."""
    rounding = (8.0 + 2.0 * s.shape[-1] ** 0.5) * arrays.epsilon(s.dtype) * s[..., :1]
    ones = xp.ones_like(s)
    side = xp.where(x > 0, ones, 0.0 * ones)
    return xp.where(xp.abs(x) <= rounding, 0.5 * ones, side)


def _of_value(value: Array, smooth: Array) -> Array:
    """The value, with the derivative of `smooth`."""
    value, fixed = arrays.stop_gradient(value), arrays.stop_gradient(smooth)
    return value + (smooth - fixed)
