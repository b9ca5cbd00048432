"""Clipping the few singular values of a matrix that are above a limit, from a warm start."""

from __future__ import annotations

from specops import arrays
from specops.linalg.clip import Clipped
from specops.linalg.lobpcg import leading_triplets, with_small_columns
from specops.typing import Array, Namespace

_ITERATIONS = 12
"""Most rounds. Normal matrices of 256² to 1024² that had changed by 1e-3 took 5 to 9 rounds in
single precision and all 13 in double, where the test of the result sees what is left."""
_RESIDUAL = {"float32": 3e-6, "float64": 1e-9}
"""Residual of a vector, over σ₁, at which it has converged: 25 units of rounding in single
precision. In double precision the value then errs by its square over the gap, 1e-18 and more."""
_UNCONVERGED_MARGIN = {"float32": 4e-6, "float64": 1e-11}
"""Relative distance from the limit that unconverged vectors need: without it the same matrices
were up to 2e-7 and 1e-13 above the limit."""


def clip_by_lobpcg(xp: Namespace, a: Array, limit: Array, start: Array) -> Clipped | None:
    r"""A − U max(Σ − limit, 0) Vᴴ, σ₁ and the basis to start from next time; None if it fails.

    A few rounds of Rayleigh–Ritz iteration follow the singular vectors of a slowly changing
    matrix. The caller has to test whether any value is still above the limit. The function fails
    if it finds no value above the limit, or more than `start` has vectors.

    Parameters
    ----------
    xp : namespace
        The arrays' namespace.
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
        # These are lower bounds of the leading values: if all are above the limit, others may be.
        if arrays.truth(s[width - 1] >= limit):
            return None
    if arrays.truth(s[0] <= limit):
        return None
    limit = limit * (1.0 - _UNCONVERGED_MARGIN[precision])
    excess = xp.where(s > limit, s - limit, xp.zeros_like(s))
    removed = (u * xp.astype(excess, u.dtype)[None, :]) @ arrays.adjoint(xp, v)
    clipped = a - (arrays.adjoint(xp, removed) if wide else removed)
    return Clipped(clipped, xp.sum(excess), norm=s[0], basis=start)
