"""Leading singular triplets by Rayleigh–Ritz on a small, warm-startable subspace."""

from __future__ import annotations

from typing import Any

from specops import arrays
from specops.arrays.solvers import svd
from specops.maps.matrix import MatrixOperator
from specops.maps.protocol import Operator
from specops.typing import Array, Namespace

_DEPENDENT = 1e-6
"""If the new part of a column is shorter than this, relative to the longest, it counts as rounding:
eight units in single precision."""
_DRIFTS = 8
"""After so many rounds AV is computed anew at the end, because its updates gather rounding: in
single precision it grew from 7e-8 of σ₁ after 4 rounds to 2e-7 after 200."""


def with_small_columns(xp: Namespace, a: Array) -> MatrixOperator:
    """The matrix or its adjoint, whichever has its right singular vectors on the smaller side."""
    return MatrixOperator(arrays.adjoint(xp, a) if a.shape[0] <= a.shape[1] else a)


def leading_triplets(
    xp: Namespace,
    operator: Operator,
    start: Array,
    k: int,
    *,
    iterations: int,
    tolerance: float | None = None,
    floor: Array | None = None,
) -> tuple[Array, Array, Array, Array]:
    r"""(u, s, v, basis) of the `k` largest singular values, from a block of start vectors.

    Locally optimal block iteration: each round takes the best `start.shape[1]` vectors out of
    the space spanned by the present V, its residuals :math:`A^H U - V S` and the previous
    directions. One round from a warm start follows a slowly changing matrix at the cost of one
    product with A and one with its adjoint.

    Parameters
    ----------
    xp : namespace
        The arrays' namespace.
    operator : Operator
        A.
    start : array, shape (columns, p)
        p ≥ k start vectors; some more than k help if values are close.
    k : int
        How many triplets to find.
    iterations : int
        Largest number of rounds.
    tolerance : float, optional
        Stop when all residuals ‖Aᴴu − σv‖ are below this times σ₁; default √ε/10 of the dtype,
        at which the values have converged to about ε.
    floor : array, shape (), optional
        Residuals of values at or below it are ignored.

    Returns
    -------
    u, s, v : arrays of shape (rows, k), (k,), (columns, k)
        The values are lower bounds: each s[i] is at most σ_i.
    basis : array, shape (columns, p)
        All of V, to start the next call from.

    References
    ----------
    Knyazev 2001.
    """
    eps = arrays.epsilon(start.dtype)
    tolerance = 0.1 * eps**0.5 if tolerance is None else tolerance
    width, rounds = start.shape[1], 0
    basis = _orthonormal(xp, start)
    directions = basis[:, :0]
    image = _apply(operator.matvec, basis)
    while True:
        u, s, qh = svd(xp, image)
        q = arrays.adjoint(xp, qh)[:, : min(width, qh.shape[0])]
        u, s = u[:, : q.shape[1]], s[: q.shape[1]]
        v = arrays.matmul(basis, q)
        residual = _apply(operator.rmatvec, u) - v * xp.astype(s, v.dtype)[None, :]
        rounds += 1
        errors = xp.linalg.vector_norm(residual[:, :k], axis=0)
        if floor is not None:
            errors = xp.where(s[:k] > floor, errors, xp.zeros_like(errors))
        error = xp.max(errors)
        if rounds >= iterations or arrays.truth(error <= tolerance * s[0]):
            break
        if basis.shape[1] > width:
            directions = _without(xp, v, basis[:, :width])
        room = v.shape[0] - v.shape[1]
        if room == 0:
            break
        fresh = xp.concat([residual, directions], axis=1)
        fresh = fresh[:, : min(room, fresh.shape[1])]
        fresh = _orthonormal(xp, fresh, against=v)
        basis = xp.concat([v, fresh], axis=1)
        image = xp.concat(
            [u * xp.astype(s, u.dtype)[None, :], _apply(operator.matvec, fresh)], axis=1
        )
    if rounds > _DRIFTS:
        v = xp.linalg.qr(v)[0]
        image = _apply(operator.matvec, v)
        u, s, qh = svd(xp, image)
        v = arrays.matmul(v, arrays.adjoint(xp, qh))
    return u[:, :k], s[:k], v[:, :k], v


def _apply(product: Any, x: Array) -> Array:
    """Products with the columns of `x`, for operators that take vectors as rows."""
    xp = arrays.namespace(x)
    return xp.matrix_transpose(product(xp.matrix_transpose(x)))


def _orthonormal(xp: Namespace, x: Array, against: Array | None = None) -> Array:
    """Orthonormal columns of `x`, also to `against`; dependent ones become random directions."""
    scale = xp.max(xp.linalg.vector_norm(x, axis=0))
    for _ in range(2):
        if against is not None:
            x = _without(xp, x, against)
        x, r = xp.linalg.qr(x)
        # NaN, too: some factorisations of dependent columns end there.
        lost = ~(xp.abs(xp.linalg.diagonal(r)) > _DEPENDENT * scale)
        scale = xp.ones_like(scale)
        if arrays.truth(xp.any(lost)) is not False:
            noise = arrays.start_vector("subspace", x.shape[0] * x.shape[1]).reshape(x.shape)
            noise = xp.astype(arrays.constant(noise, x), x.dtype)
            x = xp.where(lost[None, :], noise, x)
            if against is not None:
                x = _without(xp, x, against)
            x = xp.linalg.qr(x)[0]
    return x


def _without(xp: Namespace, x: Array, basis: Array) -> Array:
    """The columns of `x` less their parts along an orthonormal basis."""
    return x - arrays.matmul(basis, arrays.matmul(arrays.adjoint(xp, basis), x))
