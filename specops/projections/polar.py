"""`polar_factor`: the nearest matrix with orthonormal columns or rows."""

from __future__ import annotations

import math

from specops import arrays
from specops.errors import UnsupportedGeometryError
from specops.geometry import Conv, Geometry
from specops.linalg.polar_by_products import polar_by_products
from specops.linalg.polar_express import suits_products
from specops.linalg.spectral_function import spectral_function
from specops.maps.prepare import MatrixBlock, prepare
from specops.projections.of_values import changed_blocks
from specops.typing import Array, Namespace

_METHODS = ("auto", "svd", "products")
_ACCEPTED_RESIDUAL = {"float32": 1e-5, "float64": 1e-13}
"""Largest distance from orthonormality, per √n, with which the product method's result is accepted:
84 and 450 units of rounding; up to 15 were measured on normal matrices of 64² to 400 × 800."""


@arrays.entry
def polar_factor(w: Array, geometry: Geometry | None = None, *, method: str = "auto") -> Array:
    r"""The factor :math:`UV^H` of :math:`W = U\Sigma V^H`: all singular values made 1.

    The nearest matrix to W, in every unitarily invariant norm, with orthonormal columns (or
    rows, if they are fewer).

    Parameters
    ----------
    w : array
        Real or complex; half precision is computed in float32 and rounded at the end.
    geometry : Dense, optional
        The map; None is ``Dense()`` for a two-dimensional array.
    method : str
        "svd"; "products", a composition of minimax polynomials that needs matrix products
        only, which is checked and replaced by the SVD where it did not reach orthonormality;
        "auto": products on accelerators, else the SVD.

    Returns
    -------
    array
        Of the shape, dtype, namespace and device of `w`.

    Raises
    ------
    ValueError
        An unknown method.
    UnsupportedGeometryError
        A Conv: its polar factor has a kernel as large as the grid.
    GeometryError, UnsupportedArrayError, NonFiniteError
        As in `specops.singular_values`.

    Notes
    -----
    Not unique where singular values are zero: some directions are chosen, for the zero matrix
    all of them. Where they are small the factor is as sensitive as their reciprocal, and where
    two of a square matrix, or one of another, are zero it has no derivative: a finite one is given.

    References
    ----------
    Higham 2008, "Functions of Matrices", chapter 8; Amsel, Persson, Musco & Gower 2025.

    Examples
    --------
    >>> import numpy as np
    >>> polar_factor(np.array([[0.0, -3.0], [2.0, 0.0]])).round(6)
    array([[ 0., -1.],
           [ 1.,  0.]])
    """
    if method not in _METHODS:
        raise ValueError(f"method must be one of {', '.join(_METHODS)}, got {method!r}")
    given = prepare(w, geometry)
    if isinstance(given.geometry, Conv):
        raise UnsupportedGeometryError(
            "the polar factor of a convolution has a kernel as large as its grid: "
            "clip_singular_values(w, 1, 1, geometry, iterations=...) approaches orthogonality "
            "with the kernel's own support"
        )
    xp = given.xp

    def change(block: MatrixBlock) -> Array:
        factor = _by_products(xp, block.matrices, method)
        if factor is None:
            factor = _by_svd(xp, block.matrices)
        return xp.astype(factor, w.dtype)

    return changed_blocks(given, w, change)


def _by_products(xp: Namespace, a: Array, method: str) -> Array | None:
    """The factor by products; None if another method has to compute it."""
    if not suits_products(a, method):
        return None
    factor, error = polar_by_products(xp, a)
    accepted = _ACCEPTED_RESIDUAL[arrays.dtype_name(arrays.real_dtype(xp, a.dtype))]
    good = xp.all(error <= accepted * math.sqrt(min(a.shape[-2:])))
    if arrays.is_staged(good):
        return arrays.cond(good, lambda: factor, lambda: _by_svd(xp, a))
    return None if arrays.truth(good) is False else factor


def _by_svd(xp: Namespace, a: Array) -> Array:
    return spectral_function(xp, a, lambda s: (xp.ones_like(s), xp.zeros_like(s)))[0]
