"""Soft thresholding of the singular values of stacked matrices."""

from __future__ import annotations

import numpy as np

from specops import arrays
from specops.arrays.gram import gram
from specops.arrays.solvers import eigh
from specops.linalg.spectral_function import spectral_function
from specops.linalg.value_functions import above
from specops.typing import Array, Namespace

GRAM_RANGE = 4.0
"""Largest σ₁/limit for which Gram matrices resolve the limit and differences do not cancel. In
single precision they were more accurate there than the SVD (5e-7 against 1.7e-6 of σ₁)."""
_DOUBLE_GRAM_RANGE = 1e3
"""The same for matrices in single precision with Gram matrices in double: squares lose six of their
sixteen digits, so that the seven of single precision remain."""
_ONE_BY_ONE_FROM = 128
"""Side from which each matrix of a stack gets its own number of vectors. This took 2.5 times as
long as all together at 64², but from 128² on as long, with less memory."""
_TINY = 1e-9
"""Below such limits quotients of squares are not safe in single precision. At this limit its
square, 1e-18, and ε times that, are still far above 1e-38."""


def soft_threshold(
    xp: Namespace, a: Array, limit: Array, grams: Array | None = None
) -> tuple[Array, Array, Array]:
    r"""(``U max(Σ − limit, 0) Vᴴ``, its nuclear norm Σ max(σ − limit, 0), σ₁) of stacked matrices.

    Parameters
    ----------
    xp : namespace
        The arrays' namespace.
    a : array, shape (..., m, n)
        Scaled so that squares neither overflow nor underflow.
    limit : array, shape (...)
        Positive.
    grams : array, optional
        The result of `gram` for `a`, if the caller has it.
    """
    found = by_gram(xp, a, limit, GRAM_RANGE, grams)
    if found is None and arrays.by_workers(a):
        double = a.astype(np.result_type(a, np.float64))
        found = by_gram(xp, double, limit.astype(float), _DOUBLE_GRAM_RANGE)
    if found is not None:
        result, total, squares, _ = found
        largest = xp.sqrt(xp.where(squares > 0, squares, xp.zeros_like(squares))[..., -1])
        largest = xp.astype(largest, limit.dtype) * limit
        return xp.astype(result, a.dtype), xp.astype(total, limit.dtype), largest

    def function(s: Array, limit: Array) -> tuple[Array, Array]:
        return above(xp, s, limit[..., None])

    result, s = spectral_function(xp, a, function, limit)
    return result, xp.sum(function(s, limit)[0], axis=-1), s[..., 0]


def by_gram(
    xp: Namespace, a: Array, limit: Array, reach: float, grams: Array | None = None
) -> tuple[Array, Array, Array, Array] | None:
    """(`soft_threshold`, its nuclear norm, squares, vectors) by the smaller Gram matrix.

    The excess is A V diag((1 − limit/σ)₊) Vᴴ. That squares the condition number: None if
    σ₁ > reach·limit, or a value is unknown or to be differentiated. The squares are its ascending
    eigenvalues, in units of limit², the vectors its eigenvectors.
    """
    # Eigenvectors have no derivative where values are repeated.
    if not (arrays.is_concrete(a) and arrays.is_concrete(limit)):
        return None
    # σ₁ is at least the largest entry, which is checked before anything is squared.
    if not arrays.truth(xp.all(arrays.largest_entry(xp, a, (-2, -1)) <= reach * limit)):
        return None
    tiny = not arrays.truth(xp.all(limit >= _TINY))
    if tiny:
        a, grams = a / xp.astype(limit, a.dtype)[..., None, None], None
    if grams is not None:
        # σ₁² is at least the largest diagonal entry of the Gram matrix.
        diagonal = xp.real(xp.linalg.diagonal(grams))
        if not arrays.truth(xp.all(diagonal <= (reach * limit[..., None]) ** 2)):
            return None
    eigenvalues, v = eigh(xp, gram(xp, a) if grams is None else grams)
    eigenvalues = eigenvalues if tiny else eigenvalues / limit[..., None] ** 2
    if not arrays.truth(xp.all(eigenvalues <= reach**2)):
        return None
    above = eigenvalues > 1.0
    sigma = xp.sqrt(xp.where(above, eigenvalues, xp.ones_like(eigenvalues)))
    total = xp.sum(sigma - 1.0, axis=-1) * limit
    if a.ndim == 2:
        # One Newton step towards orthonormal columns removes most of the solver's rounding.
        kept = v[:, _first(xp, above) :]
        kept = kept * 1.5 - kept @ (0.5 * (arrays.adjoint(xp, kept) @ kept))
        result = _excess(xp, a, kept, sigma)
    elif arrays.by_workers(a) and v.shape[-1] >= _ONE_BY_ONE_FROM:
        result = np.empty_like(a)
        for at in np.ndindex(a.shape[:-2]):
            result[at] = _excess(np, a[at], v[at][:, _first(np, above[at]) :], sigma[at])
    else:
        result = _excess(xp, a, v[..., _first(xp, above) :], sigma)
    if tiny:
        result = result * xp.astype(limit, a.dtype)[..., None, None]
    return result, total, eigenvalues, v


def _first(xp: Namespace, above: Array) -> int:
    """The first column, over all ascending rows, at which a row is `above`."""
    return int(xp.min(xp.sum(xp.astype(~above, xp.int32), axis=-1, dtype=xp.int32)))


def _excess(xp: Namespace, a: Array, v: Array, sigma: Array) -> Array:
    """A V diag(1 − 1/σ) Vᴴ, or with V on the left; V belongs to the last values of `sigma`."""
    count = v.shape[-1]
    sigma = sigma[..., sigma.shape[-1] - count :]
    vh, wide = arrays.adjoint(xp, v), a.shape[-2] <= a.shape[-1]
    v = v * xp.astype(1.0 - 1.0 / sigma, v.dtype)[..., None, :]
    if 2 * count < v.shape[-2]:
        if wide:
            return arrays.matmul(v, arrays.matmul(vh, a))
        return arrays.matmul(arrays.matmul(a, v), vh)
    return (v @ vh) @ a if wide else a @ (v @ vh)
