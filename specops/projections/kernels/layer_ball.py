"""Kernels into the ball of their layer's own operator, if it is small enough to decompose."""

from __future__ import annotations

import math

import numpy as np

from specops import arrays
from specops.arrays import host
from specops.linalg.inside import seen_outside
from specops.maps.explicit import ExplicitMap, norm_of, small_explicit_map
from specops.projections.feasible import store_within
from specops.projections.info import ProjectionInfo
from specops.projections.kernels.layer_cuts import LayerCuts
from specops.projections.kernels.layer_nearest import nearest_to_layer_ball
from specops.projections.kernels.problem import KernelProblem
from specops.projections.kernels.solution import Tolerance
from specops.typing import Array, State

_OF_LAYERS = ("auto", "cutting-planes")
"""The methods of `project_spectral_ball` that constrain the layer itself, not a torus."""
_UNHURRIED = 8.0
"""Work of a layer, in that of small ones, up to which it is constrained itself if no distance is
tolerated: up to 1024 inputs and outputs. Kernels of 64 channels on 3² and 4² points then moved a
third to a sixth as far at c = 0.95·σ₁ as into the torus's ball, in 0.2 to 0.6 s, and up to 8 % less
far at 0.5·σ₁."""
_CLEARLY = 1.0 - 1e-9
"""Measured norms decide if they are at least so far from the limit: the distance is far larger than
the error of eigenvalues in double precision."""
_FARTHEST = 1e6
"""Up to this largest entry, over c, a subtraction in double precision leaves ten digits."""
_PATIENCE = 1e12
"""Unless the caller asks for a number of rounds, no more begin after so many multiplications, 25·n³
per decomposition: 37 rounds of 1024². A bound by reasoning: half a minute at 3e10 a second."""


class LayerSolver:
    """Project a kernel whose values are known onto the ball of its layer's own norm.

    Parameters
    ----------
    problem : KernelProblem
        The kernel and its bound.
    layer : ExplicitMap
        Its operator.
    """

    def __init__(self, problem: KernelProblem, layer: ExplicitMap) -> None:
        self.problem, self.layer, self.geometry = problem, layer, problem.geometry
        self.kernel = self._kernel(problem.given.w)
        self.limit = problem.bound / problem.unit
        # A margin, so that neither rounding nor errors of eigenvalues lead outside the ball.
        self.target = self.limit * (problem.margin - min(layer.shape) * np.finfo(float).eps)

    def project(
        self,
        method: str,
        iterations: int | None,
        tolerance: Tolerance,
        state: State,
        measure: bool,
    ) -> tuple[Array, ProjectionInfo]:
        """(the weight inside the ball, what happened)."""
        kernel, layer = self.kernel, self.layer
        none = LayerCuts.none(layer, kernel.dtype)
        cuts = LayerCuts.from_state(state, layer, kernel.dtype) if state else none
        before = float(cuts.inner(kernel).max(initial=0.0))
        if before <= self.limit:
            before = norm_of(layer.matrices(kernel)) if measure else math.nan
            if before <= self.limit * _CLEARLY or (
                # Written so that NaN is neither clearly inside nor clearly outside.
                not before * _CLEARLY > self.limit
                and not self._surely_outside()
                and self._fits(kernel)
            ):
                return self.problem.w, self._info(before, before, 0.0, 0, cuts)
        found, cuts = nearest_to_layer_ball(
            layer,
            kernel,
            self.target,
            cuts,
            tolerance=tolerance,
            max_rounds=iterations or self._affordable(),
            planes_only=method == "cutting-planes",
        )
        result, stored = self._store(found.x)
        after = min(self.limit, norm_of(layer.matrices(stored))) if measure else math.nan
        found.primal = 0.5 * float(np.sum(np.abs(kernel - stored) ** 2))
        return result, self._info(before, after, found.gap(kernel), found.rounds, cuts)

    def _surely_outside(self) -> bool:
        """Whether a few power steps exceed the limit, beyond their rounding."""
        matrices = self.layer.matrices(self.kernel) / self.limit
        return any(seen_outside(np, matrix, 1.0) for matrix in matrices)

    def _affordable(self) -> int:
        """Rounds within `_PATIENCE`, from 20 to 400."""
        work = 25.0 * self.layer.sizes.groups * float(min(self.layer.shape)) ** 3
        return max(20, min(400, int(_PATIENCE / work)))

    def _store(self, x: np.ndarray) -> tuple[Array, np.ndarray]:
        """(the weight in its own dtype, its kernel), inside as stored."""
        given, w = self.problem.given, self.problem.w
        stored = x

        def fits(array: Array) -> Array:
            nonlocal stored
            stored = self._kernel(array / given.scale)
            return arrays.constant(np.asarray(self._fits(stored)), given.w)

        weight = np.ascontiguousarray(self.geometry.weight(x))
        weight = arrays.like(weight, given.w) * given.scale
        return store_within(given.xp, weight, w.dtype, fits), stored

    def _kernel(self, w: Array) -> np.ndarray:
        kernel = self.geometry.kernel(arrays.to_numpy(w))
        return np.asarray(kernel, np.result_type(kernel, np.float64))

    def _fits(self, kernel: np.ndarray) -> bool:
        # Divided by the limit, because the square of a tiny or huge limit would under- or overflow.
        grams = host.gram(self.layer.matrices(kernel) / self.limit)
        return not bool(host.exceeds(grams, 1.0).any())

    def _info(
        self, before: float, after: float, gap: float, rounds: int, cuts: LayerCuts
    ) -> ProjectionInfo:
        unit = self.problem.unit
        state = cuts.state(self.problem.given.w) if len(cuts) else {}
        return self.problem.info(before * unit, after * unit, gap, rounds, state)


def layer_solver(
    problem: KernelProblem, method: str, tolerance: Tolerance, state: State
) -> tuple[LayerSolver | None, State]:
    """(the solver, the state it starts from), if the layer itself is to be constrained.

    (None, the state for the torus) if a torus that contains it is to be constrained.
    """
    layer = None
    if method in _OF_LAYERS:
        sizes = problem.geometry.sizes(tuple(problem.w.shape))
        layer = small_explicit_map(sizes, times=1.0 if tolerance.loose else _UNHURRIED)
    if layer is None:
        return None, state
    solver = LayerSolver(problem, layer)
    # The norm is at least the largest entry.
    if np.abs(solver.kernel).max() <= _FARTHEST * solver.limit:
        return solver, state
    # The layer's solver may have made the state when the weight was closer to the ball: drop it.
    return None, {} if LayerCuts.made(state) else state
