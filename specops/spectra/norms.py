"""`spectral_norm`: the largest singular value of the map that a weight stands for."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from specops import backend
from specops.errors import UnsupportedGeometryError
from specops.geometry import Conv, ConvSizes, Dense, Geometry
from specops.linalg.lanczos import largest_singular_triplet
from specops.operators import ConvOperator
from specops.spectra.prepare import Prepared, matrix_blocks, prepare
from specops.symbol import Symbol, certified_symbol, symbol_of

Array = Any


def spectral_norm(w: Array, geometry: Geometry | None = None) -> Array | tuple[Array, ...]:
    r"""The operator norm :math:`\|A\|_2 = \sigma_1(A)` of the map that `w` stands for.

    Parameters
    ----------
    w : array
        Real or complex. Half precision is computed, and returned, in float32.
    geometry : Dense or Conv, optional
        The map; None is ``Dense()`` for a two-dimensional array. For the norm of a kernel's
        "reshaped" matrix, which is *not* the norm of the convolution, pass ``Dense()``.

    Returns
    -------
    array, shape (\*batch,)
        Real, of the namespace and device of `w`; exact up to rounding for Dense and circular
        Conv. For a zero boundary Lanczos on the operator itself, converged to a few units in
        the last place, but from below: it is never more than the norm. Traced (jit) it runs
        32 steps without a test of convergence. With ``Dense(splits=...)`` a tuple.

    Raises
    ------
    GeometryError, UnsupportedArrayError, NonFiniteError
        As `singular_values`.
    UnsupportedGeometryError
        A Conv without input size, or a circular stride that does not divide the grid.

    Examples
    --------
    >>> import numpy as np
    >>> float(spectral_norm(np.ones((1, 1, 3, 3)), Conv((8, 8), boundary="circular")))
    9.0
    >>> float(spectral_norm(np.ones((1, 1, 3, 3)), Dense()))
    3.0
    """
    given = prepare(w, geometry)
    if isinstance(given.geometry, Dense):
        norms = tuple(
            block.restore(backend.svdvals(given.xp, block.matrices)[..., :1])[..., 0]
            for block in matrix_blocks(given)
        )
        return norms if given.geometry.splits is not None else norms[0]
    return conv_norm(given, given.geometry)


def conv_norm(given: Prepared, geometry: Conv) -> Array:
    xp, sizes = given.xp, geometry.sizes(given.w.shape)
    if sizes.fine is None:
        raise UnsupportedGeometryError(
            "Conv(input_shape=None) has no single norm but a supremum over all sizes: name the "
            "input_shape, or ask for spectral_norm_bounds"
        )
    kernel = geometry.kernel(given.w)
    if sizes.circular:
        return given.scale * torus_norm(xp, kernel, sizes)
    return given.scale * lanczos_norm(xp, ConvOperator(kernel, sizes))


def lanczos_norm(xp: Any, operator: ConvOperator) -> Array:
    """‖A‖ from below, converged, started near the maximising plane wave."""
    _, sigma, _ = largest_singular_triplet(
        xp,
        ConvOperator,
        operator.kernel,
        operator.sizes,
        operator.rmatvec(_plane_wave(xp, operator.kernel, operator.sizes)),
    )
    return sigma


def torus_norm(xp: Any, kernel: Array, sizes: ConvSizes) -> Array:
    """σ₁ of the circular convolution on the enclosing torus: a bound for a zero boundary.

    A zero-padded operator is a submatrix of the circular one on `sizes.enclosing_torus()`.
    """
    symbol = symbol_of(sizes, sizes.enclosing_torus(), not backend.is_complex(kernel))
    return xp.max(norms_by_frequency(xp, kernel, symbol))


def norms_by_frequency(xp: Any, kernel: Array, symbol: Symbol) -> Array:
    """σ₁ of every block, (frequencies, groups)."""
    blocks = symbol.blocks(xp, symbol.coefficients(xp, kernel))
    return backend.svdvals(xp, blocks)[..., 0]


def _plane_wave(xp: Any, kernel: Array, sizes: ConvSizes) -> Array:
    """An output near the leading left singular vector of a zero-padded convolution.

    The leading left singular vector of the maximising block, as a plane wave under a sine
    window, plus a little of every direction so that no symmetry can hide the true maximum.
    """
    assert sizes.coarse is not None
    symbol, _ = certified_symbol(sizes, not backend.is_complex(kernel))
    u, s, _ = backend.svd(xp, symbol.blocks(xp, symbol.coefficients(xp, kernel)))
    flat = backend.argmax(xp, s[..., 0])
    u = xp.reshape(u[..., 0], (-1, sizes.rows))
    channels = xp.take(u, flat, axis=0)[0, :]

    grid = np.indices(sizes.coarse).reshape(len(sizes.coarse), -1)
    frequency, group = flat // sizes.groups, flat % sizes.groups
    periods = np.array(symbol.coarse)
    turns = symbol.frequencies / periods
    table = backend.constant(turns, kernel)
    turn = xp.take(table, frequency, axis=0)[0, :]
    angle = 2.0 * math.pi * (turn @ backend.constant(grid.astype(float), kernel))
    window = np.prod(np.sin(np.pi * (grid + 1) / (np.array(sizes.coarse)[:, None] + 1)), axis=0)
    cos = xp.cos(angle) * backend.constant(window, kernel)
    sin = xp.sin(angle) * backend.constant(window, kernel)
    wave = xp.real(channels)[:, None] * cos - xp.imag(channels)[:, None] * sin
    one_hot = backend.constant(np.eye(sizes.groups), kernel)
    chosen = xp.take(one_hot, group, axis=0)[0, :]
    wave = xp.reshape(chosen[:, None, None] * wave, (-1,))
    noise = backend.constant(backend.start_vector("lanczos", wave.shape[0]), kernel)
    wave = wave + 0.01 * xp.linalg.vector_norm(wave) * noise
    return xp.astype(wave, kernel.dtype) if backend.is_complex(kernel) else wave
