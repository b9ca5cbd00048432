"""Matrices of stable rank at most r along given right singular vectors."""

from __future__ import annotations

from specops import arrays
from specops.arrays.solvers import svd
from specops.errors import StateError
from specops.linalg.golub_kahan import OF_VECTORS, largest_singular_triplet
from specops.linalg.lobpcg import leading_triplets
from specops.linalg.spectral_function import spectral_function
from specops.maps.matrix import MatrixOperator
from specops.maps.prepare import MatrixBlock
from specops.projections.feasible_rank import Candidates, energy, shape_of
from specops.typing import Array, Namespace

_ITERATE_ABOVE = 2**25
"""rows · columns · min(rows, columns) from which a few products cost less than an SVD: at 200² the
SVD took 0.7 of the time of the iteration, at 322² as long, at 512² four times as long."""
_FEW_TRIPLETS = 16
"""With so many triplets the SVD of 512² takes no longer than their iteration: 1.3 s both."""
_LOBPCG_ROUNDS_WHEN_TRACED = 6
"""Rounds that gave values to 1e-8, from vectors of a normal matrix of 512² that had changed by
1e-3."""
_RANDOM_PART = 0.01
"""Length of the random vector that is added to an old unit vector. That alone may be a singular
vector that no longer leads; a product with the sum shows the one that does."""


def matrix_candidates(
    xp: Namespace, block: MatrixBlock, v: Array, limit: Array, preserve: int
) -> tuple[Candidates, Array, Array]:
    """(the candidates, the stable rank, how many triplets stay) along orthonormal columns `v`.

    The part that stays is A V Vᴴ, to which the rest is orthogonal for any V: no candidate
    relies on V having converged.
    """
    a = block.matrices
    # A margin for the rounding of the products.
    eps = arrays.epsilon(a.dtype)
    reduced = limit * (1.0 - 4.0 * eps)
    images = arrays.matmul(arrays.stop_gradient(a), v)
    squares = xp.sum(xp.abs(images) ** 2, axis=-2)
    first = squares[..., 0]
    fits = xp.cumulative_sum(squares, axis=-1) <= (limit * first)[..., None] * (1.0 + 4.0 * eps)
    count = xp.sum(xp.astype(fits, xp.int32), axis=-1, dtype=xp.int32)
    stays = xp.sum(xp.where(fits, squares, xp.zeros_like(squares)), axis=-1)
    fixed = _leading_part(xp, a, v, fits)
    if not arrays.is_concrete(a):
        stays = energy(xp, fixed)
        first = energy(xp, _leading_part(xp, a, v[..., :1], fits[..., :1])) if preserve else stays
    rest = a - fixed
    room = xp.where(reduced * first > stays, reduced * first - stays, xp.zeros_like(first))
    squared_rest = energy(xp, rest)
    safe_rest = arrays.nonzero(xp, squared_rest)
    leading = v[..., :1]

    def weight(g: Array) -> Array:
        along = xp.ones_like(g)
        if preserve == 0:
            # The foot of the perpendicular from A on the ray of this g.
            along = (first + g * squared_rest) / arrays.nonzero(xp, first + g**2 * squared_rest)
        along, g = along[..., None, None], g[..., None, None]
        return along * (fixed + g * rest) * block.scale

    def stored_rank(stored: Array) -> Array:
        return _rank_along(xp, stored / block.scale, leading)

    wanted = xp.sqrt(room / safe_rest)
    growth = squared_rest / arrays.nonzero(xp, first)
    return Candidates(weight, stored_rank, wanted, growth), _rank_along(xp, a, leading), count


