"""`singular_values`: all of them, exactly, with multiplicity."""

from __future__ import annotations

from collections.abc import Callable

from specops import arrays
from specops.arrays.solvers import svdvals
from specops.errors import UnsupportedGeometryError
from specops.geometry import Conv, Dense, Geometry
from specops.maps.convolution import ConvOperator
from specops.maps.prepare import Prepared, matrix_blocks, prepare
from specops.maps.symbol import symbol_of
from specops.spectra.torus import torus_values
from specops.typing import Array

_LARGEST_EXPLICIT = 2**24
"""Most entries of a zero-padded operator's matrix for which all values are computed: 128 MiB in
double precision, and the time of the SVD of 4096². A choice; norm and bounds need no matrix."""


@arrays.entry
def singular_values(w: Array, geometry: Geometry | None = None) -> Array | tuple[Array, ...]:
    r"""All singular values of the linear map that `w` stands for, in descending order.

    For a circular convolution they are the union over the frequencies of the torus of the
    singular values of its symbol, which costs as many small SVDs instead of one huge one.

    Parameters
    ----------
    w : array
        Real or complex. Half precision is computed, and returned, in float32.
    geometry : Dense or Conv, optional
        The map; None is ``Dense()`` for a two-dimensional array.

    Returns
    -------
    array, shape (\*batch, min(out, in))
        Real, of the namespace and device of `w`, with multiplicity: a Conv has
        ``min(out_channels·∏out_size, in_channels·∏in_size)`` values. With ``Dense(splits=...)``
        a tuple, one entry per block. The matrices of a stack that hold NaN or infinity give
        NaN (with a NonFiniteWarning); the others are not affected.

    Raises
    ------
    GeometryError
        `w` does not fit the geometry.
    UnsupportedGeometryError
        A circular stride that does not divide the grid, a zero-padded operator with more than
        2^24 entries, or a Conv without input size: `spectral_norm` or its bounds remain.
    UnsupportedArrayError
        Integers, sparse, lazy, meta or quantised arrays.
    NonFiniteError
        `w` holds NaN or infinity.

    References
    ----------
    Sedghi, Gupta & Long, "The Singular Values of Convolutional Layers", ICLR 2019, Theorem 6;
    strides and dilations by the polyphase symbol (see `specops.maps.symbol`).

    Examples
    --------
    >>> import numpy as np
    >>> singular_values(np.diag([3.0, 4.0]))
    array([4., 3.])
    """
    return values_changed(w, geometry, lambda values, restore: restore(values))


def values_changed(
    w: Array,
    geometry: Geometry | None,
    function: Callable[[Array, Callable[[Array], Array]], Array],
) -> Array | tuple[Array, ...]:
    """A function of the values of the scaled weight, which neither overflow nor underflow.

    Its second argument undoes the scale, and gives NaN where a matrix of a stack is not finite.
    """
    given = prepare(w, geometry)
    if isinstance(given.geometry, Dense):
        blocks = matrix_blocks(given)
        found = tuple(function(svdvals(given.xp, b.matrices), b.restore) for b in blocks)
        return found if given.geometry.splits is not None else found[0]
    return function(_conv_values(given, given.geometry), lambda values: given.scale * values)


def _conv_values(given: Prepared, geometry: Conv) -> Array:
    xp, sizes = given.xp, geometry.sizes(given.w.shape)
    if sizes.fine is None:
        raise UnsupportedGeometryError(
            "Conv(input_shape=None) stands for every size at once and has no list of singular "
            "values: name the input_shape, or ask for spectral_norm_bounds"
        )
    kernel = geometry.kernel(given.w)
    if sizes.circular:
        symbol = symbol_of(sizes, sizes.fine, not arrays.is_complex(kernel))
        values = torus_values(xp, kernel, symbol)
    else:
        rows, columns = sizes.matrix_shape()
        if rows * columns > _LARGEST_EXPLICIT:
            raise UnsupportedGeometryError(
                f"the zero-padded operator is {rows}×{columns} and has no closed form: its "
                f"full spectrum needs that explicit matrix, which is made up to "
                f"{_LARGEST_EXPLICIT} entries. spectral_norm and spectral_norm_bounds work at "
                f'this size, as does the full spectrum with boundary="circular"'
            )
        values = svdvals(xp, ConvOperator(kernel, sizes).to_matrix())
    return values
