"""Clipping the few singular values of a matrix that are above a limit, from a warm start."""

from __future__ import annotations

from typing import Any

from specops import arrays
from specops.linalg.clip import Clipped
from specops.linalg.lobpcg import leading_triplets, with_small_columns
from specops.typing import Array

_ITERATIONS = 12
_RESIDUAL = {"float32": 3e-6, "float64": 1e-9}
_MARGIN = {"float32": 4e-6, "float64": 1e-11}
"""Relative distance from the limit that unconverged vectors need."""


def clip_by_lobpcg(xp: Any, a: Array, limit: Array, start: Array) -> Clipped | None:
    r"""A − U max(Σ − limit, 0) Vᴴ, σ₁ and the basis to start from next time; None if it fails.

    A few rounds of Rayleigh–Ritz iteration follow the singular vectors of a slowly changing
    matrix. Whether anything was left above the limit is for the caller to test. None where
    nothing above the limit was seen, or more than `start` can hold.

    Parameters
    ----------
    xp : namespace
        Of the arrays.
    a : array, shape (m, n)
        Concrete.
    limit : array, shape ()
        Positive.
    start : array, shape (min(m, n), p)
        Singular vectors of the smaller side of a similar matrix.
    """
    wide = a.shape[0] <= a.shape[1]
    operator = with_small_columns(xp, a)
    width = start.shape[1]
    precision = arrays.dtype_name(limit.dtype)
    tolerance = residual = _RESIDUAL[precision]
    for iterations in (1, _ITERATIONS):
        u, s, v, start = leading_triplets(
            xp, operator, start, width, iterations=iterations, tolerance=tolerance, floor=limit
        )
        tolerance = residual * min(1.0, float(limit) / max(float(s[0]), 1e-30))
        # Values from below: if all are above, there are more.
        if arrays.truth(s[width - 1] >= limit):
            return None
    if arrays.truth(s[0] <= limit):
        return None
    limit = limit * (1.0 - _MARGIN[precision])
    excess = xp.where(s > limit, s - limit, xp.zeros_like(s))
    removed = (u * xp.astype(excess, u.dtype)[None, :]) @ arrays.adjoint(xp, v)
    clipped = a - (arrays.adjoint(xp, removed) if wide else removed)
    return Clipped(clipped, xp.sum(excess), norm=s[0], basis=start)
