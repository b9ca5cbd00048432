"""Decompositions of stacked matrices, with fallbacks for solvers that do not converge."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from specops.arrays.dtypes import double_dtype, is_complex, real_dtype
from specops.arrays.entries import adjoint, check_finite, magnitude
from specops.arrays.libraries import library
from specops.arrays.placement import constant
from specops.arrays.standard import did_not_converge
from specops.arrays.tracing import is_staged, is_traced, stop_gradient, truth
from specops.typing import Array, Namespace


def svdvals(xp: Namespace, a: Array) -> Array:
    """Singular values of stacked matrices, descending, with fallbacks.

    Weights that were just clipped have many equal singular values, on which some LAPACK builds
    fail in single precision. The second attempt is in double precision, the third by the
    eigenvalues of the Gram matrix. Values that cannot be those of the matrices, which solvers of
    accelerators have returned without a word, count as a failure.
    """
    try:
        with library(a).solving():
            s = xp.linalg.svdvals(a)
        _check_values(xp, a, s)
        return s
    except Exception as error:
        if not did_not_converge(error):
            raise
        return _svd_fallback(xp, a, vectors=False)


def svd(xp: Namespace, a: Array) -> tuple[Array, Array, Array]:
    """Thin SVD ``(u, s, vh)`` of stacked matrices, with the fallbacks of `svdvals`."""
    if is_staged(a):
        fine, a = _without_infinity(xp, a)
        u, s, vh = xp.linalg.svd(a, full_matrices=False)
        return u, xp.where(fine[..., 0], s, xp.full_like(s, xp.nan)), vh
    try:
        with library(a).solving():
            u, s, vh = xp.linalg.svd(a, full_matrices=False)
        _check_values(xp, a, s)
        return u, s, vh
    except Exception as error:
        if not did_not_converge(error):
            raise
        result: tuple[Array, Array, Array] = _svd_fallback(xp, a, vectors=True)
        return result


def eigh(xp: Namespace, a: Array) -> tuple[Array, Array]:
    """Eigenvalues, ascending, and eigenvectors of stacked Hermitian matrices.

    In double precision if single precision fails.
    """
    if is_staged(a):
        fine, a = _without_infinity(xp, a)
        values, vectors = xp.linalg.eigh(a)
        return xp.where(fine[..., 0], values, xp.full_like(values, xp.nan)), vectors
    try:
        with library(a).solving():
            values, vectors = library(a).eigh(xp, a)
    except Exception as error:
        double = None if not did_not_converge(error) else double_dtype(xp, a)
        if double is None or double == a.dtype:
            raise
        with library(a).solving():
            values, vectors = xp.linalg.eigh(xp.astype(a, double))
        real = real_dtype(xp, a.dtype)
        return xp.astype(values, real), xp.astype(vectors, a.dtype)
    return values, vectors


def eigh_of_finite(xp: Namespace, a: Array) -> tuple[Array, Array]:
    """`eigh` of matrices that are known to be finite; compiled code leaves out the test."""
    return library(a).eigh(xp, a) if is_staged(a) else eigh(xp, a)


def _without_infinity(xp: Namespace, a: Array) -> tuple[Array, Array]:
    """(which matrices are finite, the matrices with zeros in place of others).

    LAPACK may never end on infinity. Of concrete matrices callers have refused such ones before.
    """
    fine = xp.all(xp.isfinite(a), axis=(-2, -1), keepdims=True)
    return fine, xp.where(fine, a, xp.zeros_like(a))


def _svd_fallback(xp: Namespace, a: Array, *, vectors: bool) -> Any:
    check_finite(xp, a, "the matrix")
    double = xp.astype(a, xp.complex128 if is_complex(a) else xp.float64)
    real = real_dtype(xp, a.dtype)
    try:
        with library(a).solving():
            if vectors:
                u, s, vh = xp.linalg.svd(double, full_matrices=False)
            else:
                s = xp.linalg.svdvals(double)
        _check_values(xp, double, s)
    except Exception as error:
        if not did_not_converge(error):
            raise
        u, s, vh = _svd_by_gram(xp, double)
        _check_values(xp, double, s)
    if not vectors:
        return xp.astype(s, real)
    return xp.astype(u, a.dtype), xp.astype(s, real), xp.astype(vh, a.dtype)


def _check_values(xp: Namespace, a: Array, s: Array) -> None:
    """Raise unless `s` are finite, descending, not negative, and of the squares of ``‖a‖_F``."""
    if library(a).solvers_raise(a) or is_traced(a):
        return
    a, s = stop_gradient(a), stop_gradient(s)
    scale = magnitude(xp, a, (-2, -1))
    squares = xp.sum(xp.abs(a / scale) ** 2, axis=(-2, -1))
    found = xp.sum((s / scale[..., 0]) ** 2, axis=-1)
    error = math.sqrt(float(xp.finfo(s.dtype).eps))
    fine = (xp.abs(found - squares) <= error * squares) & (s[..., -1] >= 0)
    fine = xp.all(fine) & xp.all(s[..., 1:] <= s[..., :-1])
    if truth(fine) is False:
        raise np.linalg.LinAlgError("the solver's singular values are not those of the matrix")


def _svd_by_gram(xp: Namespace, a: Array) -> tuple[Array, Array, Array]:
    wide = a.shape[-2] < a.shape[-1]
    tall = adjoint(xp, a) if wide else a
    with library(a).solving():
        _, v = xp.linalg.eigh(adjoint(xp, tall) @ tall)
    v = xp.flip(v, axis=-1)
    # The R of A·V = QR is diagonal up to rounding, and gives more precise values than sqrt(λ).
    q, r = xp.linalg.qr(tall @ v)
    diagonal = xp.linalg.diagonal(r)
    s = xp.abs(diagonal)
    order = xp.argsort(-s, axis=-1)
    safe = xp.where(s > 0, diagonal / xp.where(s > 0, s, xp.ones_like(s)), xp.ones_like(diagonal))
    u = q * safe[..., None, :]
    s = _reordered(xp, s[..., None, :], order)[..., 0, :]
    u, v = _reordered(xp, u, order), _reordered(xp, v, order)
    return (v, s, adjoint(xp, u)) if wide else (u, s, adjoint(xp, v))


def _reordered(xp: Namespace, a: Array, order: Array) -> Array:
    """Columns of stacked matrices, reordered: ``take_along_axis``, which came with 2024.12."""
    n = a.shape[-1]
    starts = np.arange(math.prod(a.shape[:-1])).reshape((*a.shape[:-1], 1)) * n
    index = constant(starts, a) + xp.astype(order, xp.int32)[..., None, :]
    found = xp.take(xp.reshape(a, (-1,)), xp.reshape(index, (-1,)), axis=0)
    return xp.reshape(found, a.shape)


def try_cholesky(xp: Namespace, a: Array) -> tuple[Array, Array]:
    """(Cholesky factors of stacked matrices, which of them exist); never an exception.

    Where a matrix has no factor, the result may hold anything.
    """
    return library(a).try_cholesky(xp, a)


def has_cholesky(xp: Namespace, a: Array) -> Array:
    """Which of stacked Hermitian matrices have a factor; `a` must not be used again.

    Only the lower triangles are read.
    """
    return library(a).has_cholesky(xp, a)
