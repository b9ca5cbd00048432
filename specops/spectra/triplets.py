"""`top_singular_triplets`: the largest singular values with their vectors."""

from __future__ import annotations

from typing import Any

import numpy as np

from specops import arrays
from specops.arrays.solvers import svd
from specops.errors import UnsupportedGeometryError
from specops.geometry import Conv, Dense, Geometry
from specops.geometry.arguments import integer
from specops.linalg.deflation import triplets_by_deflation
from specops.linalg.lobpcg import leading_triplets
from specops.maps.convolution import ConvOperator
from specops.maps.operator import LinearOperator, linear_operator
from specops.maps.prepare import Prepared, matrix_blocks, prepare
from specops.maps.symbol import symbol_of
from specops.spectra.norms import plane_wave
from specops.spectra.start import checked_start
from specops.spectra.torus_triplets import torus_triplets
from specops.typing import Array, Namespace

_DECOMPOSED_UP_TO = 2**20
"""A convolution's matrix of at most so many entries is decomposed, so that its triplets are exact:
8 MiB in double precision. A choice; beyond it they are found by iteration."""
_ROUNDS = {False: 1000, True: 24}
"""Most rounds of the iteration: a choice. When a compiler or vmap traces it (True), it runs all of
them, and compile time grows with their number."""


@arrays.entry
def top_singular_triplets(
    w: Array, k: int, geometry: Geometry | None = None, *, start: Array | None = None
) -> tuple[Array, Array, Array]:
    r"""The `k` largest singular values with their left and right singular vectors.

    Parameters
    ----------
    w : array
        Real or complex; half precision computes in float32.
    k : int
        How many, at most min(outputs, inputs).
    geometry : Dense or Conv, optional
        The map; None is ``Dense()`` for a two-dimensional array. No ``splits``.
    start : array, shape (inputs, p), optional
        p ≥ k vectors to start from, such as the `v` of a similar weight: then the
        triplets are iterated from there instead of computed from scratch. Of any library. No
        ``batch_axes``.

    Returns
    -------
    u, s, v : arrays of shape (\*batch, outputs, k), (\*batch, k), (\*batch, inputs, k)
        ``A v[..., i] = s[..., i] u[..., i]``; vectors as in `linear_operator`. Signs (phases)
        are arbitrary, and so are directions within a space of equal values.

    Raises
    ------
    ValueError
        `k` is out of range, or `start` of the wrong shape, or complex for a real weight.
    GeometryError, UnsupportedGeometryError, UnsupportedArrayError, NonFiniteError
        As in `singular_values`; splits.

    Notes
    -----
    Matrices, circular convolutions (by the blocks of their symbol, where the stride divides the
    grid) and other operators of up to 2^20 entries are decomposed. Of larger ones the triplets are
    found one after another by Lanczos, to residuals of √ε/10, in single precision 1e-6: values are
    then lower bounds, accurate to about ε·σ₁, those below √ε·σ₁ may come out as zero, and the last
    of a cluster that `k` cuts through may be missed for a neighbour as large; derivatives hold
    their vectors constant. From a `start`, under compilers and vmap, all are iterated together,
    traced ones in 24 rounds without a test of convergence; so are large circular convolutions then.

    Examples
    --------
    >>> import numpy as np
    >>> u, s, v = top_singular_triplets(np.diag([1.0, 3.0, 2.0]), 2)
    >>> s
    array([3., 2.])
    """
    given = prepare(w, geometry)
    xp = given.xp
    k = integer(k, "k", least=1)
    traced = arrays.is_traced(given.w)
    if isinstance(given.geometry, Dense):
        if given.geometry.splits is not None:
            raise UnsupportedGeometryError("splits: ask for the triplets of each block in turn")
        (block,) = matrix_blocks(given)
        _check_count(k, block.matrices.shape[-2:])
        if start is not None and block.matrices.ndim > 2:
            raise ValueError("start needs a single matrix, not a stack")
        if start is None:
            u, s, vh = svd(xp, block.matrices)
            v = arrays.adjoint(xp, vh)
            return u[..., :k], block.restore(s[..., :k]), v[..., :k]
        operator = linear_operator(block.matrices)
        start = _widened(xp, start, k, operator, block.matrices)
        u, s, v = _iterated(xp, operator, start, k, traced)
        return u, block.restore(s), v
    assert isinstance(given.geometry, Conv)
    operator = linear_operator(given.w, given.geometry)
    _check_count(k, operator.shape)
    if start is None and (found := _by_blocks(given, k)) is not None:
        u, s, v = found
        return u, given.scale * s, v
    if start is None and operator.shape[0] * operator.shape[1] <= _DECOMPOSED_UP_TO:
        u, s, vh = svd(xp, operator.to_matrix())
        return u[:, :k], given.scale * s[:k], arrays.adjoint(xp, vh)[:, :k]
    if start is None and not traced:
        u, s, v = _one_by_one(given, given.geometry, k)
        if not arrays.is_concrete(given.w):
            # To differentiate the rounds of an iteration would keep all of them.
            products = arrays.conjugate(xp, u) * operator.matmat(v)
            s = arrays.real_part(xp, xp.sum(products, axis=0))
        return u, given.scale * s, v
    if start is None:
        start = arrays.constant(_noise(operator.shape[1], min(k + 4, *operator.shape)), given.w)
    start = _widened(xp, start, k, operator, given.w)
    u, s, v = _iterated(xp, operator, start, k, traced)
    return u, given.scale * s, v


