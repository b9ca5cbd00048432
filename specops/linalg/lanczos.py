"""Golub–Kahan–Lanczos bidiagonalisation: the largest singular value of an operator."""

from __future__ import annotations

from typing import Any, Protocol

from specops import backend

Array = Any
_FIRST_STEPS = 8
_STEPS_WHEN_TRACED = 32


class Operator(Protocol):
    """Products with a matrix that is not formed."""

    shape: tuple[int, int]

    def __init__(self, data: Array, sizes: Any) -> None: ...

    def matvec(self, x: Array) -> Array:
        """A x."""

    def rmatvec(self, y: Array) -> Array:
        """Aᴴ y."""


class MatrixOperator:
    """A matrix as an operator; it needs no sizes."""

    def __init__(self, data: Array, sizes: Any = None) -> None:
        del sizes
        self.xp = backend.namespace(data)
        self.data = data
        self.shape = (int(data.shape[0]), int(data.shape[1]))

    def matvec(self, x: Array) -> Array:
        """A x."""
        return self.data @ x

    def rmatvec(self, y: Array) -> Array:
        """Aᴴ y."""
        return backend.adjoint(self.xp, self.data) @ y


def largest_singular_triplet(
    xp: Any,
    kind: type[Operator],
    data: Array,
    sizes: Any,
    start: Array,
    *,
    tolerance: float | None = None,
    max_steps: int = 512,
) -> tuple[Array, Array, Array]:
    """(u, σ, v) with σ = ‖A v‖ the largest Ritz value of a Krylov space from `start`.

    Full reorthogonalisation, twice. σ is a lower bound of ‖A‖ up to rounding; it has converged
    when the residual ‖Aᴴu − σv‖ is below √tolerance·σ and doubling the space moved σ by less
    than tolerance·σ. While a compiler traces, a fixed 32 steps run instead of that test.

    Parameters
    ----------
    xp : namespace
        Of the arrays.
    kind : type
        Of the operator: A is ``kind(data, sizes)``.
    data : array
        What A is made of.
    sizes : hashable
        The rest of what A is made of.
    start : array, shape (columns,)
        Any vector with a component along the leading right singular vector.
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
    rows, columns = kind(data, sizes).shape
    limit = min(rows, columns, max_steps)
    traced = backend.truth(backend.all_finite(xp, start)) is None
    steps = min(limit, _STEPS_WHEN_TRACED if traced else _FIRST_STEPS)
    start = start / backend.magnitude(xp, start)
    right = _safe_divide(xp, start, xp.linalg.vector_norm(start))[None, :]
    left = backend.zeros((0, rows), like=start)
    band = backend.zeros((0, 1), like=xp.real(start) if backend.is_complex(start) else start)

    done, previous = 0, -1.0
    while True:
        right = _grow(xp, right, (steps + 1, columns))
        left = _grow(xp, left, (steps, rows))
        band = _grow(xp, band, (steps, steps + 1))
        right, left, band = backend.compiled(
            _extend, (kind, sizes, done, steps), data, right, left, band
        )
        p, s, qh = xp.linalg.svd(band[:, :steps], full_matrices=False)
        done = steps
        if traced or done == limit:
            break
        sigma = float(s[0])
        residual = float(band[steps - 1, steps]) * abs(float(p[steps - 1, 0]))
        settled = abs(sigma - previous) <= tolerance * sigma
        if residual <= (tolerance**0.5 if settled else tolerance) * sigma:
            break
        previous, steps = sigma, min(2 * steps, limit)
    # The band is real even for a complex operator; some libraries do not mix the two.
    u = xp.astype(p[:, 0], start.dtype) @ left
    v = xp.astype(qh[0, :], start.dtype) @ right[:done, :]
    return u, s[0], v


def _extend(
    kind: type[Operator],
    sizes: Any,
    first: int,
    last: int,
    data: Array,
    right: Array,
    left: Array,
    band: Array,
) -> tuple[Array, Array, Array]:
    """Steps `first` to `last`; rows of `right` and `left` are the Lanczos vectors."""
    xp = backend.namespace(data)
    operator = kind(data, sizes)
    eps = backend.epsilon(data.dtype)

    def step(j: Any, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        right, left, band = carry
        u = _orthogonalise(xp, operator.matvec(right[j, :]), left)
        alpha = xp.linalg.vector_norm(u)
        u = _safe_divide(xp, u, alpha)
        v = _orthogonalise(xp, operator.rmatvec(u), right)
        beta = xp.linalg.vector_norm(v)
        # Below rounding the Krylov space is exhausted: its next vector would be noise.
        exhausted = beta <= eps * xp.max(xp.abs(band)) + eps * alpha
        v = xp.where(exhausted, xp.zeros_like(v), _safe_divide(xp, v, beta))
        beta = xp.where(exhausted, xp.zeros_like(beta), beta)
        left = backend.add_at(left, (j, slice(None)), u)
        right = backend.add_at(right, (j + 1, slice(None)), v)
        band = backend.add_at(backend.add_at(band, (j, j), alpha), (j, j + 1), beta)
        return right, left, band

    result: tuple[Array, Array, Array] = backend.fori(xp, first, last, step, (right, left, band))
    return result


def _grow(xp: Any, x: Array, shape: tuple[int, int]) -> Array:
    """`x` in the corner of a zero array."""
    below = backend.zeros((shape[0] - x.shape[0], x.shape[1]), like=x)
    x = xp.concat([x, below], axis=0)
    beside = backend.zeros((shape[0], shape[1] - x.shape[1]), like=x)
    return xp.concat([x, beside], axis=1)


def _orthogonalise(xp: Any, x: Array, basis: Array) -> Array:
    """Remove the components along the rows of `basis`, twice."""
    conjugate = xp.conj(basis) if backend.is_complex(basis) else basis
    for _ in range(2):
        x = x - (conjugate @ x) @ basis
    return x


def _safe_divide(xp: Any, x: Array, norm: Array) -> Array:
    return x / xp.where(norm > 0, norm, xp.ones_like(norm))
