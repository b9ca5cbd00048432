"""Kernels of fixed support whose convolution has operator norm at most c."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np

from specops import arrays
from specops.arrays import host, workers
from specops.geometry import Conv
from specops.linalg.inside import seen_outside
from specops.maps.prepare import Prepared
from specops.maps.symbol import certified_symbol
from specops.projections.axes import Axes
from specops.projections.cutting_planes import nearest_by_cutting_planes
from specops.projections.feasible import ProjectionInfo, store_within
from specops.projections.first_order import Dual, alternate, dual_gradient, largest
from specops.projections.scan import largest_and_near, near, within
from specops.projections.support import Solution, Support, Tolerance
from specops.spectra.torus import host_blocks
from specops.typing import Array

METHODS = ("auto", "cutting-planes", "accelerated", "dykstra", "alternating")
_ROUNDS = {"cutting-planes": 100, "accelerated": 40, "dykstra": 200, "alternating": 30}
_ROUNDS_WHEN_TRACED = {"accelerated": 20, "dykstra": 40, "alternating": 5}
_CLOSE_ENOUGH = 1e-2
"""Excess at which the alternation stops and the final rescaling takes over."""
_CLEAR = 1e-3
"""Relative distance from the limit beyond which measured norms decide."""
_FAR = 1e3
"""A lower bound of σ₁, over c, from which the differences of the dual methods cancel."""
_SAMPLED = 8
_PATIENCE = 2e12


class KernelProblem:
    """Project one kernel: in coordinates of its support, in units of its scale.

    Parameters
    ----------
    given : Prepared
        The weight and its Conv.
    w : array
        The weight as given.
    max_norm : float
        The bound.
    """

    def __init__(self, given: Prepared, w: Array, max_norm: float) -> None:
        geometry = given.geometry
        assert isinstance(geometry, Conv)
        sizes = geometry.sizes(tuple(w.shape))
        symbol, self.certificate = certified_symbol(sizes, not arrays.is_complex(given.w))
        self.support = Support(symbol)
        self.geometry, self.given, self.w, self.max_norm = geometry, given, w, max_norm
        # Rounding must not decide which side of the limit the result lands on.
        self.hair = 1.0 - 4.0 * arrays.epsilon(given.w.dtype)

    def project(
        self,
        method: str,
        iterations: int | None,
        tolerance: Tolerance,
        state: dict[str, Array] | None,
        measure: bool,
    ) -> tuple[Array, ProjectionInfo]:
        """(the weight inside the ball, what happened)."""
        bound = self.max_norm
        known = isinstance(bound, float) or arrays.is_concrete(bound)
        if not (known and arrays.is_concrete(self.given.w)):
            return self._traced("accelerated" if method == "auto" else method, iterations)
        # Wherever the kernel lives: its blocks are small matrices, many of them.
        scale = float(arrays.to_numpy(self.given.scale))
        kernel = self.geometry.kernel(arrays.to_numpy(self.given.w))
        x0 = self.support.coordinates(np, kernel)
        bound = bound if isinstance(bound, float) else float(arrays.to_numpy(bound))
        limit = bound * self.certificate / scale
        axes = Axes.from_state(state, self.support) if state else Axes.none(self.support)
        before = float(axes.inner(self.support, x0).max(initial=0.0))
        if before <= limit:
            before = self._norm_if(measure, x0)
            clear = 0.0 < before <= limit * (1.0 - _CLEAR)
            unclear = before <= limit * (1.0 + _CLEAR) and not self._surely_outside(x0, limit)
            if clear or (unclear and self._fits(self._exact(kernel), limit)):
                return self.w, self._info(before, before, 0.0, 0, axes)
        found = self._solve(method, x0, limit * self.hair, axes, iterations, tolerance)
        result, stored = self._store(found, kernel, x0, limit)
        after = min(limit, self._norm_if(measure, stored))
        found.primal = 0.5 * float(np.sum(np.abs(_double(x0) - _double(stored)) ** 2))
        gap = found.gap(_double(x0))
        return result, self._info(before, after, gap, found.rounds, found.axes or axes)

    def _norm_if(self, measure: bool, x: np.ndarray) -> float:
        return float(largest(np, self.support, x)) if measure else 0.0

    @workers.one_blas_thread()
    def _surely_outside(self, x: np.ndarray, limit: float) -> bool:
        """Whether a few blocks, the one of frequency zero among them, exceed the limit."""
        symbol, limit = self.support.symbol, limit * (1.0 + _CLEAR)
        # In double: the square of a tiny limit would underflow.
        coefficients = self.support.coefficients(np, _double(x))
        if seen_outside(np, host_blocks(coefficients, symbol, slice(1))[0, 0], limit):
            return True
        chosen = np.unique(np.linspace(0, len(symbol.frequencies) - 1, _SAMPLED).astype(int))
        blocks = host_blocks(coefficients, symbol, chosen)
        return bool(host.exceeds(host.gram(blocks), limit).any())

    def _solve(
        self,
        method: str,
        x0: np.ndarray,
        limit: float,
        axes: Axes,
        iterations: int | None,
        tolerance: Tolerance,
    ) -> Solution:
        support = self.support
        size = float(np.linalg.norm(x0)) / math.sqrt(min(support.symbol.block_shape))
        far = method == "auto" and size > _FAR * limit
        if method == "alternating" or far:
            return self._alternating(x0, limit, iterations)
        if method in ("auto", "cutting-planes"):
            found = nearest_by_cutting_planes(
                support,
                _double(x0),
                limit,
                axes,
                x0.dtype,
                tolerance=tolerance,
                max_rounds=iterations or _ROUNDS["cutting-planes"],
            )
            left = None if iterations is None else iterations - found.rounds
            if method == "cutting-planes" or not found.overflowed or left == 0:
                return found
            return found.better(self._by_dual("accelerated", x0, limit, left, tolerance))
        return self._by_dual(method, x0, limit, iterations, tolerance)

    def _by_dual(
        self,
        method: str,
        x0: np.ndarray,
        limit: float,
        iterations: int | None,
        tolerance: Tolerance,
    ) -> Solution:
        best: list[Solution] = []

        def done(now: Dual) -> bool:
            solution = self._certified(now, x0, limit)
            best[:] = [solution.better(best[0]) if best else solution]
            return best[0].suffices(_double(x0), tolerance)

        _, rounds = dual_gradient(
            np,
            self.support,
            x0,
            np.asarray(limit, x0.real.dtype),
            momentum=method == "accelerated",
            done=done,
            max_rounds=iterations or self._affordable(method),
        )
        best[0].rounds = rounds
        return best[0]

    def _affordable(self, method: str) -> int:
        """Rounds for a minute or so of work, and never fewer than the table says."""
        return max(_ROUNDS[method], min(200, int(_PATIENCE / self.support.work)))

    def _certified(self, now: Dual, x0: np.ndarray, limit: float) -> Solution:
        top = float(largest(np, self.support, now.x))
        nuclear = float(now.nuclear)
        return Solution.certified(_double(x0), _double(now.x), top, limit, nuclear)

    def _alternating(self, x: np.ndarray, limit: float, iterations: int | None) -> Solution:
        kernel, bound = _double(x), np.asarray(limit, x.real.dtype)
        suspects: np.ndarray | None = None
        top, rounds = np.inf, 0
        while rounds < (iterations or _ROUNDS["alternating"]):
            x = alternate(np, self.support, x, bound)
            rounds += 1
            if iterations is None:
                top, suspects = largest_and_near(self.support, x)
                if top <= limit * (1.0 + _CLOSE_ENOUGH):
                    break
        if iterations is not None:
            top, suspects = largest_and_near(self.support, x)
        found = Solution.certified(kernel, _double(x), top, limit, 0.0, rounds)
        # Without multipliers the distance is bounded from below by nothing but zero. A block
        # near the limit is near the largest, which is above it or has been brought down to it.
        return replace(found, dual=0.0, suspects=suspects)

    def _store(
        self, found: Solution, kernel: np.ndarray, x0: np.ndarray, limit: float
    ) -> tuple[Array, np.ndarray]:
        """(the weight in its own dtype, its coordinates), inside as stored."""
        like = self.given.w
        weight = arrays.like(self.geometry.weight(self.support.kernel(np, found.x)), like)
        unseen = None
        if self.support.symbol.folds:
            # What wraps to nothing is not seen by the operator, and stays.
            rest = self.geometry.weight(kernel - self.support.kernel(np, x0))
            unseen = arrays.like(rest, like) * self.given.scale
        stored = x0
        # Blocks far from the limit stay so, unless rounding is as coarse as half precision's.
        suspects = found.suspects if self.w.dtype == like.dtype else None

        def fits(array: Array) -> Array:
            nonlocal stored
            values = arrays.to_numpy(array / self.given.scale)
            kernel = self.geometry.kernel(values)
            stored = self.support.coordinates(np, kernel)
            return arrays.constant(
                np.asarray(self._fits(self._exact(kernel), limit, suspects)), like
            )

        scaled = weight * self.given.scale
        return store_within(self.given.xp, scaled, self.w.dtype, fits, offset=unseen), stored

    def _exact(self, kernel: np.ndarray) -> np.ndarray:
        """Its coordinates: where taps wrap onto each other their sums must not be rounded."""
        kernel = _double(kernel) if self.support.symbol.folds else kernel
        coordinates: np.ndarray = self.support.coordinates(np, kernel)
        return coordinates

    def _fits(self, x: np.ndarray, limit: float, suspects: np.ndarray | None = None) -> bool:
        if suspects is None:
            suspects = near(self.support, x, limit)
        return within(self.support, x, limit, suspects)

    def _info(
        self, before: float, after: float, gap: float, rounds: int, axes: Axes
    ) -> ProjectionInfo:
        unit = float(arrays.to_numpy(self.given.scale)) / self.certificate
        like = self.given.w
        norm_before, norm_after, relative = (
            arrays.constant(np.asarray(v), like) for v in (before * unit, after * unit, gap)
        )
        state = axes.state(self.support, like) if len(axes) else {}
        return ProjectionInfo(norm_before, norm_after, relative, rounds, state)

    def _traced(self, method: str, iterations: int | None) -> tuple[Array, ProjectionInfo]:
        """A fixed number of first-order rounds, then onto the ball."""
        xp, given, support = self.given.xp, self.given, self.support
        if method == "cutting-planes":
            method = "accelerated"
        kernel = self.geometry.kernel(given.w)
        x0 = support.coordinates(xp, kernel)
        limit = self.max_norm * self.certificate / given.scale
        target = limit * self.hair
        rounds = iterations or _ROUNDS_WHEN_TRACED[method]
        before = largest(xp, support, arrays.stop_gradient(x0))
        if arrays.truth(before <= limit):
            size = before * given.scale / self.certificate
            return self.w, ProjectionInfo(size, size, xp.zeros_like(size), 0)
        x, dual = x0, xp.zeros_like(limit)
        if method == "alternating":
            for _ in range(rounds):
                x = alternate(xp, support, x, target)
        else:
            now, rounds = dual_gradient(
                xp,
                support,
                x0,
                target,
                momentum=method == "accelerated",
                done=lambda _: None,
                max_rounds=rounds,
            )
            x, change = now.x, x0 - now.x
            products = xp.abs(change) ** 2 * 0.5 + xp.real(xp.conj(x) * change)
            dual = xp.sum(products) - target * now.nuclear
        top = largest(xp, support, x)
        one = xp.ones_like(top)
        x = x * xp.where(top > target, target / xp.where(top > 0, top, one), one)
        result = support.kernel(xp, x)
        if support.symbol.folds:
            result = result + kernel - support.kernel(xp, x0)
        inside = before <= limit
        untouched = inside | ~arrays.all_finite(xp, given.w)
        result = xp.where(untouched, kernel, result) * given.scale

        def norm(array: Array) -> Array:
            return largest(xp, support, self._coordinates(array))

        stored = store_within(
            xp,
            self.geometry.weight(result),
            self.w.dtype,
            lambda array: untouched | (norm(array) <= limit),
        )
        # An infinite scale would not leave the other entries what they were.
        stored = xp.where(arrays.all_finite(xp, self.w), stored, self.w)
        after = self._coordinates(arrays.to_compute(xp, stored))
        primal = 0.5 * xp.sum(xp.abs(x0 - after) ** 2)
        squared = xp.sum(xp.abs(x0) ** 2)
        gap = 2.0 * (primal - dual) / xp.where(squared > 0, squared, xp.ones_like(squared))
        gap = xp.where(inside | (gap < 0), xp.zeros_like(gap), gap)
        unit = given.scale / self.certificate
        return stored, ProjectionInfo(
            before * unit, largest(xp, support, after) * unit, gap, rounds
        )

    def _coordinates(self, weight: Array) -> Array:
        kernel = self.geometry.kernel(weight / self.given.scale)
        return self.support.coordinates(self.given.xp, kernel)


def _double(x: np.ndarray) -> np.ndarray:
    return x.astype(np.result_type(x, np.float64))
