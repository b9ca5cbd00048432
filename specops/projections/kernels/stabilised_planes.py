"""The nearest kernel with operator norm at most c, by two half-spaces per round."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from specops.arrays.workers import one_blas_thread
from specops.projections.kernels.excess import excess
from specops.projections.kernels.half_spaces import HalfSpaces
from specops.projections.kernels.solution import Solution, Tolerance
from specops.projections.kernels.support import Support

OUTER = 0.5
"""Share of the minimiser over the half-spaces in the next query: of 0.3, 0.5, 0.7 and 0.85 the one
with the best worst case, on normal kernels at c = 0.9 to 0.25·σ₁. A share of 1 takes twice the
rounds."""


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

    A half-space for each of thousands of singular values would be too many. With S(·) soft
    thresholding of the blocks at c, :math:`Z = S(A Y)` of any kernel Y gives one for all of them:

    .. math:: \|A(X)\| \le c \;\Rightarrow\; \langle X, A^*Z\rangle \le c\|Z\|_*.

    Each round adds that half-space of its query Y, and one of the farthest block alone, which
    decides how much Y has to be scaled. The nearest point X in all half-spaces so far bounds the
    distance from below; Y scaled onto the ball is feasible. The next query lies between X,
    which is outside the ball, and the result of a round of alternating projections from Y, which is
    nearly inside. With X alone the method would be that of Kelley, which oscillates; with the other
    alone it would not end at the nearest point.

    With many frequencies for the size of the kernel, neighbours give nearly the same information:
    the first rounds look at a sample of frequencies. Their half-spaces are valid for all.

    Parameters
    ----------
    support : Support
        Coordinates and blocks.
    kernel : array
        Coordinates of K, float64 or complex128.
    limit : float
        The bound c.
    start : HalfSpaces
        Half-spaces to start from, such as those of a similar kernel.
    precision : dtype
        The dtype in which blocks are decomposed.
    tolerance : Tolerance
        When to stop.
    max_rounds : int
        Largest number of decompositions of all blocks, and of the sample.

    References
    ----------
    Kelley 1960 (cutting planes); Ben-Ameur & Neto 2007 (queries between inside and outside).
    """
    search = _Search(support, kernel, limit, start, precision)
    sample = support.sample
    if len(sample):
        search.run(tolerance, max_rounds, sample)
    return search.run(tolerance, max_rounds)


class _Search:
    """The half-spaces so far, the nearest point that is in all of them, and the next query."""

    def __init__(
        self,
        support: Support,
        kernel: np.ndarray,
        limit: float,
        start: HalfSpaces,
        precision: Any,
    ) -> None:
        self.support, self.kernel, self.limit = support, kernel, limit
        self.precision = precision
        self.spaces, self.dual, self.outer = start.nearest(kernel, limit)
        self.x, self.cold = self.outer, not len(self.spaces)

    def run(
        self, tolerance: Tolerance, max_rounds: int, chosen: np.ndarray | None = None
    ) -> Solution:
        """Rounds until a point is near enough, on all frequencies or only the chosen ones."""
        kernel, limit = self.kernel, self.limit
        best = Solution(0.0 * kernel, math.inf, self.dual, 0)
        for rounds in range(1, max_rounds + 1):
            x = self.x
            now = excess(self.support, x.astype(self.precision), limit, chosen)
            feasible = x * min(1.0, limit / now.top)
            primal = 0.5 * float(np.sum(np.abs(kernel - feasible) ** 2))
            if now.top > limit:
                joined = self.spaces.joined(now.planes)
                self.spaces, dual, self.outer = joined.nearest(kernel, limit)
                self.dual = best.dual = max(best.dual, dual)
            if primal < best.primal:
                scaled = now.top > limit
                best = Solution(feasible, primal, best.dual, 0, None, now.near, scaled, best.first)
            if self.cold and chosen is None:
                best.first = now.top
            self.cold = False
            best.rounds, best.cuts = rounds, self.spaces
            inner = x - self.support.per_tap(np, now.planes[0][0])
            self.x = OUTER * self.outer + (1.0 - OUTER) * inner
            if best.suffices(kernel, tolerance):
                break
        return best
