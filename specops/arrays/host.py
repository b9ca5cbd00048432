"""Solvers for stacks of NumPy matrices.

They keep single precision, which NumPy's public functions compute in double, in twice the time.
"""

from __future__ import annotations

import numpy as np

try:
    from numpy.linalg import _umath_linalg as _lapack

    _SINGLE = "F->f" in _lapack.svd.types
except (ImportError, AttributeError):
    _SINGLE = False

_GRAM_FROM = 96
"""Smaller side from which values in single precision come from the Gram matrix in double."""
_GRAM_ASPECT = 1.5
"""Ratio of the larger to the smaller side from which the Gram matrix pays at any size, as measured
on the blocks of convolutions."""
_BEYOND = 1e18
"""A bound of norms whose square does not overflow in single precision, and which no scaled matrix
reaches."""
_HALVE_FROM = 192
"""Side from which a complex Gram matrix is formed by halves, which saves a quarter of the
multiplications and more. A choice that avoids small products: halves are then 96 and more."""


def stack_svdvals(a: np.ndarray) -> np.ndarray:
    """Singular values of a complex stack, to 1e-6 of the largest or to double precision.

    Single precision stays in single precision while that is accurate enough. Larger or
    elongated matrices go through the Gram matrix of their smaller side, formed and solved in
    double: an error of √eps of double, 1.5e-8 of the largest value, at worst.
    """
    m, n = a.shape[-2:]
    small, large = min(m, n), max(m, n)
    if a.dtype != np.complex64:
        return np.asarray(np.linalg.svd(a, compute_uv=False))
    if small >= _GRAM_FROM or large >= _GRAM_ASPECT * small:
        return np.asarray(_by_gram(a), np.float32)
    if _SINGLE:
        with np.errstate(invalid="ignore"):
            values = _lapack.svd(a, signature="F->f")
        if not np.isnan(values).any():
            return np.asarray(values)
    return np.asarray(np.linalg.svd(a, compute_uv=False))


def eigh(a: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """`numpy.linalg.eigh` that stays in single precision, in double where that fails."""
    if _SINGLE and a.dtype in (np.float32, np.complex64):
        with np.errstate(invalid="ignore"):
            values, vectors = _lapack.eigh_lo(a, signature=f"{a.dtype.char}->f{a.dtype.char}")
        if not np.isnan(values).any():
            return values, vectors
    values, vectors = np.linalg.eigh(a)
    return values, vectors


def gram(a: np.ndarray) -> np.ndarray:
    """AAᴴ or AᴴA, whichever is smaller; if large, by halves, with the upper part by symmetry."""
    if a.dtype.kind == "f":
        # For a product of a matrix with its own transpose NumPy computes only half.
        turned = a.swapaxes(-1, -2)
        return np.asarray(a @ turned if a.shape[-2] <= a.shape[-1] else turned @ a)
    rows = a if a.shape[-2] <= a.shape[-1] else a.conj().swapaxes(-1, -2)
    columns = rows.conj().swapaxes(-1, -2)
    if rows.shape[-2] < _HALVE_FROM:
        return np.asarray(rows @ columns)
    out = np.empty((*rows.shape[:-1], rows.shape[-2]), a.dtype)
    _fill_gram(rows, columns, out)
    return out


def _fill_gram(rows: np.ndarray, columns: np.ndarray, out: np.ndarray) -> None:
    n = rows.shape[-2]
    if n < _HALVE_FROM:
        np.matmul(rows, columns, out=out)
        return
    h = n // 2
    _fill_gram(rows[..., :h, :], columns[..., :h], out[..., :h, :h])
    _fill_gram(rows[..., h:, :], columns[..., h:], out[..., h:, h:])
    np.matmul(rows[..., h:, :], columns[..., :h], out=out[..., h:, :h])
    np.conjugate(out[..., h:, :h].swapaxes(-1, -2), out=out[..., :h, h:])


def _by_gram(a: np.ndarray) -> np.ndarray:
    eigenvalues = np.linalg.eigvalsh(gram(a.astype(np.complex128)))
    return np.sqrt(np.maximum(eigenvalues, 0.0))[..., ::-1]


def exceeds(grams: np.ndarray, bound: float) -> np.ndarray:
    """Which Gram matrices have an eigenvalue above bound², up to rounding.

    For the others ``bound²·I − G`` has a Cholesky factor, which is the certificate.
    """
    n = grams.shape[-1]
    shifted = -grams
    index = np.arange(n)
    shifted[..., index, index] += np.asarray(min(bound, _BEYOND), grams.dtype) ** 2
    return ~have_factors(shifted)


def have_factors(matrices: np.ndarray) -> np.ndarray:
    """Which of stacked Hermitian matrices, which are overwritten, have a Cholesky factor."""
    if _SINGLE:
        # In place, because memory for a new result costs more than the factor of a small matrix.
        with np.errstate(invalid="ignore"):
            factors = _lapack.cholesky_lo(matrices, out=matrices)
        return np.asarray(~np.isnan(factors[..., -1, -1]))
    stack = matrices.reshape(-1, *matrices.shape[-2:])
    return np.array([_has_factor(a) for a in stack], bool).reshape(matrices.shape[:-2])


def _has_factor(matrix: np.ndarray) -> bool:
    try:
        np.linalg.cholesky(matrix)
    except np.linalg.LinAlgError:
        return False
    return True
