"""Golub–Kahan–Lanczos bidiagonalisation: the largest singular value of an operator."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from specops import backend

Array = Any
_CHECK_EVERY = 4
_STEPS_WHEN_TRACED = 32


def largest_singular_triplet(
    xp: Any,
    matvec: Callable[[Array], Array],
    rmatvec: Callable[[Array], Array],
    start: Array,
    *,
    rows: int,
    tolerance: float | None = None,
    max_steps: int = 400,
) -> tuple[Array, Array, Array]:
    """(u, σ, v) with σ = ‖A v‖ the largest Ritz value of a Krylov space from `start`.

    Full reorthogonalisation, twice. σ is a lower bound of ‖A‖ up to rounding; it has converged
    when the residual ‖Aᴴu − σv‖ is below √tolerance·σ and σ itself moved by less than
    tolerance·σ. While a compiler traces, a fixed 32 steps run instead of that test.

    Parameters
    ----------
    xp : namespace
        Of the arrays.
    matvec : callable
        Product of A with one vector.
    rmatvec : callable
        Product of its adjoint with one vector.
    start : array, shape (columns,)
        Any vector with a component along the leading right singular vector.
    rows : int
        Rows of A.
    tolerance : float, optional
        Relative; default 4 units in the last place of `start`'s dtype.
    max_steps : int
        Limit on the dimension of the Krylov space.

    References
    ----------
    Golub & Kahan 1965; Baglama & Reichel 2005.
    """
    eps = backend.epsilon(start.dtype)
    tolerance = 4 * eps if tolerance is None else tolerance
    columns = start.shape[0]
    limit = min(rows, columns, max_steps)
    traced = backend.truth(xp.all(xp.isfinite(start))) is None
    if traced:
        limit = min(limit, _STEPS_WHEN_TRACED)

    v = _unit(xp, start)
    right: list[Array] = [v]
    left: list[Array] = []
    alphas: list[Array] = []
    betas: list[Array] = []
    previous = None
    while True:
        u = matvec(right[-1])
        if left:
            u = _orthogonalise(xp, u, left)
        alpha = xp.linalg.vector_norm(u)
        left.append(_safe_divide(xp, u, alpha))
        alphas.append(alpha)
        v = _orthogonalise(xp, rmatvec(left[-1]), right)
        beta = xp.linalg.vector_norm(v)
        # Below rounding the Krylov space is exhausted: its next vector would be noise.
        beta = xp.where(beta > eps * alphas[0], beta, xp.zeros_like(beta))
        betas.append(beta)
        done = len(alphas) >= limit
        if not traced and (done or len(alphas) % _CHECK_EVERY == 0 or len(alphas) == 1):
            p, s, _ = xp.linalg.svd(_bidiagonal(xp, alphas, betas), full_matrices=False)
            sigma = float(s[0])
            residual = float(beta) * abs(complex(p[-1, 0]))
            settled = previous is not None and abs(sigma - previous) <= tolerance * sigma
            done |= residual <= tolerance * sigma or (
                settled and residual <= tolerance**0.5 * sigma
            )
            previous = sigma
        if done:
            break
        right.append(_safe_divide(xp, v, beta))
    p, s, qh = xp.linalg.svd(_bidiagonal(xp, alphas, betas), full_matrices=False)
    u = xp.stack(left, axis=-1) @ p[:, 0]
    v = xp.stack(right, axis=-1) @ backend.adjoint(xp, qh)[:, 0]
    return u, s[0], v


def _bidiagonal(xp: Any, alphas: list[Array], betas: list[Array]) -> Array:
    """Upper bidiagonal: α on the diagonal, β above it."""
    n = len(alphas)
    zero = xp.zeros_like(alphas[0])
    rows = [
        xp.stack([alphas[i] if j == i else betas[i] if j == i + 1 else zero for j in range(n)])
        for i in range(n)
    ]
    return xp.stack(rows)


def _orthogonalise(xp: Any, x: Array, basis: list[Array]) -> Array:
    q = xp.stack(basis, axis=-1)
    for _ in range(2):
        x = x - q @ (backend.adjoint(xp, q) @ x)
    return x


def _unit(xp: Any, x: Array) -> Array:
    x = x / backend.magnitude(xp, x)
    return _safe_divide(xp, x, xp.linalg.vector_norm(x))


def _safe_divide(xp: Any, x: Array, norm: Array) -> Array:
    return x / xp.where(norm > 0, norm, xp.ones_like(norm))
