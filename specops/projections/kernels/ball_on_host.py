"""Concrete kernels into the operator ball: in NumPy, to a certified gap."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np

from specops import arrays
from specops.arrays import host, workers
from specops.linalg.inside import seen_outside
from specops.projections.feasible import store_within
from specops.projections.info import ProjectionInfo
from specops.projections.kernels.active_blocks import all_inside, largest_and_active, near_limit
from specops.projections.kernels.cuts import Cuts
from specops.projections.kernels.cutting_planes import most_cuts, nearest_by_cutting_planes
from specops.projections.kernels.first_order import Dual, alternate, dual_gradient, largest
from specops.projections.kernels.half_spaces import HalfSpaces
from specops.projections.kernels.problem import KernelProblem
from specops.projections.kernels.solution import Solution, Tolerance
from specops.projections.kernels.stabilised_planes import nearest_by_half_spaces
from specops.spectra.torus import host_blocks
from specops.typing import Array, State

_ROUNDS = {
    "cutting-planes": 100,
    "half-spaces": 40,
    "accelerated": 40,
    "dykstra": 200,
    "alternating": 30,
}
"""Rounds by method. Measured on normal kernels of 8² to 16² channels and 3² taps, a gap of 1e-4 at
c = 0.9, 0.8 and 0.5·σ₁ took 2 to 3, 5 to 7 and 14 to 25 rounds of cutting planes; 30 to 40, 50 to
80 and 160 and more accelerated rounds; 110 to 180 and over 200 of Dykstra's method. Half-spaces,
one per round, took 12 to 32 rounds to within 1 to 2 % of the distance at c = 0.5 and 0.25·σ₁. The
alternation was within 1 % after 19 to 30."""
_CLOSE_ENOUGH = 1e-2
"""Relative excess at which the alternation stops and the final rescaling takes over: from there on
each round gains little."""
_CLEAR = 1e-3
"""Beyond this relative distance from the limit measured norms decide: it is a thousand times their
error in single precision."""
_ALTERNATE_ABOVE = 1e3
"""If a lower bound of σ₁/c is larger, differences in the dual methods cancel: in single precision
K − A*Z then loses three of its seven digits, and the gap needs the rest."""
_SAMPLED = 8
"""How many blocks are looked at first. Of 20 normal kernels of 16² channels on 16² points they
showed 8 to be outside at σ₁ = 1.02·c, 17 at 1.1·c and all at 1.5·c."""
_FAR = {False: 2.0, True: 0.5}
"""Cuts are not tried if more singular values than so many per affordable cut are above c; True: a
distance is tolerated. There, with 0.9 of them, 512² channels took 4 rounds of half-spaces, and 4
more of cuts if these were tried first; with 0.25 a ResNet-20 in training took as long. Otherwise
neighbours on a fine grid are cut together: with 1.25 to 2, cuts took a third to a twelfth of the
time of acceleration on four kernels; on one they were tried in vain, which took 1.8 times as
long."""
_PATIENCE = 2e12
"""Unless the caller asks for a number of rounds, no more begin after so many multiplications, as
`Support.work` counts them: 74 rounds of 64² channels on 32² points. A bound by reasoning, not a
measurement: a minute at 3e10 multiplications a second."""


class HostSolver:
    """Project a kernel whose values are known, wherever it lives.

    Parameters
    ----------
    problem : KernelProblem
        The kernel and its bound.
    """

    def __init__(self, problem: KernelProblem) -> None:
        self.problem, self.support, self.geometry = problem, problem.support, problem.geometry
        self.kernel = self.geometry.kernel(arrays.to_numpy(problem.given.w))
        self.x0 = self.support.coordinates(np, self.kernel)
        self.limit = problem.bound * problem.certificate / problem.unit
        self.target = self.limit * problem.margin

    def project(
        self,
        method: str,
        iterations: int | None,
        tolerance: Tolerance,
        state: State,
        measure: bool,
    ) -> tuple[Array, ProjectionInfo]:
        """(the weight inside the ball, what happened)."""
        x0, limit = self.x0, self.limit
        start = self.start(state)
        before = float(start.inner(self.support, x0).max(initial=0.0))
        if before <= limit:
            outside, active = self._surely_outside(), None
            before = math.nan
            if measure and not outside:
                before, active = largest_and_active(self.support, x0, limit)
            if before <= limit * (1.0 - _CLEAR) or (
                # Written so that NaN is neither clearly inside nor clearly outside.
                not outside
                and not before > limit * (1.0 + _CLEAR)
                and self._fits(self._exact(self.kernel), active)
            ):
                return self.problem.w, self._info(before, before, 0.0, 0, start)
        found = self._solve(method, start, iterations, tolerance)
        result, stored, kernel = self._store(found)
        after = math.nan
        if measure:
            if math.isnan(before):
                before = found.first if found.first > limit else self._measured(x0)
            after = min(limit, self._norm_of(found, stored))
        # The distance of kernels: coordinates omit parts that cancel where taps wrap.
        found.primal = 0.5 * float(np.sum(np.abs(_double(self.kernel) - _double(kernel)) ** 2))
        gap = found.gap(_double(x0))
        return result, self._info(before, after, gap, found.rounds, found.cuts or start)

    def start(self, state: State) -> Cuts | HalfSpaces:
        """What a state holds to start from; raises StateError if it is of another geometry."""
        if "direction" in state:
            return HalfSpaces.from_state(state, self.support, _double(self.x0))
        return Cuts.from_state(state, self.support) if state else Cuts.none(self.support)

    def _norm_of(self, found: Solution, stored: np.ndarray) -> float:
        """The norm of the stored kernel, which is known if it was scaled onto the sphere."""
        rounded = self.support.symbol.folds or self.problem.w.dtype != self.problem.given.w.dtype
        if found.scaled and not rounded:
            # In double precision, because squares of tiny entries would underflow.
            size = float(np.linalg.norm(_double(found.x)))
            return self.target * float(np.linalg.norm(_double(stored))) / size if size > 0 else 0.0
        return self.limit * self._measured(stored / np.asarray(self.limit, stored.real.dtype))

    def _measured(self, x: np.ndarray) -> float:
        return float(largest(np, self.support, x))

    @workers.one_blas_thread()
    def _surely_outside(self) -> bool:
        """Whether a few blocks, the one of frequency zero among them, exceed the limit."""
        symbol, limit = self.support.symbol, self.limit * (1.0 + _CLEAR)
        # In double precision, because the square of a tiny limit would underflow.
        coefficients = self.support.coefficients(np, _double(self.x0))
        if seen_outside(np, host_blocks(coefficients, symbol, slice(1))[0, 0], limit):
            return True
        chosen = np.unique(np.linspace(0, len(symbol.frequencies) - 1, _SAMPLED).astype(int))
        blocks = host_blocks(coefficients, symbol, chosen)
        return bool(host.exceeds(host.gram(blocks), limit).any())

    def _solve(
        self,
        method: str,
        start: Cuts | HalfSpaces,
        iterations: int | None,
        tolerance: Tolerance,
    ) -> Solution:
        size = float(np.linalg.norm(self.x0)) / math.sqrt(min(self.support.symbol.block_shape))
        if method == "auto" and size > _ALTERNATE_ABOVE * self.target:
            method = "alternating"
        if method == "alternating":
            return self._alternating(iterations)
        if method not in ("auto", "cutting-planes"):
            return self._by_dual(method, iterations, tolerance)
        many = self._above() > _FAR[tolerance.loose] * most_cuts(self.support, tolerance)
        best: Solution | None = None
        if not many:
            kernel = _double(self.x0)
            cuts = start if isinstance(start, Cuts) else Cuts.none(self.support)
            rounds = iterations or _ROUNDS["cutting-planes"]
            best = nearest_by_cutting_planes(
                self.support,
                kernel,
                self.target,
                cuts,
                self.x0.dtype,
                tolerance=tolerance,
                max_rounds=rounds,
            )
            if not best.overflowed or best.rounds == rounds:
                return best
        left = None if iterations is None else iterations - (best.rounds if best else 0)
        far = self._far(start, left, tolerance)
        return far.better(best) if best else far

    def _far(
        self, start: Cuts | HalfSpaces, iterations: int | None, tolerance: Tolerance
    ) -> Solution:
        """The solution if too many singular values exceed the limit for a half-space each."""
        if not tolerance.loose:
            return self._by_dual("accelerated", iterations, tolerance)
        kernel = _double(self.x0)
        return nearest_by_half_spaces(
            self.support,
            kernel,
            self.target,
            start if isinstance(start, HalfSpaces) else HalfSpaces.none(kernel),
            self.x0.dtype,
            tolerance=tolerance,
            max_rounds=iterations or _ROUNDS["half-spaces"],
        )

    @workers.one_blas_thread()
    def _above(self) -> float:
        """The number of singular values above the limit in all blocks, estimated from a few."""
        count = len(self.support.symbol.frequencies)
        chosen = np.linspace(0, count - 1, max(2, min(_SAMPLED, count // 16))).astype(int)
        coefficients = self.support.coefficients(np, self.x0)
        values = np.linalg.eigvalsh(
            host.gram(host_blocks(coefficients, self.support.symbol, np.unique(chosen)))
        )
        return count * float((values > self.target**2).sum(axis=(-2, -1)).mean())

    def _by_dual(self, method: str, iterations: int | None, tolerance: Tolerance) -> Solution:
        kernel, limit = _double(self.x0), self.target
        best: list[Solution] = []

        def done(now: Dual) -> bool:
            top, nuclear = self._measured(now.x), float(now.nuclear)
            change = _double(self.support.gather(np, now.z))
            solution = Solution.certified(
                kernel, _double(now.x), top, limit, nuclear, change=change
            )
            best[:] = [solution.better(best[0]) if best else solution]
            return best[0].suffices(kernel, tolerance)

        _, rounds = dual_gradient(
            np,
            self.support,
            self.x0,
            np.asarray(limit, self.x0.real.dtype),
            momentum=method == "accelerated",
            done=done,
            max_rounds=iterations or self._affordable(method),
        )
        best[0].rounds = rounds
        return best[0]

    def _affordable(self, method: str) -> int:
        """Rounds within `_PATIENCE`, at most 200, and never fewer than `_ROUNDS` says."""
        return max(_ROUNDS[method], min(200, int(_PATIENCE / self.support.work)))

    def _alternating(self, iterations: int | None) -> Solution:
        x, limit = self.x0, self.target
        bound = np.asarray(limit, x.real.dtype)
        active: np.ndarray | None = None
        top, rounds = np.inf, 0
        while rounds < (iterations or _ROUNDS["alternating"]):
            x = alternate(np, self.support, x, bound)
            rounds += 1
            if iterations is None:
                top, active = largest_and_active(self.support, x)
                if top <= limit * (1.0 + _CLOSE_ENOUGH):
                    break
        if iterations is not None:
            top, active = largest_and_active(self.support, x)
        found = Solution.certified(_double(self.x0), _double(x), top, limit, 0.0, rounds)
        # Without multipliers the only lower bound of the distance is zero. In the kernel as scaled
        # onto the ball, blocks near the limit are those that were near the largest value.
        return replace(found, dual=0.0, active=active)

    def _store(self, found: Solution) -> tuple[Array, np.ndarray, np.ndarray]:
        """(the weight in its own dtype, its coordinates, its kernel), inside as stored."""
        given, w = self.problem.given, self.problem.w
        like = given.w
        weight = arrays.like(self.geometry.weight(self.support.kernel(np, found.x)), like)
        # The operator does not see parts that cancel where taps wrap: they stay as they are.
        unseen = self.support.unseen(np, _double(self.kernel))
        if unseen is not None:
            unseen = arrays.like(self.geometry.weight(unseen), like) * given.scale
        stored = kernel = self.x0
        # Blocks far from the limit stay far, unless rounding is coarse: in half precision, or that
        # of unseen parts, which may be large beside the limit.
        active = found.active if w.dtype == like.dtype and unseen is None else None

        def fits(array: Array) -> Array:
            nonlocal stored, kernel
            kernel = self.geometry.kernel(arrays.to_numpy(array / given.scale))
            stored = self.support.coordinates(np, kernel)
            return arrays.constant(np.asarray(self._fits(self._exact(kernel), active)), like)

        weight = weight * given.scale
        result = store_within(given.xp, weight, w.dtype, fits, offset=unseen)
        if unseen is not None and not arrays.truth(fits(arrays.to_compute(given.xp, result))):
            # With any remainder of the unseen part, rounding leads outside: store without it.
            result = store_within(given.xp, weight, w.dtype, fits)
        return result, stored, kernel

    def _exact(self, kernel: np.ndarray) -> np.ndarray:
        """The kernel's coordinates, in double precision if taps wrap onto each other and add up."""
        kernel = _double(kernel) if self.support.symbol.folds else kernel
        coordinates: np.ndarray = self.support.coordinates(np, kernel)
        return coordinates

    def _fits(self, x: np.ndarray, active: np.ndarray | None = None) -> bool:
        if active is None:
            active = near_limit(self.support, x, self.limit)
        return all_inside(self.support, x, self.limit, active)

    def _info(
        self, before: float, after: float, gap: float, rounds: int, cuts: Cuts | HalfSpaces
    ) -> ProjectionInfo:
        unit = self.problem.unit / self.problem.certificate
        state = cuts.state(self.support, self.problem.given.w) if len(cuts) else {}
        return self.problem.info(before * unit, after * unit, gap, rounds, state)


def _double(x: np.ndarray) -> np.ndarray:
    return x.astype(np.result_type(x, np.float64))
