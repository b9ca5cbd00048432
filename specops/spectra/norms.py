"""`spectral_norm`: the largest singular value of the map that a weight stands for."""

from __future__ import annotations

import math

import numpy as np

from specops import arrays
from specops.arrays.solvers import svd, svdvals
from specops.errors import UnsupportedGeometryError
from specops.geometry import Conv, ConvSizes, Dense, Geometry
from specops.linalg.golub_kahan import largest_singular_triplet
from specops.maps.convolution import ConvOperator
from specops.maps.every_size import certified_symbol
from specops.maps.prepare import Prepared, matrix_blocks, prepare
from specops.maps.symbol import Symbol, symbol_of
from specops.spectra.torus import leading_block, leading_vectors, likely_block
from specops.typing import Array, Namespace

SMALL_OPERATOR = 2**16
"""Most entries of a zero-padded operator that is decomposed as a matrix: as many as from which
`linalg.norms` found a few products with a matrix cheaper than its singular values."""


@arrays.entry
def spectral_norm(w: Array, geometry: Geometry | None = None) -> Array | tuple[Array, ...]:
    r"""The operator norm :math:`\|A\|_2 = \sigma_1(A)` of the map that `w` stands for.

    Differentiable in torch and JAX: the gradient is the leading pair of singular vectors,
    :math:`\partial\sigma_1/\partial A = u_1 v_1^H` on the weight's entries, held constant for
    second derivatives. It is finite everywhere; where the largest value is repeated, and at
    zero, it is one of the subgradients.

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
        Conv. For a zero boundary (and a circular stride that does not divide the grid) Lanczos
        on the operator itself, run until it has converged or 1024 steps, under jit too: it is
        never more than the norm. Under torch's compilers and vmap it runs 32 steps without a
        test of convergence. With ``Dense(splits=...)`` a tuple.

    Raises
    ------
    GeometryError, UnsupportedArrayError, NonFiniteError
        As in `singular_values`.
    UnsupportedGeometryError
        A Conv without input size.

    References
    ----------
    Miyato et al. 2018, equation 12 (the gradient).

    Examples
    --------
    >>> import numpy as np
    >>> float(spectral_norm(np.ones((1, 1, 3, 3)), Conv((8, 8), boundary="circular")))
    9.0
    >>> float(spectral_norm(np.ones((1, 1, 3, 3)), Dense()))
    3.0
    """
    given = prepare(w, geometry, once=True)
    if isinstance(given.geometry, Dense):
        norms = tuple(
            block.restore(matrix_norms(given.xp, block.matrices)[..., None])[..., 0]
            for block in matrix_blocks(given)
        )
        return norms if given.geometry.splits is not None else norms[0]
    return given.scale * conv_norm(given, given.geometry)


def matrix_norms(xp: Namespace, matrices: Array) -> Array:
    """σ₁ of stacked matrices, with the derivative u₁v₁ᴴ."""

    def along_leading_pair(a: Array) -> Array:
        u, _, vh = svd(xp, arrays.stop_gradient(a))
        v = arrays.adjoint(xp, vh[..., :1, :])
        product = xp.sum(arrays.conjugate(xp, u[..., :1]) * arrays.matmul(a, v), axis=(-2, -1))
        return arrays.real_part(xp, product)

    return arrays.with_derivative(lambda a: svdvals(xp, a)[..., 0], along_leading_pair, matrices)


def conv_norm(given: Prepared, geometry: Conv) -> Array:
    """σ₁ of a scaled kernel's convolution, with its derivative."""
    xp, sizes = given.xp, geometry.sizes(tuple(given.w.shape))
    if sizes.fine is None:
        raise UnsupportedGeometryError(
            "Conv(input_shape=None) has no single norm but a supremum over all sizes: name the "
            "input_shape, or ask for spectral_norm_bounds"
        )
    kernel = geometry.kernel(given.w)
    if sizes.circular and sizes.stride_divides:
        return torus_norm(xp, kernel, symbol_of(sizes, sizes.fine, not arrays.is_complex(kernel)))
    return lanczos_norm(xp, kernel, sizes)


