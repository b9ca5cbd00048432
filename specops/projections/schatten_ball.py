"""`project_schatten_ball`: the nearest weight whose nuclear or Frobenius norm is bounded."""

from __future__ import annotations

import math

import numpy as np

from specops import arrays
from specops.arrays.solvers import svd, svdvals
from specops.errors import UnsupportedGeometryError
from specops.geometry import Conv, Geometry
from specops.geometry.arguments import check_bound
from specops.maps.prepare import MatrixBlock, prepare
from specops.projections.feasible import store_within
from specops.projections.of_values import changed_blocks
from specops.projections.spectral_ball import project_spectral_ball
from specops.typing import Array, Namespace


@arrays.in_full_precision
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
        As `specops.singular_values`.

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
        if p == 2:
            return xp.sqrt(xp.sum(xp.abs(a) ** 2, axis=(-2, -1)))
        return xp.sum(svdvals(xp, a), axis=-1)

    def change(block: MatrixBlock) -> Array | None:
        a, limit = block.matrices, radius / block.scale[..., 0, 0]
        size = norm(a)
        within = size <= limit
        if arrays.truth(xp.all(within)):
            return None
        target = limit * (1.0 - 4.0 * arrays.epsilon(a.dtype))
        if p == 2:
            factor = target / xp.where(within, xp.ones_like(size), size)
            nearest = a * xp.astype(factor, a.dtype)[..., None, None]
        else:
            u, s, vh = svd(xp, a)
            s = s - _threshold(xp, s, target)[..., None]
            s = xp.where(s > 0, s, xp.zeros_like(s))
            nearest = (u * xp.astype(s, u.dtype)[..., None, :]) @ vh
        nearest = xp.where(within[..., None, None], a, nearest)
        return store_within(
            xp,
            nearest * block.scale,
            w.dtype,
            lambda x: within | (norm(x / block.scale) <= limit),
            limit.ndim,
        )

    return changed_blocks(given, w, change)


def _threshold(xp: Namespace, s: Array, radius: Array) -> Array:
    """θ with Σ max(s − θ, 0) = radius, for descending s whose sum is larger."""
    count = arrays.constant(np.arange(1.0, s.shape[-1] + 1.0), s)
    kept = s * count - xp.cumulative_sum(s, axis=-1) > -radius[..., None]
    ones = xp.where(kept, xp.ones_like(s), xp.zeros_like(s))
    return (xp.sum(s * ones, axis=-1) - radius) / xp.sum(ones, axis=-1)
