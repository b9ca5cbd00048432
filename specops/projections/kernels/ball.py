"""Kernels of fixed support whose convolution has operator norm at most c."""

from __future__ import annotations

from typing import Any

from specops import arrays
from specops.maps.prepare import Prepared
from specops.maps.unread import with_unread
from specops.projections.info import ProjectionInfo
from specops.projections.kernels.ball_on_host import HostSolver
from specops.projections.kernels.ball_traced import project_traced
from specops.projections.kernels.layer_ball import layer_solver
from specops.projections.kernels.problem import KernelProblem
from specops.projections.kernels.solution import Tolerance
from specops.typing import Array, State

METHODS = ("auto", "cutting-planes", "accelerated", "dykstra", "alternating")


def project_kernel(
    given: Prepared,
    w: Array,
    max_norm: Any,
    *,
    method: str,
    iterations: int | None,
    tolerance: Tolerance,
    state: State,
    measure: bool,
) -> tuple[Array, ProjectionInfo]:
    """(the weight inside the ball, what happened)."""
    problem = KernelProblem.of(given, w, max_norm)
    known = isinstance(max_norm, float) or arrays.is_concrete(max_norm)
    own = None
    if known and arrays.is_concrete(given.w):
        # On the host, also for kernels on devices: their blocks are many small matrices.
        own, for_torus = layer_solver(problem, method, iterations, tolerance, state)

        def torus(measure: bool) -> tuple[Array, ProjectionInfo]:
            return HostSolver(problem).project(method, iterations, tolerance, for_torus, measure)

        if own is None:
            result, info = torus(measure)
        else:
            result, info = own.project(method, iterations, tolerance, state, measure, torus)
    else:
        result, info = project_traced(problem, method, iterations, tolerance)
    exact = problem.geometry.has_exact_spectrum(tuple(w.shape))
    info.constrained = "layer" if exact or own is not None else "torus"
    return with_unread(result, w, problem.geometry), info
