"""Kernels into the operator ball if they are traced, or differentiated."""

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
"""With these rounds, normal kernels of 8² to 16² channels at c = 0.9 to 0.5·σ₁ moved 2 to 15 %
further than the nearest kernel is away by the first two methods, 5 to 50 % by five rounds of
alternation."""
_PLANES = 20
"""Most rounds of half-spaces: kernels of 16 to 64 channels were certified within a tenth of the
distance after 1 to 7."""


def project_traced(
    problem: KernelProblem, method: str, iterations: int | None, tolerance: Tolerance
) -> tuple[Array, ProjectionInfo]:
    """(the weight inside the ball, what happened), by first-order rounds or half-spaces.

    There are as many rounds as the caller asks for, or as `_ROUNDS_WHEN_TRACED` says, and fewer if
    a loose tolerance is met before. With a loose tolerance, and where a loop may have an unknown
    length, half-spaces take the place of first-order rounds.
    """
    given, geometry, support = problem.given, problem.geometry, problem.support
    xp, w = given.xp, problem.w
    kernel = geometry.kernel(given.w)
    x0 = support.coordinates(xp, kernel)
    # In the precision of the kernel: a loop must not change the dtype of what it carries.
    limit = xp.astype(problem.max_norm * problem.certificate / given.scale, given.scale.dtype)
    target = limit * problem.margin
    finite = arrays.all_finite(xp, w)
    automatic = method in ("auto", "cutting-planes")
    rounds = _Rounds("accelerated" if automatic else method, iterations, tolerance)
    # Either may be traced alone: for a derivative by only one of them, outside of a compiler.
    staged = arrays.is_staged(x0) or arrays.is_staged(target)
    if automatic and tolerance.loose and iterations is None and staged:
        # Decompositions of infinities might never end.
        safe = xp.where(finite, x0, xp.zeros_like(x0))
        found = _by_half_spaces(xp, support, safe, limit, target, tolerance)
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
    # If an entry is infinite, the scale is too, and the other entries would not survive it.
    stored = xp.where(finite, stored, w)
    after = coordinates(arrays.to_compute(xp, stored))
    primal = 0.5 * xp.sum(xp.abs(x0 - after) ** 2)
    if unseen is not None:
        kept = support.unseen(xp, geometry.kernel(arrays.to_compute(xp, stored) / given.scale))
        primal = primal + 0.5 * xp.sum(xp.abs(unseen - kept) ** 2)
    gap = 2.0 * (primal - found.dual) / arrays.nonzero(xp, xp.sum(xp.abs(x0) ** 2))
    gap = xp.where(inside | (gap < 0), xp.zeros_like(gap), gap)
    unit = given.scale / problem.certificate
    norms = found.before * unit, _norm_of(xp, problem, found, after, limit) * unit
    return stored, ProjectionInfo(*norms, gap, found.rounds)


def _by_half_spaces(
    xp: Namespace, support: Support, x0: Array, limit: Array, target: Array, tolerance: Tolerance
) -> Found:
    """`nearest_by_summed_half_spaces`, differentiable by the kernel, the limit and the target."""

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

    found: Found = arrays.expanded(lambda x: x, found_by, x0, limit, target)
    return found


def _is_inside(xp: Namespace, support: Support, x: Array, limit: Array) -> Array:
    """Whether no block has a norm above the limit: only then their Cholesky factors exist."""
    if not arrays.is_staged(x):
        return largest(xp, support, x) <= limit
    # Divided by the limit, because the square of a tiny or huge limit would under- or overflow.
    blocks = support.symbol.blocks(xp, support.coefficients(xp, x / limit))
    limits = xp.broadcast_to(xp.ones_like(limit), blocks.shape[:-2])
    return xp.all(has_cholesky(xp, below(xp, blocks, limits, blocks.dtype)))


def _norm_of(
    xp: Namespace, problem: KernelProblem, found: Found, after: Array, limit: Array
) -> Array:
    """The norm of the stored kernel; it is known if storing did no more than scale and round."""
    if not arrays.is_staged(after) or problem.w.dtype != problem.given.w.dtype:
        return largest(xp, problem.support, after)
    # Squares of tiny limits would vanish.
    stored, size = (xp.sqrt(xp.sum(xp.abs(x / limit) ** 2)) for x in (after, found.x))
    norm = found.norm * stored / arrays.nonzero(xp, size)
    norm = xp.where(norm < limit, norm, limit)
    return xp.where(found.before <= limit, found.before, norm)


@dataclass(frozen=True)
class _Rounds:
    """First-order rounds, as many as the caller asks for or as `_ROUNDS_WHEN_TRACED` says."""

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
        """The kernel that they find, scaled onto the ball if it is outside."""
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
            # Not x0 - now.x, which just outside the ball would be nothing but rounding.
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
