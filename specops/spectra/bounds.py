"""`spectral_norm_bounds`: an interval that holds the operator norm."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from specops import backend
from specops.geometry import Conv, Dense, Geometry
from specops.spectra.norms import lanczos_norm, matrix_norms, torus_norm
from specops.spectra.prepare import matrix_blocks, prepare
from specops.symbol import certified_symbol

Array = Any


@dataclass(frozen=True)
class NormBounds:
    """``lower ≤ true norm ≤ upper``; with ``Dense(splits=...)`` each is a tuple.

    Attributes
    ----------
    lower, upper : array
        Real, of shape (\\*batch,).
    """

    lower: Array
    upper: Array


def spectral_norm_bounds(w: Array, geometry: Geometry | None = None) -> NormBounds:
    r"""Enclose the operator norm :math:`\sigma_1` of the map that `w` stands for.

    Dense and circular Conv: the computed norm, widened by the rounding of its solver. Zero
    boundary: from below Lanczos on the operator, from above the norm on the torus that
    contains it. ``Conv(None)``: the supremum over every size, between the largest value on a
    grid of frequencies and that value divided by the cosine certificate of the grid.

    Parameters
    ----------
    w : array
        Real or complex.
    geometry : Dense or Conv, optional
        The map; None is ``Dense()`` for a two-dimensional array.

    Returns
    -------
    NormBounds

    Raises
    ------
    GeometryError, UnsupportedGeometryError, UnsupportedArrayError, NonFiniteError
        As `singular_values`.

    Notes
    -----
    The allowance for rounding covers the backward error of the solvers, (rows + columns) units
    in the last place of the norm; it is not an interval-arithmetic proof.

    Examples
    --------
    >>> import numpy as np
    >>> bounds = spectral_norm_bounds(np.ones((1, 1, 3, 3)), Conv(None))
    >>> bool(bounds.lower <= 9.0 <= bounds.upper)
    True
    """
    given = prepare(w, geometry)
    xp = given.xp
    if isinstance(given.geometry, Dense):
        pairs = []
        for block in matrix_blocks(given):
            norm = block.restore(matrix_norms(xp, block.matrices)[..., None])[..., 0]
            slack = _slack(block.matrices.dtype, sum(block.matrices.shape[-2:]))
            pairs.append((norm * (1.0 - slack), norm * (1.0 + slack)))
        if given.geometry.splits is None:
            return NormBounds(*pairs[0])
        return NormBounds(tuple(p[0] for p in pairs), tuple(p[1] for p in pairs))

    assert isinstance(given.geometry, Conv)
    kernel = given.geometry.kernel(given.w)
    sizes = given.geometry.sizes(tuple(given.w.shape))
    symbol, certificate = certified_symbol(sizes, not backend.is_complex(kernel))
    on_grid = torus_norm(xp, kernel, symbol)
    slack = _slack(kernel.dtype, sum(symbol.block_shape) + len(sizes.kernel))
    lower = on_grid
    if sizes.fine is not None and not (sizes.circular and symbol.coarse == sizes.coarse):
        lower = lanczos_norm(xp, kernel, sizes)
        lower = xp.where(lower < on_grid, lower, on_grid)
    return NormBounds(
        given.scale * lower * (1.0 - slack), given.scale * on_grid * ((1.0 + slack) / certificate)
    )


def _slack(dtype: Any, dimension: int) -> float:
    return float(backend.epsilon(dtype)) * dimension