def _by_blocks(given: Prepared, k: int) -> tuple[Array, Array, Array] | None:
    """The triplets of a circular convolution, by its symbol; None for others, and when traced."""
    xp, geometry = given.xp, given.geometry
    assert isinstance(geometry, Conv)
    shape = tuple(given.w.shape)
    if not geometry.has_exact_spectrum(shape) or arrays.is_traced(given.w):
        return None
    sizes, kernel = geometry.sizes(shape), geometry.kernel(given.w)
    assert sizes.fine is not None
    symbol = symbol_of(sizes, sizes.fine, not arrays.is_complex(kernel))
    if k > min(sizes.matrix_shape()) - symbol.zero_values:
        return None
    return _as_it_acts(xp, geometry, *torus_triplets(xp, kernel, symbol, k))


def _one_by_one(given: Prepared, geometry: Conv, k: int) -> tuple[Array, Array, Array]:
    """The triplets of a convolution, found one after another by Lanczos."""
    xp, sizes = given.xp, geometry.sizes(tuple(given.w.shape))
    kernel = geometry.kernel(arrays.stop_gradient(given.w))
    operator = ConvOperator(kernel, sizes)
    start = operator.rmatvec(plane_wave(xp, kernel, sizes))[:, None]
    if k > 1:
        noise = arrays.constant(_noise(operator.shape[1], k - 1), given.w)
        start = xp.concat([start, xp.astype(noise, start.dtype)], axis=1)
    return _as_it_acts(xp, geometry, *triplets_by_deflation(xp, operator, start, k))


def _as_it_acts(
    xp: Namespace, geometry: Conv, u: Array, s: Array, v: Array
) -> tuple[Array, Array, Array]:
    """Turn triplets of the kernel's operator into those of the layer."""
    if geometry.transposed:
        # It acts by the transpose of the convolution, not by its adjoint.
        return arrays.conjugate(xp, v), s, arrays.conjugate(xp, u)
    return u, s, v


def _noise(length: int, count: int) -> np.ndarray:
    return arrays.start_vector("triplets", length * count).reshape(length, count)


def _iterated(
    xp: Namespace, operator: LinearOperator, start: Array, k: int, traced: bool
) -> tuple[Array, Array, Array]:
    u, s, v, _ = leading_triplets(xp, operator, start, k, iterations=_ROUNDS[traced])
    return u, s, v


def _widened(xp: Namespace, start: Array, k: int, operator: LinearOperator, like: Array) -> Array:
    """The start in the weight's dtype, with two fixed random columns if there is room.

    Without them, a start at an exact singular vector that does not lead would stay there.
    """
    columns = operator.shape[1]
    start = checked_start(xp, start, columns, k, like)
    extra = min(2, min(operator.shape) - start.shape[1])
    if extra < 1:
        return start[:, : min(start.shape[1], *operator.shape)]
    noise = arrays.start_vector("widened", columns * extra).reshape(columns, extra)
    return xp.concat([start, xp.astype(arrays.constant(noise, start), like.dtype)], axis=1)


def _check_count(k: int, shape: Any) -> None:
    if k > min(shape):
        raise ValueError(f"k={k} is more than the {min(shape)} singular values of the map")