def torus_norm(xp: Namespace, kernel: Array, symbol: Symbol) -> Array:
    """σ₁ on the symbol's torus; ∂σ₁/∂K[o, i, a] = Re(conj(u_o)·v_i·exp(iθ·b(a)))."""

    def along_leading_pair(kernel: Array) -> Array:
        fixed = arrays.stop_gradient(kernel)
        leading = leading_block(xp, fixed, symbol)
        u, vh, cos, sin = leading_vectors(xp, fixed, symbol, leading)
        own = xp.reshape(
            symbol.coefficients(xp, kernel),
            (cos.shape[0], symbol.sizes.groups, *symbol.block_shape),
        )
        own = xp.take(own, leading.group, axis=1)[:, 0, ...]
        outer = arrays.conjugate(xp, u[:, None] * vh[None, :])
        phases = arrays.complex_of(xp, cos, sin)[:, None, None]
        if arrays.is_complex(own):
            return arrays.real_part(xp, xp.sum(own * (outer * phases)))
        return xp.sum(own * arrays.real_part(xp, outer * phases))

    return arrays.with_derivative(
        lambda k: leading_block(xp, k, symbol).norm, along_leading_pair, kernel
    )


def lanczos_norm(xp: Namespace, kernel: Array, sizes: ConvSizes) -> Array:
    """σ₁ by Lanczos until it converges from below; the derivative holds its vectors constant.

    Small operators, whose explicit matrix costs no more, are decomposed instead.
    """

    def triplet(kernel: Array) -> tuple[Array, Array, Array]:
        operator = ConvOperator(kernel, sizes)
        if math.prod(operator.shape) <= SMALL_OPERATOR:
            u, s, vh = svd(xp, operator.to_matrix())
            return u[:, 0], s[0], arrays.conjugate(xp, vh[0, :])
        start = operator.rmatvec(plane_wave(xp, kernel, sizes))
        return largest_singular_triplet(xp, operator, start)

    def along_leading_pair(kernel: Array) -> Array:
        u, _, v = triplet(arrays.stop_gradient(kernel))
        image = ConvOperator(kernel, sizes).matvec(v)
        return arrays.real_part(xp, xp.sum(arrays.conjugate(xp, u) * image))

    return arrays.with_derivative(lambda k: triplet(k)[1], along_leading_pair, kernel)


def plane_wave(xp: Namespace, kernel: Array, sizes: ConvSizes) -> Array:
    """An approximation of the leading left singular vector of a convolution.

    The leading left singular vector of the maximising block, as a plane wave under a sine
    window, plus noise of the same size in every group, so that no symmetry can hide the maximum.
    Noise that points against the wave is turned: of a single output, the two would cancel.
    """
    assert sizes.coarse is not None
    symbol, _ = certified_symbol(sizes, not arrays.is_complex(kernel))
    leading = likely_block(xp, kernel, symbol)
    channels = leading_vectors(xp, kernel, symbol, leading)[0]
    # Where the symbol has stride 1 instead of s, the outputs are s points apart on its grid.
    apart = np.array(sizes.stride) / np.array(symbol.sizes.stride)
    turns = arrays.constant(symbol.frequencies * apart / np.array(symbol.coarse), kernel)
    turn = xp.take(turns, leading.frequency, axis=0)[0, :]
    grid = np.indices(sizes.coarse).reshape(len(sizes.coarse), -1)
    angle = 2.0 * math.pi * (turn @ arrays.constant(grid.astype(float), kernel))
    ends = np.array(sizes.coarse)[:, None] + 1
    window = arrays.constant(np.prod(np.sin(np.pi * (grid + 1) / ends), axis=0), kernel)
    wave = channels[:, None] * arrays.complex_of(xp, xp.cos(angle) * window, xp.sin(angle) * window)
    wave = wave if arrays.is_complex(kernel) else xp.real(wave)
    one_hot = arrays.constant(np.eye(sizes.groups), kernel)
    chosen = xp.take(one_hot, leading.group, axis=0)[0, :]
    wave = xp.reshape(chosen[:, None, None] * wave, (sizes.groups, -1))
    noise = arrays.start_vector("lanczos", math.prod(wave.shape)).reshape(wave.shape)
    noise = arrays.constant(noise / np.linalg.norm(noise, axis=1, keepdims=True), kernel)
    # Only where it clearly does: of many outputs the two are nearly orthogonal, and rounding would
    # decide.
    along = xp.sum(arrays.real_part(xp, wave) * noise, axis=1, keepdims=True)
    opposed = along < -0.5 * xp.linalg.vector_norm(wave, axis=1, keepdims=True)
    noise = xp.where(opposed, -noise, noise)
    # Noise of the length of the windowed plane wave, whose real part alone may be shorter.
    return xp.reshape(wave + xp.linalg.vector_norm(window) * noise, (-1,))
