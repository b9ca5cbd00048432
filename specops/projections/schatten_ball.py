"""`project_schatten_ball`: the nearest weight whose nuclear or Frobenius norm is bounded."""

from __future__ import annotations

import math

from specops import arrays
from specops.arrays.solvers import svdvals
from specops.errors import UnsupportedGeometryError
from specops.geometry import Conv, Geometry
from specops.geometry.arguments import check_bound
from specops.linalg.spectral_function import spectral_function
from specops.linalg.value_functions import above_for_sum
from specops.maps.prepare import MatrixBlock, prepare
from specops.projections.feasible import store_within
from specops.projections.of_values import changed_blocks
from specops.projections.spectral_ball import project_spectral_ball
from specops.typing import Array


@arrays.entry
def project_schatten_ball(
    w: Array, radius: float, geometry: Geometry | None = None, *, p: float
) -> Array:
    r"""The nearest weight with :math:`(\sum_i\sigma_i^p)^{1/p}` at most `radius`.

    p = 1 bounds the nuclear norm, by subtracting one threshold from all singular values and
    dropping those that turn negative: what convex rank reduction uses. p = 2 bounds the
    Frobenius norm, by scaling. p = ∞ is `project_spectral_ball`.

    Parameters
    ----------
    w : array
        Real or complex; half precision is computed in float32 and rounded at the end.
    radius : float
        Positive.
    geometry : Dense, optional
        The map; None is ``Dense()`` for a two-dimensional array. For p = ∞ a Conv as well.
    p : float
        1, 2 or infinity.

    Returns
    -------
    array
        Of the shape, dtype, namespace and device of `w`; `w` itself if it is inside. Its norm
        as stored is at most `radius` up to rounding.

    Raises
    ------
    ValueError
        `radius` is not positive and finite, or another `p`.
    UnsupportedGeometryError
        A Conv with p = 1 or 2: these norms sum over the grid.
    GeometryError, UnsupportedArrayError, NonFiniteError
        As in `specops.singular_values`.

    References
    ----------
    Duchi, Shalev-Shwartz, Singer & Chandra 2008 (the threshold).

    Examples
    --------
    >>> import numpy as np
    >>> project_schatten_ball(np.diag([3.0, 1.0, 0.5]), 2.5, p=1).diagonal()
    array([2.25, 0.25, 0.  ])
    """
    radius = check_bound(radius, "radius")
    if p == math.inf:
        return project_spectral_ball(w, radius, geometry)
    if p not in (1, 2):
        raise ValueError(f"p must be 1, 2 or infinity, got {p!r}")
    given = prepare(w, geometry)
    if isinstance(given.geometry, Conv):
        raise UnsupportedGeometryError(
            "the nuclear and Frobenius norms of a convolution sum over its grid: pass "
            "geometry=Dense() for the norm of the reshaped kernel"
        )
    xp = given.xp

    def norm(a: Array) -> Array:
        a = arrays.stop_gradient(a)
        if p == 2:
            return xp.linalg.matrix_norm(a)
        return xp.sum(svdvals(xp, a), axis=-1)

    def change(block: MatrixBlock) -> Array | None:
        a, limit = block.matrices, radius / block.scale[..., 0, 0]
        within = norm(a) <= limit
        if arrays.truth(xp.all(within)):
            return None
        target = limit * (1.0 - 4.0 * arrays.epsilon(a.dtype))
        if p == 2:
            squares = xp.sum(xp.abs(a) ** 2, axis=(-2, -1))
            # The root of zero has no derivative.
            factor = target / xp.sqrt(xp.where(within, xp.ones_like(squares), squares))
            nearest = a * xp.astype(factor, a.dtype)[..., None, None]
        else:
            nearest, _ = spectral_function(xp, a, lambda *x: above_for_sum(xp, *x), target)
        nearest = xp.where(within[..., None, None], a, nearest)
        return store_within(
            xp,
            nearest * block.scale,
            w.dtype,
            lambda x: within | (norm(x / block.scale) <= limit),
            limit.ndim,
        )

    return changed_blocks(given, w, change)
