"""Golub–Kahan–Lanczos, restarted: the largest singular value of an operator."""

from __future__ import annotations

from collections.abc import Hashable
from functools import partial
from typing import Any

import numpy as np

from specops import arrays
from specops.arrays.solvers import eigh
from specops.maps.protocol import BlockOperator
from specops.typing import Array, Namespace

_BASIS, _KEPT, _BETWEEN = 32, 16, 8
"""Vectors of a full basis, vectors that a restart keeps, and steps between two tests. For
zero-padded convolutions with close values, 24 and fewer vectors took up to twice as many products;
48 took no fewer than 32."""
_NEGLIGIBLE_UNITS = 16.0
"""What a product leaves outside the basis counts as zero below so many units in the last place of
the largest entry of AᴴA in the basis: values lose no more by that."""
_SEEN, _LATE = 1e-6, 256
"""A relative residual and a number of steps. The gap to the second Ritz value is trusted once one
of them is reached; before, a larger value may exist whose vector the start hardly contains. Of 600
separable kernels of signs none then was more than 1e-5 off in single precision; with a residual of
1e-5 one in 300 was, by 5e-4, and without any one in 15, by up to 7e-4. Normal kernels take 1.1 to
2.2 times the products, orthogonal ones up to five times; in double precision residuals are smaller
in any case. Values of long one-dimensional kernels, which 256 steps hardly separate, were no closer
after 1024."""
OF_VECTORS = 64.0
"""A `tolerance` in units of rounding for callers that need the vector. For a normal 700×500 matrix
in single precision, what they compute from it was 1.5e-4 off, against 1.5e-3 with a vector of which
only the value has converged."""
INDEPENDENT = 0.5
"""If a unit vector has at least this norm without its part in the basis, that rest is orthogonal to
the basis to a few units of rounding, as in Kahan's test "twice is enough"."""
_State = tuple[Array, Array, Array, Array, Any, Any, Any]
"""(basis, AᴴA in the basis, Ritz values, Ritz vectors, the number of vectors whose product is
known, steps so far, whether all blocks have converged)."""


def largest_singular_triplet(
    xp: Namespace,
    operator: BlockOperator,
    start: Array,
    *,
    tolerance: float | None = None,
    max_steps: int = 1024,
) -> tuple[Array, Array, Array]:
    """(u, σ, v) with σ = ‖A v‖ of the leading Ritz vector v of Krylov spaces from `start`.

    Lanczos on AᴴA, which is Golub–Kahan–Lanczos with the right vectors only: they alone are
    reorthogonalised and kept. A full basis of 32 is restarted from its 16 leading Ritz vectors.
    Each diagonal block has a basis of its own, and all are advanced together, so that a block whose
    norm is close to the largest is not missed because the start hardly contains its vectors. σ is
    computed from the unit vector v, so it is a lower bound of ‖A‖, up to the rounding of one
    product, whatever happened before.

    Let θ, θ₂ be the leading Ritz values of AᴴA and r = ‖AᴴA v − θv‖. The error of θ is about
    min(r, r²/(θ − θ₂)). A block has converged when this is below 8 units in the last place of θ and
    r is below 1e-6·θ, or 256 steps were taken; where a `tolerance` is given, when r is below
    tolerance·θ. From a start with hardly any component along the leading vector it may converge
    to another. Under compilers without loops of unknown length, and under torch's vmap, 32 steps
    run without a test.

    Parameters
    ----------
    xp : namespace
        The arrays' namespace.
    operator : BlockOperator
        A; the range of its dtype has to hold ‖A‖².
    start : array, shape (columns,)
        Any vector with a component along the leading right singular vector of each block.
    tolerance : float, optional
        Relative residual of v in its eigenvalue equation at which to stop.
    max_steps : int
        Limit on the products with AᴴA; where it is reached, σ is still a lower bound.

    References
    ----------
    Golub & Kahan 1965; Wu & Simon 2000 (thick restart); Simon & Zha 2000 (one side only).
    """
    blocks, columns = operator.blocks, operator.shape[1] // operator.blocks
    v = arrays.compiled(
        _leading_vector,
        (type(operator), operator.sizes, tolerance, max_steps),
        xp.reshape(start, (blocks, 1, columns)),
        operator.data,
    )
    v = _safe_divide(xp, v, xp.linalg.vector_norm(v))
    u = operator.matvec(v)
    sigma = xp.linalg.vector_norm(u)
    return _safe_divide(xp, u, sigma), sigma, v


