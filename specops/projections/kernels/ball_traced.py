"""Kernels into the operator ball where values are unknown, or differentiated."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from specops import arrays
from specops.arrays.gram import below
from specops.arrays.solvers import has_cholesky
from specops.projections.feasible import store_within
from specops.projections.info import ProjectionInfo
from specops.projections.kernels.aggregated_planes import Found, nearest_by_summed_half_spaces
from specops.projections.kernels.first_order import Dual, alternate, dual_gradient, largest
from specops.projections.kernels.problem import KernelProblem
from specops.projections.kernels.solution import Tolerance
from specops.projections.kernels.support import Support
from specops.typing import Array, Namespace

_ROUNDS_WHEN_TRACED = {"accelerated": 20, "dykstra": 40, "alternating": 5}
"""On normal kernels of 8² to 16² channels at c = 0.9 to 0.5·σ₁ the first two moved 2 to 15 %
further than the nearest kernel is away, five rounds of alternation 5 to 50 %."""
_PLANES = 20
"""Rounds of half-spaces at the most: kernels of 16 to 64 channels were certified within a tenth of
the distance after 1 to 7."""


def project_traced(
    problem: KernelProblem, method: str, iterations: int | None, tolerance: Tolerance
) -> tuple[Array, ProjectionInfo]:
    """(the weight inside the ball, what happened) by first-order rounds.

    As many as are asked for, or as the table says; fewer where a loose tolerance is met before. By
    half-spaces where one is, and loops may be of unknown length.
    """
    given, geometry, support = problem.given, problem.geometry, problem.support
    xp, w = given.xp, problem.w
    kernel = geometry.kernel(given.w)
    x0 = support.coordinates(xp, kernel)
    # A loop carries what comes of it in the precision in which it computes.
    limit = xp.astype(problem.max_norm * problem.certificate / given.scale, given.scale.dtype)
    target = limit * problem.margin
    finite = arrays.all_finite(xp, w)
    automatic = method in ("auto", "cutting-planes")
    rounds = _Rounds("accelerated" if automatic else method, iterations, tolerance)
    # Also where a derivative by one of them alone is asked for outside of a compiler.
    staged = arrays.is_staged(x0) or arrays.is_staged(target)
    if automatic and tolerance.loose and iterations is None and staged:

        def found_by(change: Array | None, x0: Array, limit: Array, target: Array) -> Found:
            return nearest_by_summed_half_spaces(
                xp,
                support,
                x0 if change is None else x0 + change,
                limit,
                target,
                tolerance=tolerance,
                max_rounds=_PLANES,
                differentiable=change is not None,
            )

        # Decompositions of infinities need not return.
        safe = xp.where(finite, x0, xp.zeros_like(x0))
        found: Found = arrays.expanded(lambda x: x, found_by, safe, limit, target)
    else:
        before = largest(xp, support, arrays.stop_gradient(x0))
        if arrays.truth(before <= limit):
            size = before * given.scale / problem.certificate
            return w, ProjectionInfo(size, size, xp.zeros_like(size), 0)
        found = rounds.run(xp, support, x0, target, before)
    result = support.kernel(xp, found.x)
    unseen = support.unseen(xp, kernel)
    if unseen is not None:
        result = result + unseen
    inside = found.before <= limit
    untouched = inside | ~finite
    result = xp.where(untouched, kernel, result) * given.scale

    def coordinates(weight: Array) -> Array:
        return support.coordinates(xp, geometry.kernel(weight / given.scale))

    def fits(weight: Array) -> Array:
        return untouched | _is_inside(xp, support, coordinates(weight), limit)

    stored = store_within(xp, geometry.weight(result), w.dtype, fits)
    # An infinite scale would not leave the other entries what they were.
    stored = xp.where(finite, stored, w)
    after = coordinates(arrays.to_compute(xp, stored))
    primal = 0.5 * xp.sum(xp.abs(x0 - after) ** 2)
    if unseen is not None:
        kept = support.unseen(xp, geometry.kernel(arrays.to_compute(xp, stored) / given.scale))
        primal = primal + 0.5 * xp.sum(xp.abs(unseen - kept) ** 2)
    squared = xp.sum(xp.abs(x0) ** 2)
    gap = 2.0 * (primal - found.dual) / arrays.nonzero(xp, squared)
    gap = xp.where(inside | (gap < 0), xp.zeros_like(gap), gap)
    unit = given.scale / problem.certificate
    norms = found.before * unit, _norm_of(xp, problem, found, after, limit) * unit
    return stored, ProjectionInfo(*norms, gap, found.rounds)


def _is_inside(xp: Namespace, support: Support, x: Array, limit: Array) -> Array:
    """Whether no block has a norm above the limit, by factors that exist only then."""
    if not arrays.is_staged(x):
        return largest(xp, support, x) <= limit
    # Neither the square of a tiny limit nor that of a huge one is a number.
    blocks = support.symbol.blocks(xp, support.coefficients(xp, x / limit))
    limits = xp.broadcast_to(xp.ones_like(limit), blocks.shape[:-2])
    return xp.all(has_cholesky(xp, below(xp, blocks, limits, blocks.dtype)))


def _norm_of(
    xp: Namespace, problem: KernelProblem, found: Found, after: Array, limit: Array
) -> Array:
    """Of what was stored: known, where that is what was found but for its rounding."""
    if not arrays.is_staged(after) or problem.w.dtype != problem.given.w.dtype:
        return largest(xp, problem.support, after)
    # Squares of tiny limits would vanish.
    stored, size = (xp.sqrt(xp.sum(xp.abs(x / limit) ** 2)) for x in (after, found.x))
    norm = found.norm * stored / arrays.nonzero(xp, size)
    norm = xp.where(norm < limit, norm, limit)
    return xp.where(found.before <= limit, found.before, norm)


@dataclass(frozen=True)
class _Rounds:
    """First-order rounds: as many as were asked for, or as the table says."""

    method: str
    iterations: int | None
    tolerance: Tolerance

    def run(
        self,
        xp: Namespace,
        support: Support,
        x0: Array,
        target: Array,
        before: Array,
    ) -> Found:
        """What they find, scaled onto the ball where it is outside."""
        rounds: Any = self.iterations or _ROUNDS_WHEN_TRACED[self.method]

        def scaled(x: Array) -> tuple[Array, Array]:
            top = largest(xp, support, x)
            one = xp.ones_like(top)
            outside = top > target
            x = x * xp.where(outside, target / xp.where(top > 0, top, one), one)
            return x, xp.where(outside, target * one, top)

        if self.method == "alternating":
            x = x0
            for _ in range(rounds):
                x = alternate(xp, support, x, target)
            return Found(*scaled(x), xp.zeros_like(target), before, rounds)

        def bound(now: Dual) -> Array:
            """Half the squared distance of the nearest kernel is at least this."""
            # Not x0 - now.x: just outside the ball its rounding would be all of the distance.
            change = support.gather(xp, now.z)
            products = xp.real(xp.conj(x0) * change) - xp.abs(change) ** 2 * 0.5
            return xp.sum(products) - target * now.nuclear

        def near(now: Dual) -> Array:
            moved = 0.5 * xp.sum(xp.abs(x0 - scaled(now.x)[0]) ** 2)
            return moved <= (1.0 + self.tolerance.distance) ** 2 * bound(now)

        now, rounds = dual_gradient(
            xp,
            support,
            x0,
            target,
            momentum=self.method == "accelerated",
            done=near if self.tolerance.loose and self.iterations is None else None,
            max_rounds=rounds,
        )
        return Found(*scaled(now.x), bound(now), before, rounds)
