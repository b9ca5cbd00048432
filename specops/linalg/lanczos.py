"""Lanczos tridiagonalisation of a Hermitian operator that is known by its products."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from specops import arrays
from specops.errors import NonFiniteError
from specops.linalg.golub_kahan import INDEPENDENT
from specops.typing import Array, Namespace


@dataclass(frozen=True)
class Ritz:
    """Ritz values of a Krylov space.

    Attributes
    ----------
    values : ndarray (steps,)
        Ascending.
    residuals : ndarray (steps,)
        ‖A q − θ q‖ of each Ritz pair plus an allowance for rounding: A has an eigenvalue at
        most that far from θ.
    weights : ndarray (steps,)
        Squared first components of the Ritz vectors: the weights of Gauss quadrature for `start`.
    """

    values: np.ndarray
    residuals: np.ndarray
    weights: np.ndarray


def random_start(size: int, like: Array, seed: int, probe: int = 0) -> Array:
    """A normal vector, the same on every backend; starts of other probes are independent."""
    rng = np.random.Generator(np.random.Philox(key=[seed, probe]))
    return arrays.constant(rng.standard_normal(size), like, complex=arrays.is_complex(like))


def safe_norm(x: Array) -> Array:
    """‖x‖ of a vector whose squares may leave the range of its dtype."""
    xp = arrays.namespace(x)
    scale = arrays.magnitude(xp, x)
    return xp.linalg.vector_norm(x / scale) * xp.max(scale)


def lanczos(
    product: Callable[[Array], Array],
    start: Array,
    *,
    steps: int,
    settled: Callable[[Ritz], bool] | None = None,
) -> Ritz:
    """Ritz values of A in the Krylov space of `start`, fully reorthogonalised.

    Parameters
    ----------
    product : callable
        x ↦ A x for a Hermitian A.
    start : array (n,)
        The start vector, which must not be zero.
    steps : int
        Largest number of products; n are enough.
    settled : callable, optional
        Takes the `Ritz` values so far and returns whether to stop early.

    Raises
    ------
    NonFiniteError
        A product holds NaN or infinity.
    """
    xp = arrays.namespace(start)
    size = int(start.shape[0])
    eps = arrays.epsilon(start.dtype)
    basis = [start / safe_norm(start)]
    diagonal: list[float] = []
    beside: list[float] = []
    for index in range(min(steps, size)):
        x = arrays.stop_gradient(xp.astype(product(basis[-1]), start.dtype))
        along = float(arrays.real_part(xp, _inner(xp, basis[-1], x)))
        x = _without(xp, x, basis)
        rest = float(safe_norm(x))
        if not np.isfinite(along) or not np.isfinite(rest):
            raise NonFiniteError(
                f"product {index + 1} with the operator holds NaN or infinity: look for an "
                f"overflow, or a function without derivatives where it is differentiated"
            )
        diagonal.append(along)
        beside.append(rest)
        found = _ritz(diagonal, beside, eps)
        # If less than rounding is left, the space is exhausted: the rest is noise.
        exhausted = rest <= 8 * eps * np.abs(found.values).max() or len(diagonal) == size
        if not exhausted:
            # A second pass: after one, components remain that grow into copies of values already
            # found. On the normalised vector: where little was left, most may be rounding.
            x = _without(xp, x / rest, basis)
            left = float(safe_norm(x))
            exhausted = left < INDEPENDENT
        if exhausted:
            return _ritz(diagonal, [*beside[:-1], 0.0], eps)
        if settled is not None and settled(found):
            return found
        basis.append(x / left)
    return found


def _without(xp: Namespace, x: Array, basis: list[Array]) -> Array:
    """`x` less its components along orthonormal vectors."""
    for q in basis:
        x = x - _inner(xp, q, x) * q
    return x


def _inner(xp: Namespace, q: Array, x: Array) -> Array:
    return xp.sum(arrays.conjugate(xp, q) * x)


def _ritz(diagonal: list[float], beside: list[float], eps: float) -> Ritz:
    values, vectors = np.linalg.eigh(
        np.diag(diagonal) + np.diag(beside[:-1], 1) + np.diag(beside[:-1], -1)
    )
    rounding = 8 * eps * np.abs(values).max()
    return Ritz(values, beside[-1] * np.abs(vectors[-1]) + rounding, vectors[0] ** 2)
