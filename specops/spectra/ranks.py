"""Scale-free summaries of a spectrum."""

from __future__ import annotations

from typing import Any

from specops.geometry import Dense, Geometry
from specops.operators import ConvOperator
from specops.spectra.norms import conv_norm, matrix_norms
from specops.spectra.prepare import matrix_blocks, prepare

Array = Any


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
        As `spectral_norm`. A circular k×k convolution on n×n has at least n²/k².

    Raises
    ------
    GeometryError, UnsupportedGeometryError, UnsupportedArrayError, NonFiniteError
        As `spectral_norm`.

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


def _ratio(xp: Any, squared_frobenius: Array, norm: Array) -> Array:
    positive = norm > 0
    safe = xp.where(positive, norm, xp.ones_like(norm))
    return xp.where(positive, squared_frobenius / safe**2, xp.zeros_like(norm))
