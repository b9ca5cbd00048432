"""The nearest kernel whose layer, as an explicit matrix, has norm at most c.

With A the map from kernels to matrices and D = A*A, which is diagonal:

    cutting planes   X = K − ΣλE, λ from the quadratic program over the cuts that X violated
    ADMM             X ← (1 + ρD)⁻¹(K + ρA*(Y − U)), Y ← clip(A X + U), U ← U + A X − Y

Both bound the distance from below by the dual value, of Z = ΣλE or of ρU. Near the ball few cuts
are active and planes take a handful of rounds; far from it, and for a small gap, ADMM is faster.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Literal

import numpy as np

from specops.arrays.workers import one_blas_thread
from specops.maps.explicit import ExplicitMap, norm_of
from specops.projections.kernels.layer_cuts import (
    MOST_AT_ONCE,
    LayerCuts,
    above,
    excess,
)
from specops.projections.kernels.solution import Solution, Tolerance

Far = Literal["admm", "planes", "nothing"]
_MOST = 64
"""With more active cuts ADMM takes over. Normal kernels of 2² to 8² channels and 3² taps had fewer
at c = 0.5·σ₁, where a hundred rounds of planes led to gaps of 3e-9 to 1e-5, and of ADMM to 1e-4 to
3e-4. Those of 8² channels and 7² taps on 3² points had more: there ADMM led to 1e-10, planes to
3e-5."""
_STIFFNESS = 5.0
"""ρ times the mean of D at the start: of 2, 3, 5 and 10 the one that led to 1.1 times the nearest
distance within 5 rounds at c = 0.97 to 0.25·σ₁ of the same kernels."""
_STIFFER_EVERY, _STIFFEST = 15, 20.0
"""The stiffness doubles after so many rounds, up to the second number times σ₁/c. At 0.17·σ₁ 400
rounds then led to gaps of 4e-8 and less, where 100 rounds at 5 led to 2e-3; each doubling up to 80
led to a smaller gap."""
_PLANES = 100
"""Rounds of planes after which ADMM takes over."""
_RELAXED = 1.6
"""Over-relaxation, as Boyd et al. recommend."""


@one_blas_thread()
def nearest_to_layer_ball(
    layer: ExplicitMap,
    kernel: np.ndarray,
    limit: float,
    cuts: LayerCuts,
    *,
    tolerance: Tolerance,
    max_rounds: int,
    far: Far,
) -> tuple[Solution, LayerCuts]:
    """(a kernel in the ball and its certificate, cuts to start from next time).

    Parameters
    ----------
    layer : ExplicitMap
        A.
    kernel : array
        K, float64 or complex128, outside the ball.
    limit : float
        The bound c.
    cuts : LayerCuts
        Half-spaces to start from, such as those of a similar kernel.
    tolerance : Tolerance
        When to stop.
    max_rounds : int
        Largest number of rounds of cutting planes and ADMM together.
    far : "admm", "planes" or "nothing"
        What to do where many cuts are active: go on by ADMM, or by planes, or stop. The primal
        value is infinite then, because no kernel in the ball is known.

    References
    ----------
    Kelley 1960 (cutting planes); Boyd et al. 2011 (ADMM).
    """
    best, cuts, gave_way = _by_planes(
        layer, kernel, limit, cuts, tolerance, max_rounds, gives_way=far != "planes"
    )
    if gave_way and far == "admm":
        return _by_admm(layer, kernel, limit, cuts, tolerance, max_rounds, best)
    return best, cuts


def _by_planes(
    layer: ExplicitMap,
    kernel: np.ndarray,
    limit: float,
    cuts: LayerCuts,
    tolerance: Tolerance,
    max_rounds: int,
    *,
    gives_way: bool,
) -> tuple[Solution, LayerCuts, bool]:
    """(the best point known to be inside, the last cuts, whether too many cuts are active).

    No point is known to be inside before all singular values of the first have been computed.
    """
    x, dual, best = kernel, 0.0, Solution(kernel, math.inf, 0.0, 0)
    if len(cuts):
        cuts = cuts.solved(kernel, limit)
        x = kernel - cuts.combined(kernel)
    for rounds in range(1, max_rounds + 1):
        matrices, nuclear = layer.matrices(x), float(cuts.weight.sum())
        for exact in (False, True):
            top, new, sure = above(layer, matrices, limit, exact=exact)
            now = Solution.certified(kernel, x, top, limit, nuclear, rounds)
            now.dual = dual = max(dual, now.dual)
            # A large layer far outside has more values above the limit than the first look finds.
            hidden = not sure and rounds == 1 and len(new) == MOST_AT_ONCE
            many = hidden or len(cuts) > _MOST or rounds == _PLANES
            many = many and gives_way and rounds < max_rounds
            ends = not len(new) or rounds == max_rounds or now.suffices(kernel, tolerance)
            if sure or many or not ends:
                break
            # To stop, the norm itself is needed, not a lower bound; it costs less than all vectors.
            now = Solution.certified(kernel, x, norm_of(matrices), limit, nuclear, rounds)
            now.dual = dual
            sure = now.suffices(kernel, tolerance)
            if sure:
                break
        if sure and now.primal <= best.primal:
            best = now
        best = replace(best, dual=dual, rounds=rounds)
        if best.suffices(kernel, tolerance):
            many = False
            break
        if many or not len(new):
            break
        fresh = replace(new, weight=np.zeros(len(new)))
        cuts = cuts.joined(fresh).solved(kernel, limit)
        x = kernel - cuts.combined(kernel)
    return best, cuts, many


def _by_admm(
    layer: ExplicitMap,
    kernel: np.ndarray,
    limit: float,
    cuts: LayerCuts,
    tolerance: Tolerance,
    max_rounds: int,
    best: Solution,
) -> tuple[Solution, LayerCuts]:
    """ADMM from the dual point of the cuts; continues to count the rounds of `best`."""
    unit = np.count_nonzero(layer.uses) / float(layer.uses.sum())
    rho, stiffest = _STIFFNESS * unit, _STIFFEST * unit * norm_of(layer.matrices(kernel)) / limit
    dual = cuts.matrices(layer) / rho
    x, image = kernel, layer.matrices(kernel)
    clipped = layer.matrices(kernel - cuts.combined(kernel))
    first = best.rounds + 1
    for rounds in range(first, max_rounds + 1):
        if (rounds - first) % _STIFFER_EVERY == _STIFFER_EVERY - 1 and rho < stiffest:
            rho, dual = 2.0 * rho, 0.5 * dual
        if len(cuts) or rounds > first:
            x = (kernel + rho * layer.gather(clipped - dual)) / (1.0 + rho * layer.uses)
            image = _RELAXED * layer.matrices(x) + (1.0 - _RELAXED) * clipped
        clipped, dual, over = excess(layer, image + dual, limit)
        # The dual value belongs to another point than x, which usually is no nearer.
        other = kernel - rho * layer.gather(dual)
        below = Solution.certified(kernel, other, 0.0, limit, rho * float(over.sum())).dual
        top = norm_of(layer.matrices(x))
        now = replace(Solution.certified(kernel, x, top, limit, 0.0, rounds), dual=below)
        best = now.better(replace(best, rounds=0))
        if best.suffices(kernel, tolerance):
            break
    # For the next, similar kernel, planes start from the largest parts of the dual point.
    return best, above(layer, rho * dual, 0.0, exact=True)[1]
