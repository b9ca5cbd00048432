"""The nearest kernel of a support with operator norm at most c, by cutting planes."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np

from specops.arrays.workers import one_blas_thread
from specops.linalg.nonnegative_qp import nonnegative_qp
from specops.projections.kernels.active_blocks import violated
from specops.projections.kernels.cuts import Cuts
from specops.projections.kernels.solution import Solution, Tolerance
from specops.projections.kernels.support import Support

_ADDED = 3
"""Most cuts added in one round, per affordable cut: of those that were violated in a round, for
normal kernels of 8² to 16² channels, 1/3 (c = 0.5·σ₁) to 1/9 (0.9·σ₁) were active in the end."""
_HOPELESS = 5
"""If one round has more cuts than this per affordable cut, too many will stay, by the same
count."""


def most_cuts(support: Support, tolerance: Tolerance) -> int:
    """The most active cuts that are affordable: with more, another method costs less.

    A bound by reasoning: a dozen quadratic programs of about 30·N³ multiplications should not cost
    more than a hundred rounds of a first-order method. 100 cuts, 4e8 multiplications, are always
    affordable, and more than 1000, 4e11, never. If a distance is tolerated, so that two half-spaces
    per round suffice, the cost of a tenth of a round and 20 cuts are affordable: of this, five
    times as much and no cuts at all it was the quickest in training small layers, by less than
    times scattered.
    """
    rounds, least = (0.1, 20.0) if tolerance.loose else (100.0, 100.0)
    return int(min(1000.0, max(least, (rounds * support.work / (12.0 * 30.0)) ** (1.0 / 3.0))))


@one_blas_thread()
def nearest_by_cutting_planes(
    support: Support,
    kernel: np.ndarray,
    limit: float,
    cuts: Cuts,
    precision: Any,
    *,
    tolerance: Tolerance,
    max_rounds: int,
) -> Solution:
    r"""Solve :math:`\min_X \tfrac12\|K-X\|^2` subject to ``‖A(X)‖ ≤ c`` by its dual.

    The ball is the set of X with ⟨X, E⟩ ≤ c for every cut E. Over a finite set of cuts the
    dual is the quadratic program

    .. math:: \min_{\lambda\ge0}\ \tfrac12\bigl\|K-\sum\lambda_jE_j\bigr\|^2 + c\sum\lambda_j,
              \qquad X = K - \sum\lambda_jE_j.

    Each round solves it, adds the cuts of every singular value of X above c, and drops those
    without multiplier. X scaled onto the ball is feasible, any λ bounds the distance from
    below: the two give the certificate ``‖x − X*‖² ≤ 2(primal − dual)``.

    Parameters
    ----------
    support : Support
        Coordinates and blocks.
    kernel : array
        Coordinates of K, float64 or complex128.
    limit : float
        The bound c.
    cuts : Cuts
        Half-spaces to start from, with multipliers, such as those of a similar kernel.
    precision : dtype
        The dtype in which blocks are searched for values above the bound.
    tolerance : Tolerance
        When to stop.
    max_rounds : int
        Stop after as many rounds, or when more than `most_cuts` are active.

    References
    ----------
    Kelley 1960 (cutting planes).
    """
    most = most_cuts(support, tolerance)
    linear = cuts.inner(support, kernel)
    if linear.max(initial=0.0) > limit:
        cuts, x = _solved(support, kernel, limit, cuts, linear)
    else:
        cuts, x = Cuts.none(support), kernel
    cold, best = not len(cuts), Solution(0.0 * kernel, math.inf, 0.0, 0, cuts)
    for rounds in range(1, max_rounds + 1):
        top, new, active = violated(support, x.astype(precision), limit)
        nuclear = float(cuts.weight.sum())
        now = Solution.certified(kernel, x, top, limit, nuclear, rounds)
        first = top if cold and rounds == 1 else 0.0
        now = replace(now, cuts=cuts, active=active, first=first)
        best = now.better(replace(best, rounds=0))
        if best.suffices(kernel, tolerance) or not len(new):
            break
        if len(cuts) > most or len(new) > _HOPELESS * most:
            best.overflowed = True
            break
        joined = cuts.joined(new.largest(_ADDED * most).reset())
        cuts, x = _solved(support, kernel, limit, joined, joined.inner(support, kernel))
    return best


def _solved(
    support: Support, kernel: np.ndarray, limit: float, cuts: Cuts, linear: np.ndarray
) -> tuple[Cuts, np.ndarray]:
    """(cuts with their multipliers, X) of the quadratic program."""
    multipliers = nonnegative_qp(cuts.gram(support), linear - limit, cuts.weight)
    cuts = cuts.weighted(multipliers)
    return cuts, kernel - cuts.combined(support) if len(cuts) else kernel