def _leading_vector(
    kind: type[BlockOperator],
    sizes: Hashable,
    tolerance: float | None,
    max_steps: int,
    start: Array,
    data: Any,
) -> Array:
    """The leading Ritz vector of the block in which it is largest; `start` (blocks, 1, columns)."""
    xp = arrays.namespace(start)
    operator = kind(data, sizes)
    blocks, _, columns = start.shape
    eps = arrays.epsilon(start.dtype)
    # A basis of the whole space needs no restart: vectors beyond it are zeros.
    size, between = min(_BASIS, -(-columns // _BETWEEN) * _BETWEEN), _BETWEEN
    limit = max_steps if columns > _BASIS else size
    staged = arrays.is_staged(start)

    def advanced(state: _State) -> _State:
        basis, inside, values, vectors, used, steps, _ = state
        basis, inside, used = arrays.cond(
            used == size,
            lambda: _restarted(xp, basis, inside, values, vectors),
            lambda: (basis, inside, used),
        )
        extend = partial(_step, xp, operator, eps)
        basis, inside = arrays.fori(xp, used, used + between, extend, (basis, inside))
        used = used + between
        values, vectors = _ritz(xp, inside, used, size, staged=staged)
        found = _have_converged(xp, inside, values, vectors, used, steps, eps, tolerance)
        return basis, inside, values, vectors, used, steps + between, xp.all(found)

    start = start / arrays.magnitude(xp, start, axis=(1, 2))
    start = _safe_divide(xp, start, xp.linalg.vector_norm(start, axis=(1, 2), keepdims=True))
    real = arrays.real_part(xp, start)
    basis = _grow(xp, start, size + 1, columns)
    inside = arrays.zeros((blocks, size + 1, size + 1), like=real)
    ritz = arrays.zeros((blocks, size, size), like=real)
    state: _State = (basis, inside, ritz[:, 0, :], ritz, 0, 0, xp.asarray(False))
    if arrays.is_traced(start) and not staged:
        for _ in range(size // between):
            state = advanced(state)
    else:
        going = lambda s: ~s[-1] & (s[-2] < limit)  # noqa: E731
        state = arrays.while_loop(xp, going, advanced, state)
    basis, _, values, vectors, *_ = state
    best = arrays.argmax(xp, values[:, -1])
    one_hot = xp.take(arrays.constant(np.eye(blocks), real), best, axis=0)[0, :]
    v = _combined(xp, vectors[:, :, -1:], basis)[:, 0, :]
    return xp.reshape(v * xp.astype(one_hot, v.dtype)[:, None], (-1,))


def _ritz(
    xp: Namespace, inside: Array, used: Any, size: int, *, staged: bool
) -> tuple[Array, Array]:
    """Ritz values, ascending, and vectors, from AᴴA in the `used` part of the basis."""
    if not staged:
        return eigh(xp, inside[:, :used, :used])
    # Unused rows get the value -1, which comes before all others, since AᴴA has no negative values.
    unused = arrays.constant(np.arange(size), inside) >= used
    behind = arrays.constant(-np.eye(size), inside)
    return eigh(xp, xp.where(unused[:, None], behind, inside[:, :size, :size]))


def _have_converged(
    xp: Namespace,
    inside: Array,
    values: Array,
    vectors: Array,
    used: Any,
    steps: Any,
    eps: float,
    tolerance: float | None,
) -> Array:
    """Whether the leading Ritz vector of each block has: see `largest_singular_triplet`."""
    theta = values[:, -1]
    residual = inside[:, used - 1, used] * xp.abs(vectors[:, used - 1, -1])
    residual = _safe_divide(xp, residual, theta)
    if tolerance is not None:
        return residual <= tolerance
    gap = _safe_divide(xp, theta - values[:, -2], theta) if values.shape[-1] > 1 else theta
    trusted = (residual <= _SEEN) | (steps >= _LATE)
    return (residual <= 8 * eps) | ((residual**2 <= 8 * eps * gap) & trusted)


def _step(
    xp: Namespace, operator: BlockOperator, eps: float, j: Any, carry: tuple[Array, Array]
) -> tuple[Array, Array]:
    """Vector j + 1 from the product with vector j; (blocks, j, :) of the basis is vector j."""
    basis, inside = carry
    every = slice(None)
    image = operator.matvec(xp.reshape(basis[:, j, :], (-1,)))
    x = xp.reshape(operator.rmatvec(image), (operator.blocks, -1))
    along = arrays.real_part(xp, xp.sum(arrays.conjugate(xp, basis[:, j, :]) * x, axis=-1))
    # The recurrence removes most of x's part in the basis; one pass then suffices for the rest.
    for coupling, i in ((along, j), (inside[:, j - 1, j], j - 1)):
        x = x - xp.astype(coupling, x.dtype)[:, None] * basis[:, i, :]
    # The rows after j are zeros. They are left out, except in compiled code, where j is not known.
    known = basis[:, : j + 1, :] if isinstance(j, int) else basis
    before = xp.linalg.vector_norm(x, axis=-1)
    x = _without(xp, x, known)
    norm = xp.linalg.vector_norm(x, axis=-1)
    x = _safe_divide(xp, x, norm[:, None])

    def again() -> tuple[Array, Array]:
        y = _without(xp, x, known)
        left = xp.linalg.vector_norm(y, axis=-1)
        return _safe_divide(xp, y, left[:, None]), left

    # If little is left, it is mostly rounding, some of it along the basis. That part shows, and can
    # be removed, only once the vector is normalised.
    if arrays.is_traced(x) and not arrays.is_staged(x):
        x, left = again()
    else:
        little = xp.any(norm < 0.5 * before)
        x, left = arrays.cond(little, again, lambda: (x, xp.ones_like(norm)))
    inside = arrays.add_at(inside, (every, j, j), along)
    # If less than rounding is left, the Krylov space is exhausted: a next vector would be noise.
    # Of a block that is nothing beside the others, the squares may be too small for numbers.
    largest = xp.max(xp.abs(inside), axis=(1, 2))
    least = xp.maximum(_NEGLIGIBLE_UNITS * eps * largest, eps**2 * xp.max(largest))
    fine = (norm > least) & (left > INDEPENDENT)
    norm = xp.where(fine, norm, xp.zeros_like(norm))
    inside = arrays.add_at(inside, (every, j, j + 1), norm)
    inside = arrays.add_at(inside, (every, j + 1, j), norm)
    x = xp.where(fine[:, None], x, xp.zeros_like(x))
    return arrays.add_at(basis, (every, j + 1, every), x), inside


def _restarted(
    xp: Namespace, basis: Array, inside: Array, values: Array, vectors: Array
) -> tuple[Array, Array, int]:
    """Restart a full basis with its leading Ritz vectors and last vector: (basis, AᴴA, kept)."""
    size = inside.shape[-1] - 1
    count = min(_KEPT, size // 2)
    values, vectors = values[:, size - count :], vectors[:, :, size - count :]
    coupled = inside[:, size - 1, size][:, None] * vectors[:, size - 1, :]
    kept = xp.concat([_combined(xp, vectors, basis), basis[:, size:, :]], axis=1)
    diagonal = values[:, :, None] * arrays.constant(np.eye(count), inside)
    beside = xp.concat([coupled, xp.zeros_like(coupled[:, :1])], axis=1)
    inside = xp.concat([diagonal, coupled[:, None, :]], axis=1)
    inside = xp.concat([inside, beside[:, :, None]], axis=2)
    return (
        _grow(xp, kept, size + 1, basis.shape[2]),
        _grow(xp, inside, size + 1, size + 1),
        count,
    )


def _combined(xp: Namespace, vectors: Array, basis: Array) -> Array:
    """Ritz vectors, as rows.

    AᴴA is real in its basis even if A is complex, hence the cast: some libraries do not mix them.
    """
    turned = xp.astype(xp.matrix_transpose(vectors), basis.dtype)
    return turned @ basis[:, : vectors.shape[1], :]


def _grow(xp: Namespace, x: Array, rows: int, columns: int) -> Array:
    """`x` padded with zeros to so many rows and columns."""
    below = arrays.zeros((x.shape[0], rows - x.shape[1], x.shape[2]), like=x)
    x = xp.concat([x, below], axis=1)
    beside = arrays.zeros((x.shape[0], rows, columns - x.shape[2]), like=x)
    return xp.concat([x, beside], axis=2)


def _without(xp: Namespace, x: Array, basis: Array) -> Array:
    """Remove the components of (blocks, n) along the rows of (blocks, k, n)."""
    complex_ = arrays.is_complex(basis)
    # conj(basis @ conj(x)) needs no conjugated copy of the basis
    components = arrays.matmul(basis, (xp.conj(x) if complex_ else x)[:, :, None])
    components = xp.matrix_transpose(xp.conj(components) if complex_ else components)
    return x - (components @ basis)[:, 0, :]


def _safe_divide(xp: Namespace, x: Array, norm: Array) -> Array:
    return x / xp.where(norm > 0, norm, xp.ones_like(norm))
