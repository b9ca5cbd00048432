"""Clipping singular values: what must be taken off a matrix to bring them below a limit."""

from __future__ import annotations

from typing import Any

from specops import backend
from specops.linalg.decompositions import svd

Array = Any
_GRAM_RANGE = 4.0
"""σ₁/limit up to which a Gram matrix in working precision still resolves the limit."""


def excess(xp: Any, a: Array, limit: Array, norms: Array | None = None) -> Array:
    r"""``A − U min(Σ, limit) Vᴴ`` for stacked matrices: zero where nothing exceeds `limit`.

    From the eigenvectors of the Gram matrix of the smaller side, which costs a fraction of an
    SVD and never needs the small singular values: ``A V diag((1 − limit/σ)₊) Vᴴ``. The Gram
    matrix squares the condition number, so beyond σ₁ = 4·limit (told by `norms`, the largest
    singular values, if they are known), and under tracing, it is an SVD instead.

    Parameters
    ----------
    xp : namespace
        Of the arrays.
    a : array, shape (..., m, n)
        Scaled so that squares neither overflow nor underflow.
    limit : array, shape (...)
        Positive.
    norms : array, shape (...), optional
        Largest singular values.

    References
    ----------
    Sanyal, Torr & Dokania 2020, Algorithm 3; Sedghi, Gupta & Long 2019, Proposition 9.
    """
    small = None if norms is None else backend.truth(xp.all(norms <= _GRAM_RANGE * limit))
    if not small:
        u, s, vh = svd(xp, a)
        over = s - limit[..., None]
        over = xp.where(over > 0, over, xp.zeros_like(over))
        return (u * xp.astype(over, u.dtype)[..., None, :]) @ vh
    wide = a.shape[-2] < a.shape[-1]
    ah = backend.adjoint(xp, a)
    eigenvalues, v = xp.linalg.eigh(a @ ah if wide else ah @ a)
    positive = xp.where(eigenvalues > 0, eigenvalues, xp.ones_like(eigenvalues))
    share = 1.0 - limit[..., None] / xp.sqrt(positive)
    share = xp.where((eigenvalues > 0) & (share > 0), share, xp.zeros_like(share))
    filtered = (v * xp.astype(share, v.dtype)[..., None, :]) @ backend.adjoint(xp, v)
    return filtered @ a if wide else a @ filtered
