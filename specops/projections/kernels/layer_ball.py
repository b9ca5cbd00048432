"""Kernels into the ball of their layer's own operator, where that is small enough to decompose."""

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
"""Those of `project_spectral_ball` that constrain the layer itself."""
_CLEARLY = 1.0 - 1e-9
"""Distance from the limit beyond which measured norms decide: far more than what eigenvalues in
double precision err by."""
_FARTHEST = 1e6
"""Largest entry, over c, up to which what is taken off in double precision leaves ten digits."""
_PATIENCE = 2e12
"""Multiplications, at 25 a decomposition for each entry of a cube, beyond which no more rounds are
begun unasked: 75 rounds of 1024². A bound by reasoning: a minute at 3e10 of them a second."""


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
        # Neither rounding nor what eigenvalues err by decides on which side the result lands.
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
                # NaN, too, is neither clearly inside nor clearly outside.
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
        # Neither the square of a tiny limit nor that of a huge one is a number.
        grams = host.gram(self.layer.matrices(kernel) / self.limit)
        return not bool(host.exceeds(grams, 1.0).any())

    def _info(
        self, before: float, after: float, gap: float, rounds: int, cuts: LayerCuts
    ) -> ProjectionInfo:
        unit = self.problem.unit
        state = cuts.state(self.problem.given.w) if len(cuts) else {}
        return self.problem.info(before * unit, after * unit, gap, rounds, state)


def layer_solver(
    problem: KernelProblem, method: str, state: State
) -> tuple[LayerSolver | None, State]:
    """(the solver, the state it starts from) where the layer itself is constrained.

    (None, the state for the torus) where a torus that contains it is.
    """
    layer = None
    if method in _OF_LAYERS:
        layer = small_explicit_map(problem.geometry.sizes(tuple(problem.w.shape)))
    if layer is None:
        return None, state
    solver = LayerSolver(problem, layer)
    # No norm is less than an entry.
    if np.abs(solver.kernel).max() <= _FARTHEST * solver.limit:
        return solver, state
    # What the layer's solver left when the weight was nearer is no state of another geometry.
    return None, {} if LayerCuts.made(state) else state
