"""Golub–Kahan–Lanczos bidiagonalisation: the largest singular value of an operator."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import numpy as np

from specops import arrays
from specops.arrays.solvers import svd
from specops.maps.protocol import BlockOperator
from specops.typing import Array, Namespace

_FIRST_STEPS = 8
"""Steps before the first test, doubled until it is passed: cold, normal matrices of 64², 256² and
1024² took 32, 64 and 128."""
_LANCZOS_STEPS_WHEN_TRACED = 32
"""Of normal matrices of 256² and 1024² they give σ₁ to 2e-4."""
_NEGLIGIBLE_UNITS = 16.0
"""Units of the last place, of the largest entry of the band, below which what a product leaves is
taken for nothing: values lose no more by it."""
INDEPENDENT = 0.5
"""Least norm of a unit vector without its part in the basis: as in the test "twice is enough" of
Kahan, what is left then is orthogonal to a few units of rounding."""


def largest_singular_triplet(
    xp: Namespace,
    operator: BlockOperator,
    start: Array,
    *,
    tolerance: float | None = None,
    max_steps: int = 512,
) -> tuple[Array, Array, Array]:
    """(u, σ, v) with σ = ‖A v‖ of the leading Ritz vector v of Krylov spaces from `start`.

    One space per diagonal block, all advanced together, so that a block whose norm is close to
    the largest is not missed because the start hardly sees it. Full reorthogonalisation, before
    and after each vector is normalised. σ is computed from the unit vector v, so that whatever
    happens on the way to it, it is a lower bound of ‖A‖ up to the rounding of one product. A
    block has converged when the residual
    ‖Aᴴu − σv‖ is below tolerance·σ, or below max(16·tolerance, 1e-10)·σ once doubling its space
    moved σ by less than tolerance·σ; values closer together than that are not told apart.
    While a compiler traces, 32 steps run instead of that test.

    Parameters
    ----------
    xp : namespace
        Of the arrays.
    operator : BlockOperator
        A.
    start : array, shape (columns,)
        Any vector with a component along the leading right singular vector of each block.
    tolerance : float, optional
        Relative; default 4 units in the last place of `start`'s dtype.
    max_steps : int
        Limit on the dimension of each space; where it is reached, σ is still a lower bound.

    References
    ----------
    Golub & Kahan 1965; Baglama & Reichel 2005.
    """
    tolerance = 4 * arrays.epsilon(start.dtype) if tolerance is None else tolerance
    blocks = operator.blocks
    rows, columns = (n // blocks for n in operator.shape)
    limit = min(rows, columns, max_steps)
    traced = arrays.is_traced(start)
    steps = min(limit, _LANCZOS_STEPS_WHEN_TRACED if traced else _FIRST_STEPS)
    start = xp.reshape(start, (blocks, 1, columns))
    start = start / arrays.magnitude(xp, start, axis=(1, 2))
    right = _safe_divide(xp, start, xp.linalg.vector_norm(start, axis=(1, 2), keepdims=True))
    left = arrays.zeros((blocks, 0, rows), like=start)
    band = arrays.zeros((blocks, 0, 1), like=xp.real(start) if arrays.is_complex(start) else start)

    nearly = max(16.0 * tolerance, 1e-10)
    done = 0
    previous = np.full(blocks, -1.0)
    while True:
        right = _grow(xp, right, steps + 1, columns)
        left = _grow(xp, left, steps, rows)
        band = _grow(xp, band, steps, steps + 1)
        right, left, band = arrays.compiled(
            _extend,
            (type(operator), operator.sizes, done, steps),
            operator.data,
            right,
            left,
            band,
        )
        p, s, qh = svd(xp, band[:, :, :steps])
        done = steps
        if traced or done == limit:
            break
        sigma = arrays.to_numpy(s[:, 0]).astype(float)
        last = arrays.to_numpy(band[:, steps - 1, steps]).astype(float)
        residual = last * np.abs(arrays.to_numpy(p[:, steps - 1, 0]))
        settled = np.abs(sigma - previous) <= tolerance * sigma
        if (residual <= np.where(settled, nearly, tolerance) * sigma).all():
            break
        previous, steps = sigma, min(2 * steps, limit)
    best = arrays.argmax(xp, s[:, 0])
    one_hot = xp.take(arrays.constant(np.eye(blocks), right), best, axis=0)[0, :]
    one_hot = xp.astype(one_hot, start.dtype)[:, None]
    # The band is real even for a complex operator; some libraries do not mix the two.
    v = (xp.astype(qh[:, None, 0, :], start.dtype) @ right[:, :done, :])[:, 0, :] * one_hot
    v = xp.reshape(v, (-1,))
    v = _safe_divide(xp, v, xp.linalg.vector_norm(v))
    u = operator.matvec(v)
    sigma = xp.linalg.vector_norm(u)
    return _safe_divide(xp, u, sigma), sigma, v


def _extend(
    kind: type[BlockOperator],
    sizes: Hashable,
    first: int,
    last: int,
    data: Array,
    right: Array,
    left: Array,
    band: Array,
) -> tuple[Array, Array, Array]:
    """Steps `first` to `last`; (blocks, step, :) of `right` and `left` are Lanczos vectors."""
    xp = arrays.namespace(data)
    operator = kind(data, sizes)
    eps = arrays.epsilon(data.dtype)

    def step(j: Any, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        right, left, band = carry
        u = xp.reshape(operator.matvec(xp.reshape(right[:, j, :], (-1,))), (operator.blocks, -1))
        # Below rounding the Krylov space is exhausted: its next vector would be noise.
        longest = xp.max(xp.abs(band), axis=(1, 2))
        u, alpha = _next_vector(xp, u, left, _NEGLIGIBLE_UNITS * eps * longest)
        v = xp.reshape(operator.rmatvec(xp.reshape(u, (-1,))), (operator.blocks, -1))
        v, beta = _next_vector(xp, v, right, _NEGLIGIBLE_UNITS * eps * (longest + alpha))
        every = slice(None)
        left = arrays.add_at(left, (every, j, every), u)
        right = arrays.add_at(right, (every, j + 1, every), v)
        band = arrays.add_at(band, (every, j, j), alpha)
        band = arrays.add_at(band, (every, j, j + 1), beta)
        return right, left, band

    result: tuple[Array, Array, Array] = arrays.fori(xp, first, last, step, (right, left, band))
    return result


def _grow(xp: Namespace, x: Array, rows: int, columns: int) -> Array:
    """`x` in the corner of a zero array."""
    below = arrays.zeros((x.shape[0], rows - x.shape[1], x.shape[2]), like=x)
    x = xp.concat([x, below], axis=1)
    beside = arrays.zeros((x.shape[0], rows, columns - x.shape[2]), like=x)
    return xp.concat([x, beside], axis=2)


def _next_vector(xp: Namespace, x: Array, basis: Array, least: Any) -> tuple[Array, Array]:
    """(x less its part in the basis, normalised; its norm): zeros where nothing is left.

    Where little is left, what is left is mostly rounding, some of it along the basis: its size
    shows, and can be removed, only once the vector is normalised.
    """
    x = _without(xp, x, basis)
    norm = xp.linalg.vector_norm(x, axis=-1)
    x = _without(xp, _safe_divide(xp, x, norm[:, None]), basis)
    left = xp.linalg.vector_norm(x, axis=-1)
    fine = (norm > least) & (left > INDEPENDENT)
    x = _safe_divide(xp, x, left[:, None])
    return xp.where(fine[:, None], x, xp.zeros_like(x)), xp.where(fine, norm, xp.zeros_like(norm))


def _without(xp: Namespace, x: Array, basis: Array) -> Array:
    """Remove the components of (blocks, n) along the rows of (blocks, k, n)."""
    complex_ = arrays.is_complex(basis)
    # conj(basis @ conj(x)) needs no conjugated copy of the basis
    components = arrays.matmul(basis, (xp.conj(x) if complex_ else x)[:, :, None])
    components = xp.matrix_transpose(xp.conj(components) if complex_ else components)
    return x - (components @ basis)[:, 0, :]


def _safe_divide(xp: Namespace, x: Array, norm: Array) -> Array:
    return x / xp.where(norm > 0, norm, xp.ones_like(norm))
