"""Clipping the singular values of stacked matrices."""

from __future__ import annotations

from typing import Any

from specops import backend
from specops.linalg.decompositions import svd

Array = Any
GRAM_RANGE = 4.0
"""σ₁/limit up to which Gram matrices resolve the limit and differences do not cancel."""


def clip(
    xp: Any, a: Array, limit: Array, norms: Array | None = None, *, force_svd: bool = False
) -> Array:
    r"""``U min(Σ, limit) Vᴴ`` for stacked matrices.

    By what must be taken off, ``A V diag((1 − limit/σ)₊) Vᴴ``, with the eigenvectors of the
    Gram matrix of the smaller side: a fraction of the cost of an SVD, and the small singular
    values never matter. The Gram matrix squares the condition number and the difference
    cancels, so beyond σ₁ = 4·limit (told by `norms`, the largest singular values, if they are
    known), and under tracing, it is an SVD instead.

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
    force_svd : bool
        Never use the Gram matrix.

    References
    ----------
    Sanyal, Torr & Dokania 2020, Algorithm 3; Sedghi, Gupta & Long 2019, Proposition 9.
    """
    small = None if norms is None else backend.truth(xp.all(norms <= GRAM_RANGE * limit))
    if not small or force_svd:
        u, s, vh = svd(xp, a)
        s = xp.where(s > limit[..., None], limit[..., None], s)
        return (u * xp.astype(s, u.dtype)[..., None, :]) @ vh
    # In units of the limit, so that squares neither overflow nor underflow.
    unit = limit[..., None, None]
    scaled = a / unit
    wide = a.shape[-2] < a.shape[-1]
    ah = backend.adjoint(xp, scaled)
    eigenvalues, v = xp.linalg.eigh(scaled @ ah if wide else ah @ scaled)
    above = eigenvalues > 1.0
    share = 1.0 - 1.0 / xp.sqrt(xp.where(above, eigenvalues, xp.ones_like(eigenvalues)))
    filtered = (v * xp.astype(share, v.dtype)[..., None, :]) @ backend.adjoint(xp, v)
    return a - (filtered @ scaled if wide else scaled @ filtered) * unit
