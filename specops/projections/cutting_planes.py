"""The nearest kernel of a support with operator norm at most c, by cutting planes."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np

from specops.arrays.workers import one_blas_thread
from specops.linalg.nonnegative_qp import nonnegative_qp
from specops.projections.axes import Axes
from specops.projections.scan import above
from specops.projections.support import Solution, Support, Tolerance

_CUTS_PER_AXIS = 3
_HOPELESS = 5
"""Cuts in one round, per axis that is affordable, from which too many will stay."""


def most_axes(support: Support) -> int:
    """Active axes from which quadratic programs cost more than rounds of a first-order method.

    A dozen programs, of about 30·N³ multiplications, against a hundred rounds.
    """
    return int(min(1000.0, max(100.0, (0.28 * support.work) ** (1.0 / 3.0))))


@one_blas_thread()
def nearest_by_cutting_planes(
    support: Support,
    kernel: np.ndarray,
    limit: float,
    axes: Axes,
    precision: Any,
    *,
    tolerance: Tolerance,
    max_rounds: int,
) -> Solution:
    r"""Solve :math:`\min_X \tfrac12\|K-X\|^2` subject to ``‖A(X)‖ ≤ c`` by its dual.

    The ball is the set of X with ⟨X, E⟩ ≤ c for every axis E. Over a finite set of axes the
    dual is the quadratic program

    .. math:: \min_{\lambda\ge0}\ \tfrac12\bigl\|K-\sum\lambda_jE_j\bigr\|^2 + c\sum\lambda_j,
              \qquad X = K - \sum\lambda_jE_j.

    Each round solves it, adds the axes of every singular value of X above c, and drops those
    without multiplier. X scaled onto the ball is feasible, any λ bounds the distance from
    below: the two give the certificate ``‖x − X*‖² ≤ 2(primal − dual)``.

    Parameters
    ----------
    support : Support
        Coordinates and blocks.
    kernel : array
        Coordinates of K, float64 or complex128.
    limit : float
        c.
    axes : Axes
        To start from, with multipliers, such as those of a similar kernel.
    precision : dtype
        Of coordinates whose blocks are looked through.
    tolerance : Tolerance
        When to stop.
    max_rounds : int
        Stop after as many rounds, or when more than `most_axes` are active.

    References
    ----------
    Kelley 1960 (cutting planes).
    """
    most = most_axes(support)
    linear = axes.inner(support, kernel)
    if linear.max(initial=0.0) > limit:
        axes, x = _solved(support, kernel, limit, axes, linear)
    else:
        axes, x = Axes.none(support), kernel
    best = Solution(0.0 * kernel, math.inf, 0.0, 0, axes)
    for rounds in range(1, max_rounds + 1):
        top, cuts, suspects = above(support, x.astype(precision), limit)
        nuclear = float(axes.weight.sum())
        now = Solution.certified(kernel, x, top, limit, nuclear, rounds)
        now = replace(now, axes=axes, suspects=suspects)
        best = now.better(replace(best, rounds=0))
        if best.suffices(kernel, tolerance) or not len(cuts):
            break
        if len(axes) > most or len(cuts) > _HOPELESS * most:
            best.overflowed = True
            break
        joined = axes.joined(cuts.largest(_CUTS_PER_AXIS * most).reset())
        axes, x = _solved(support, kernel, limit, joined, joined.inner(support, kernel))
    return best


def _solved(
    support: Support, kernel: np.ndarray, limit: float, axes: Axes, linear: np.ndarray
) -> tuple[Axes, np.ndarray]:
    """(axes with their multipliers, X) of the quadratic program."""
    multipliers = nonnegative_qp(axes.gram(support), linear - limit, axes.weight)
    axes = axes.weighted(multipliers)
    return axes, kernel - axes.combined(support) if len(axes) else kernel
