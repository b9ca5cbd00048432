"""Kernels into the ball of their layer's own operator, if it is small enough to decompose."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cached_property

import numpy as np

from specops import arrays
from specops.arrays import host
from specops.geometry import ConvSizes
from specops.linalg.inside import seen_outside
from specops.maps.explicit import MIDDLE, ExplicitMap, norm_of, small_explicit_map
from specops.projections.feasible import store_within
from specops.projections.info import ProjectionInfo
from specops.projections.kernels.ball_on_host import HostSolver
from specops.projections.kernels.cuts import Cuts
from specops.projections.kernels.half_spaces import HalfSpaces
from specops.projections.kernels.layer_cuts import LayerCuts
from specops.projections.kernels.layer_nearest import Far, nearest_to_layer_ball
from specops.projections.kernels.problem import KernelProblem
from specops.projections.kernels.solution import Tolerance
from specops.spectra.norms import lanczos_norm, torus_norm
from specops.typing import Array, State

_OF_LAYERS = ("auto", "cutting-planes")
"""The methods of `project_spectral_ball` that constrain the layer itself, not a torus."""
_PATIENTLY = 64.0
"""Work of a layer, in that of small ones, up to which it is constrained itself if no distance is
tolerated and if its torus is no near substitute: up to 2048 inputs and outputs. All eigenvectors of
such a matrix take 2 s, so that ADMM would take minutes: if many singular values exceed the bound,
the result lies on the way from the torus's ball to the kernel. Up to `MIDDLE` it is constrained
itself in any case."""
_SUBSTITUTE = 0.97
"""From this share of the norm on the torus on, the torus of such a layer is a near substitute: a
choice. 32 channels on 8² points have 0.98 of it, 128 on 3² points 0.91."""
_CHORDS = 4
"""Norms that are taken on the way from the torus's ball to the sphere of the layer's: a choice."""
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
    patiently : bool
        Whether to take another point than the nearest, by a torus, for a kernel with many
        singular values above the bound.
    """

    def __init__(self, problem: KernelProblem, layer: ExplicitMap, *, patiently: bool) -> None:
        self.problem, self.layer, self.geometry = problem, layer, problem.geometry
        self.patiently = patiently
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
        torus: Callable[[bool], tuple[Array, ProjectionInfo]],
    ) -> tuple[Array, ProjectionInfo]:
        """(the weight inside the ball, what happened).

        `torus` gives the same for the ball of a torus that contains the layer, with its norms
        measured or not.
        """
        kernel, layer = self.kernel, self.layer
        cuts = self.start(state)
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
        far: Far = "planes" if method == "cutting-planes" else "admm"
        found, cuts = nearest_to_layer_ball(
            layer,
            kernel,
            self.target,
            cuts,
            tolerance=tolerance,
            max_rounds=iterations or self._affordable(),
            far="nothing" if self.patiently else far,
        )
        around = None
        if math.isinf(found.primal):
            weight, around = torus(False)
            given = self.problem.given
            found.x = self._farthest(
                self._kernel(arrays.to_compute(given.xp, weight) / given.scale)
            )
        result, stored = self._store(found.x)
        after = min(self.limit, norm_of(layer.matrices(stored))) if measure else math.nan
        found.primal = 0.5 * float(np.sum(np.abs(kernel - stored) ** 2))
        info = self._info(before, after, found.gap(kernel), found.rounds, cuts)
        if around is not None:
            info.iterations, info.state = info.iterations + around.iterations, around.state
        return result, info

    def start(self, state: State) -> LayerCuts:
        """The cuts that a state holds, none if it is the torus's: of farther weights, say.

        Raises StateError if it is of another geometry.
        """
        if Cuts.made(state) or HalfSpaces.made(state):
            HostSolver(self.problem).start(state)
            state = {}
        if not state:
            return LayerCuts.none(self.layer, self.kernel.dtype)
        return LayerCuts.from_state(state, self.layer, self.kernel.dtype)

    def _farthest(self, inside: np.ndarray) -> np.ndarray:
        """About the last point inside the ball, from one of the torus's on the way to the kernel.

        The norm is convex, so that a chord of it leads to points inside.
        """
        sizes, share = self.layer.sizes, 0.0
        for _ in range(_CHORDS):
            x = inside + share * (self.kernel - inside)
            low = float(lanczos_norm(np, x, sizes))
            if low < self.target < self._norm:
                share += (1.0 - share) * (self.target - low) / (self._norm - low)
        return np.asarray(inside + share * (self.kernel - inside))

    def has_substitute(self) -> bool:
        """Whether the kernel's norm on the torus that contains the layer is hardly larger."""
        around = torus_norm(np, self.kernel, self.problem.support.symbol)
        # Written so that zero has one.
        return not bool(self._norm < _SUBSTITUTE * around)

    @cached_property
    def _norm(self) -> float:
        """The kernel's own norm, from below."""
        return float(lanczos_norm(np, self.kernel, self.layer.sizes))

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


def own_map(sizes: ConvSizes, tolerance: Tolerance) -> ExplicitMap | None:
    """The map of a layer that is constrained itself, or else a torus of nearly the same norm.

    None for layers around which a torus is constrained whatever its norm is.
    """
    return small_explicit_map(sizes, times=1.0 if tolerance.loose else _PATIENTLY)


def layer_solver(
    problem: KernelProblem,
    method: str,
    iterations: int | None,
    tolerance: Tolerance,
    state: State,
) -> tuple[LayerSolver | None, State]:
    """(the solver if the layer itself is to be constrained, the state that a torus starts from)."""
    sizes = problem.geometry.sizes(tuple(problem.w.shape))
    layer, patiently = None, False
    if method in _OF_LAYERS:
        layer = small_explicit_map(sizes, times=1.0 if tolerance.loose else MIDDLE)
        if layer is None and not tolerance.loose and iterations is None:
            layer, patiently = small_explicit_map(sizes, times=_PATIENTLY), True
    if layer is None:
        if method not in _OF_LAYERS or not LayerCuts.made(state):
            return None, state
        # Another tolerance may have made the state: then it is dropped.
        layer = small_explicit_map(sizes, times=_PATIENTLY)
        if layer is None:
            return None, state
        LayerSolver(problem, layer, patiently=False).start(state)
        return None, {}
    # The layer's solver may have made the state when the weight was closer to the ball: drop it.
    for_torus = {} if LayerCuts.made(state) else state
    solver = LayerSolver(problem, layer, patiently=patiently)
    # The norm is at least the largest entry.
    far = np.abs(solver.kernel).max() > _FARTHEST * solver.limit
    if far or (patiently and solver.has_substitute()):
        return None, for_torus
    return solver, for_torus
