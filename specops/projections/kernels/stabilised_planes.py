"""The nearest kernel with operator norm at most c, by one half-space a round."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from specops.arrays.workers import one_blas_thread
from specops.projections.kernels.excess import excess
from specops.projections.kernels.half_spaces import HalfSpaces
from specops.projections.kernels.solution import Solution, Tolerance
from specops.projections.kernels.support import Support

_OUTER = 0.5
"""Share of the minimiser over the half-spaces in the next query: of 0.3, 0.5, 0.7 and 0.85 the best
in its worst case, on normal kernels at c = 0.9 to 0.25·σ₁. All of it takes twice the rounds."""


@one_blas_thread()
def nearest_by_half_spaces(
    support: Support,
    kernel: np.ndarray,
    limit: float,
    start: HalfSpaces,
    precision: Any,
    *,
    tolerance: Tolerance,
    max_rounds: int,
) -> Solution:
    r"""Solve :math:`\min_X \tfrac12\|K-X\|^2` subject to ``‖A(X)‖ ≤ c`` where K is far outside.

    A half-space for each of thousands of singular values is too much. With S(·) soft
    thresholding of the blocks at c, that of :math:`Z = S(A Y)` for any kernel Y speaks for all:

    .. math:: \|A(X)\| \le c \;\Rightarrow\; \langle X, A^*Z\rangle \le c\|Z\|_*.

    Each round adds that of its query Y, and the nearest point X of all so far bounds the
    distance from below. Y scaled onto the ball is feasible. The next query lies between X,
    which is outside the ball, and the round of alternating projections from Y, which is nearly
    inside: at one of the two alone the method is that of Kelley, which swings, or does not end
    at the nearest point.

    Parameters
    ----------
    support : Support
        Coordinates and blocks.
    kernel : array
        Coordinates of K, float64 or complex128.
    limit : float
        c.
    start : HalfSpaces
        To start from, such as those of a similar kernel.
    precision : dtype
        Of coordinates whose blocks are decomposed.
    tolerance : Tolerance
        When to stop.
    max_rounds : int
        Decompositions of all blocks at the most.

    References
    ----------
    Kelley 1960 (cutting planes); Ben-Ameur & Neto 2007 (queries between inside and outside).
    """
    spaces, dual, outer = start.nearest(kernel, limit)
    best, x = Solution(0.0 * kernel, math.inf, dual, 0), outer
    cold = not len(spaces)
    for rounds in range(1, max_rounds + 1):
        now = excess(support, x.astype(precision), limit)
        feasible = x * min(1.0, limit / now.top)
        primal = 0.5 * float(np.sum(np.abs(kernel - feasible) ** 2))
        if now.nuclear > 0:
            joined = spaces.joined(now.direction, now.nuclear)
            spaces, dual, outer = joined.nearest(kernel, limit)
            best.dual = max(best.dual, dual)
        if primal < best.primal:
            scaled = now.top > limit
            best = Solution(feasible, primal, best.dual, 0, None, now.near, scaled, best.first)
        if rounds == 1 and cold:
            best.first = now.top
        best.rounds, best.cuts = rounds, spaces
        if best.suffices(kernel, tolerance):
            break
        x = _OUTER * outer + (1.0 - _OUTER) * (x - support.per_tap(np, now.direction))
    return best
