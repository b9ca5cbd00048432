"""The direction of a kernel's largest singular value, in the space of kernels."""

from __future__ import annotations

import math

import numpy as np

from specops import arrays
from specops.arrays.solvers import svd
from specops.errors import StateError
from specops.geometry import ConvSizes
from specops.linalg.golub_kahan import OF_VECTORS, largest_singular_triplet
from specops.linalg.spectral_function import leading_pair
from specops.maps.convolution import ConvOperator
from specops.maps.symbol import Symbol, symbol_of
from specops.projections.feasible_rank import shape_of
from specops.spectra.norms import SMALL_OPERATOR, plane_wave
from specops.spectra.torus import leading_block, leading_matrix
from specops.typing import Array, Namespace

_NOISE = 0.05
"""Length of the random vector that is added to an old unit vector: without it a group that has
taken the lead is not found, as a test shows."""


def leading_direction(
    xp: Namespace, kernel: Array, sizes: ConvSizes, start: Array | None = None
) -> tuple[Array, Array | None]:
    """(E, v) with ⟨K, E⟩ = σ₁ and ⟨X, E⟩ ≤ ‖A(X)‖ for every kernel X.

    v is a start for the next call; None if the direction is not found by iteration.
    """
    assert sizes.fine is not None
    if sizes.circular and sizes.stride_divides:
        symbol = symbol_of(sizes, sizes.fine, not arrays.is_complex(kernel))
        _check_start(start, None)
        return _torus_direction(xp, kernel, symbol), None
    operator = ConvOperator(kernel, sizes)
    iterated = math.prod(operator.shape) > SMALL_OPERATOR
    _check_start(start, operator.shape[1] if iterated else None)
    if not iterated:
        v = _leading_vector(xp, operator.to_matrix())
    else:
        start = _start(xp, operator, start)
        tolerance = OF_VECTORS * arrays.epsilon(kernel.dtype)
        _, _, v = largest_singular_triplet(xp, operator, start, tolerance=tolerance)
        v = v / arrays.nonzero(xp, xp.linalg.vector_norm(v))
    # u from the image of v, so that it is a unit vector whether or not v has converged.
    u = operator.matvec(v)
    u = u / arrays.nonzero(xp, xp.linalg.vector_norm(u))
    return operator.gradient(u, v), v if iterated else None


def _leading_vector(xp: Namespace, matrix: Array) -> Array:
    """The leading right singular vector, with a derivative even if other values are repeated."""
    u, _, vh = svd(xp, arrays.stop_gradient(matrix))

    def turned(matrix: Array, u: Array, _: Array) -> Array:
        v = arrays.adjoint(xp, leading_pair(xp, matrix)) @ u
        return v / arrays.nonzero(xp, xp.linalg.vector_norm(v))

    v = arrays.conjugate(xp, vh[0, :])
    return arrays.with_derivative(lambda matrix, u, v: v, turned, matrix, u[:, 0], v)


def _check_start(start: Array | None, columns: int | None) -> None:
    if start is None or (columns and tuple(getattr(start, "shape", ())) == (columns,)):
        return
    expected = "no state" if columns is None else f"a state v of shape ({columns},)"
    raise StateError(f"this Conv takes {expected}, got {shape_of(start)}")


def _start(xp: Namespace, operator: ConvOperator, v: Array | None) -> Array:
    if v is None:
        return operator.rmatvec(plane_wave(xp, operator.data, operator.sizes))
    v = xp.astype(v, operator.data.dtype)
    v = xp.where(xp.isfinite(v), v, xp.zeros_like(v))
    # Another direction or group may lead by now.
    noise = arrays.constant(arrays.start_vector("stable rank", v.shape[0]), v)
    return v + xp.astype(_NOISE * noise, v.dtype)


def _torus_direction(xp: Namespace, kernel: Array, symbol: Symbol) -> Array:
    leading = leading_block(xp, kernel, symbol)
    block, cos, sin = leading_matrix(xp, kernel, symbol, leading)
    outer = leading_pair(xp, block)
    group = xp.take(arrays.constant(np.eye(symbol.sizes.groups), kernel), leading.group, axis=0)
    phases = arrays.complex_of(xp, cos, -sin)[:, None] * group
    e = phases[:, :, None, None] * outer
    e = e if arrays.is_complex(kernel) else xp.real(e)
    e = symbol.kernel(xp, xp.reshape(e, (e.shape[0], -1)))
    # `Symbol.kernel` divides a coefficient among the taps that land on it; here each gets all.
    for t, axis in enumerate(symbol.axes):
        sharing = axis.scatter @ axis.scatter.sum(axis=0)
        e = e * arrays.constant(sharing.reshape(-1, *[1] * (len(symbol.axes) - t - 1)), kernel)
    return e