def _leading_part(xp: Namespace, a: Array, v: Array, stays: Array) -> Array:
    """A V Vᴴ for the columns that stay, with the derivative of the leading part of A's SVD."""

    def along(a: Array, v: Array, stays: Array) -> Array:
        images = arrays.matmul(a, v)
        kept = xp.where(stays[..., None, :], images, xp.zeros_like(images))
        return kept @ arrays.adjoint(xp, v)

    def leading(a: Array, v: Array, stays: Array) -> Array:
        def function(s: Array, kept: Array) -> tuple[Array, Array]:
            none = xp.zeros_like(s)
            slopes = xp.concat([kept, none[..., kept.shape[-1] :]], axis=-1)
            return slopes * s, slopes

        kept = xp.astype(stays, arrays.real_dtype(xp, a.dtype))
        return spectral_function(xp, a, function, kept)[0]

    return arrays.with_derivative(along, leading, a, v, stays)


def leading_vectors(
    xp: Namespace, a: Array, k: int, start: Array | None
) -> tuple[Array, Array | None]:
    """(leading right singular vectors (*batch, columns, k), what to start from next time)."""
    rows, columns = a.shape[-2:]
    side = min(rows, columns)
    width = 1 if k == 1 else min(k + 2, side)
    iterated = rows * columns * side > _ITERATE_ABOVE and k <= _FEW_TRIPLETS
    if start is not None:
        shape = (*a.shape[:-2], columns, width)
        if not iterated or not arrays.is_array(start) or tuple(start.shape) != shape:
            expected = f"v of shape {shape}" if iterated else "none"
            raise StateError(
                f"state does not fit matrices of shape {tuple(a.shape)} with these options, which "
                f"take {expected}: got {shape_of(start)}"
            )
        start = xp.astype(start, a.dtype)
        start = xp.where(xp.isfinite(start), start, xp.zeros_like(start))
    if not iterated or (start is None and arrays.is_traced(a)):
        v = arrays.adjoint(xp, svd(xp, a)[2])
        return v[..., :k], v[..., :width] if iterated else None
    if a.ndim == 2:
        basis = _iterate(xp, a, k, width, start)
    else:
        stack = xp.reshape(a, (-1, rows, columns))
        starts = None if start is None else xp.reshape(start, (-1, columns, width))
        bases = [
            _iterate(xp, stack[i, ...], k, width, None if starts is None else starts[i, ...])
            for i in range(stack.shape[0])
        ]
        basis = xp.reshape(xp.stack(bases), (*a.shape[:-2], columns, width))
    return basis[..., :k], basis


def _iterate(xp: Namespace, a: Array, k: int, width: int, start: Array | None) -> Array:
    """An orthonormal basis (columns, width) whose first `k` are leading right vectors."""
    columns = a.shape[1]
    noise = arrays.start_vector("stable rank", columns * width).reshape(columns, width)
    noise = xp.astype(arrays.constant(noise, a), a.dtype)
    if k == 1:
        first = noise if start is None else start + _RANDOM_PART * noise
        tolerance = OF_VECTORS * arrays.epsilon(a.dtype)
        _, _, v = largest_singular_triplet(xp, MatrixOperator(a), first[:, 0], tolerance=tolerance)
        return (v / arrays.nonzero(xp, xp.linalg.vector_norm(v)))[:, None]
    if start is not None:
        noise = xp.concat([start, noise[:, :1]], axis=1)[:, : min(width + 1, *a.shape)]
    _, _, _, basis = leading_triplets(
        xp,
        MatrixOperator(a),
        noise,
        k,
        iterations=_LOBPCG_ROUNDS_WHEN_TRACED if arrays.is_traced(a) else 500,
        tolerance=arrays.epsilon(a.dtype) ** 0.75,
    )
    return xp.linalg.qr(basis)[0][:, :width]


def _rank_along(xp: Namespace, a: Array, v: Array) -> Array:
    """‖A‖_F²/‖A v‖², an upper bound of the stable rank; 0 for the zero matrix."""
    norm = energy(xp, arrays.matmul(a, v))
    return xp.where(norm > 0, energy(xp, a) / arrays.nonzero(xp, norm), xp.zeros_like(norm))
