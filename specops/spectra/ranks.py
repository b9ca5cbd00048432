"""Scale-free summaries of a spectrum."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from specops import arrays
from specops.geometry import Dense, Geometry
from specops.maps.convolution import ConvOperator
from specops.maps.prepare import matrix_blocks, prepare
from specops.spectra.norms import conv_norm, matrix_norms
from specops.spectra.values import values_changed
from specops.typing import Array, Namespace


@arrays.entry
def stable_rank(w: Array, geometry: Geometry | None = None) -> Array | tuple[Array, ...]:
    r"""The stable rank :math:`\|A\|_F^2/\|A\|_2^2 = \sum_i\sigma_i^2/\sigma_1^2`.

    At least 1, at most the rank, unchanged by scaling, and 0 by convention for the zero map.

    Parameters
    ----------
    w : array
        Real or complex. Half precision is computed, and returned, in float32.
    geometry : Dense or Conv, optional
        The map; None is ``Dense()`` for a two-dimensional array.

    Returns
    -------
    array, shape (\*batch,)
        As in `spectral_norm`. A circular k×k convolution of stride 1 on n×n has at least n²/k².

    Raises
    ------
    GeometryError, UnsupportedGeometryError, UnsupportedArrayError, NonFiniteError
        As in `spectral_norm`.

    References
    ----------
    Sanyal, Torr & Dokania, "Stable Rank Normalization for Improved Generalization in Neural
    Networks and GANs", ICLR 2020.

    Examples
    --------
    >>> import numpy as np
    >>> float(stable_rank(np.diag([2.0, 1.0, 1.0])))
    1.5
    """
    given = prepare(w, geometry)
    xp = given.xp
    if isinstance(given.geometry, Dense):
        ranks = []
        for block in matrix_blocks(given):
            squared = xp.sum(xp.abs(block.matrices) ** 2, axis=(-2, -1))
            rank = _ratio(xp, squared, matrix_norms(xp, block.matrices))
            ranks.append(xp.where(block.finite, rank, xp.full_like(rank, float("nan"))))
        return tuple(ranks) if given.geometry.splits is not None else ranks[0]
    norm = conv_norm(given, given.geometry)
    sizes = given.geometry.sizes(tuple(given.w.shape))
    operator = ConvOperator(given.geometry.kernel(given.w), sizes)
    return _ratio(xp, operator.squared_frobenius(), norm)


def _ratio(xp: Namespace, squared_frobenius: Array, norm: Array) -> Array:
    positive = norm > 0
    safe = xp.where(positive, norm, xp.ones_like(norm))
    return xp.where(positive, squared_frobenius / safe**2, xp.zeros_like(norm))


@arrays.entry
def effective_rank(w: Array, geometry: Geometry | None = None) -> Array | tuple[Array, ...]:
    r"""The exponential of the entropy of the normalised singular values.

    :math:`\exp\bigl(-\sum_i p_i\log p_i\bigr)` with :math:`p_i = \sigma_i/\sum_j\sigma_j`:
    between 1 and the rank, unchanged by scaling, and 0 by convention for the zero map.

    Parameters
    ----------
    w : array
        Real or complex. Half precision is computed, and returned, in float32.
    geometry : Dense or Conv, optional
        The map; None is ``Dense()`` for a two-dimensional array.

    Returns
    -------
    array, shape (\*batch,)
        With ``Dense(splits=...)`` a tuple.

    Raises
    ------
    GeometryError, UnsupportedGeometryError, UnsupportedArrayError, NonFiniteError
        As in `singular_values`, all of which it needs.

    References
    ----------
    Roy & Vetterli, "The effective rank", EUSIPCO 2007.

    Examples
    --------
    >>> import numpy as np
    >>> round(float(effective_rank(np.eye(3))), 6)
    3.0
    """
    return _of_values(w, geometry, _entropy_rank)


@arrays.entry
def condition_number(w: Array, geometry: Geometry | None = None) -> Array | tuple[Array, ...]:
    r"""The ratio :math:`\sigma_1/\sigma_{\min}` of the largest to the smallest singular value.

    Infinity where the smallest is 0, the zero map included.

    Parameters
    ----------
    w : array
        Real or complex. Half precision is computed, and returned, in float32.
    geometry : Dense or Conv, optional
        The map; None is ``Dense()`` for a two-dimensional array.

    Returns
    -------
    array, shape (\*batch,)
        With ``Dense(splits=...)`` a tuple. In single precision smallest values below about
        1e-6 of the largest are rounding.

    Raises
    ------
    GeometryError, UnsupportedGeometryError, UnsupportedArrayError, NonFiniteError
        As in `singular_values`, all of which it needs.

    Examples
    --------
    >>> import numpy as np
    >>> float(condition_number(np.diag([4.0, 2.0])))
    2.0
    """
    return _of_values(w, geometry, _spread)


def _of_values(w: Array, geometry: Geometry | None, function: Any) -> Any:
    xp = arrays.namespace(w)

    def change(values: Array, restore: Any) -> Array:
        bad = xp.isnan(restore(xp.zeros_like(values))[..., 0])
        found = function(xp, values)
        return xp.where(bad, xp.full_like(found, math.nan), found)

    return values_changed(w, geometry, change)


def _entropy_rank(xp: Namespace, values: Array) -> Array:
    total = xp.sum(values, axis=-1, keepdims=True)
    fraction = values / arrays.nonzero(xp, total)
    rank = xp.exp(-xp.sum(fraction * xp.log(arrays.nonzero(xp, fraction)), axis=-1))
    return xp.where(total[..., 0] == 0, xp.zeros_like(rank), rank)


def _spread(xp: Namespace, values: Array) -> Array:
    first, last = values[..., 0], values[..., -1]
    positive = last != 0
    with np.errstate(over="ignore"):
        ratio = first / xp.where(positive, last, xp.ones_like(last))
    return xp.where(positive, ratio, xp.full_like(ratio, float("inf")))
