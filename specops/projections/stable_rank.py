"""`project_stable_rank`: the nearest weight whose stable rank is at most a given value."""

from __future__ import annotations

import math
from typing import Any, Literal, overload

from specops import arrays
from specops.geometry import Conv, Geometry
from specops.geometry.arguments import integer, nan_without, number_where
from specops.maps.prepare import prepare
from specops.projections.info import StableRankInfo, given_state
from specops.projections.kernels.stable_rank import project_kernel
from specops.projections.matrices.stable_rank import project_matrices
from specops.typing import Array, State


@overload
def project_stable_rank(
    w: Array,
    geometry: Geometry | None = None,
    *,
    ratio: float | Array | None = None,
    target: float | Array | None = None,
    preserve: int = 0,
    state: State | None = None,
    return_info: Literal[False] = False,
) -> Array: ...


@overload
def project_stable_rank(
    w: Array,
    geometry: Geometry | None = None,
    *,
    ratio: float | Array | None = None,
    target: float | Array | None = None,
    preserve: int = 0,
    state: State | None = None,
    return_info: Literal[True],
) -> tuple[Array, StableRankInfo]: ...


@arrays.entry
def project_stable_rank(
    w: Array,
    geometry: Geometry | None = None,
    *,
    ratio: float | Array | None = None,
    target: float | Array | None = None,
    preserve: int = 0,
    state: State | None = None,
    return_info: bool = False,
) -> Array | tuple[Array, StableRankInfo]:
    r"""The nearest weight like `w` whose stable rank is at most r.

    The stable rank is :math:`\|A\|_F^2/\|A\|_2^2`, at least 1 and at most the rank. With the
    leading part :math:`S_1` (one singular triplet, or those to `preserve`) and the rest
    :math:`S_2` the result is :math:`\gamma_1 S_1 + \gamma_2 S_2`. For ``preserve=0`` the two
    factors move the pair of norms :math:`(a, b)` of the parts to the nearest point of the cone
    :math:`b \le \sqrt{r-1}\,a`; otherwise :math:`\gamma_1 = 1` and only the rest is scaled.

    Parameters
    ----------
    w : array
        Real or complex; half precision is computed in float32 and rounded at the end.
    geometry : Dense or Conv, optional
        The map; None is ``Dense()`` for a two-dimensional array.
    ratio : float, optional
        In (0, 1]: r = max(1, ratio · min(rows, columns)) of the map's matrix. For a Conv this is
        the matrix of the whole operator (all channels, positions and groups), and r is at least
        the least stable rank of a kernel along its leading direction (Notes) instead of 1.
    target : float, optional
        r itself, finite and at least 1. Exactly one of the two is given; each may also be a
        0-d array of the caller's namespace, which a compiler may trace.
    preserve : int
        Leading singular triplets to keep exactly, as many of them as fit under r (at least
        one does). 0 keeps none, and is nearer. Dense only.
    state : dict, optional
        ``info.state`` of an earlier call on a similar weight, whose vectors this one then
        starts from.
    return_info : bool
        Also return a `StableRankInfo`.

    Returns
    -------
    array, or (array, StableRankInfo)
        Of the shape, dtype, namespace and device of `w`: `w` itself if it is inside already.
        The stable rank, measured as stored, is at most r up to rounding: a few units in the
        last place of the compute dtype, and the square of that of a half precision dtype,
        which cannot represent what is nearer to 1. Zero matrices stay zero. In a stack
        (``batch_axes``) and with ``splits`` every matrix is its own; one that holds NaN or
        infinity is left as it was, with a warning.

    Raises
    ------
    ValueError
        `ratio`, `target` or `preserve` out of range; for a Conv a target below the least stable
        rank of a kernel along its leading direction.
    StateError
        A `state` of another shape.
    UnsupportedGeometryError
        A Conv without input size, or with ``preserve`` above 0.
    GeometryError, UnsupportedArrayError, NonFiniteError
        As in `specops.spectral_norm`.

    Notes
    -----
    Dense: the nearest point, up to how far the leading vectors have converged; where
    :math:`\sigma_1 = \sigma_2` one of several. Large matrices are iterated by Lanczos, or for
    ``preserve`` above 1 by blocks, instead of decomposed.

    Conv: a kernel, so the exact factors do not apply. With the unit vectors u, v of the
    operator's leading pair, :math:`\langle X, E\rangle = \mathrm{Re}\,u^H A(X) v` never
    exceeds the norm of X, and the nearest kernel of the convex cone
    :math:`\|A(X)\|_F^2 \le r\langle X, E\rangle^2` is found. Where this leaves room below r,
    it is found again for the pair that leads in the result, which never takes it further away,
    up to 10 times (once while a compiler traces). So the result is proven to be feasible, and
    nearest *in the cone of its direction*; it is *not* guaranteed to be nearest over all of them. A
    cone has a least stable rank, n²/‖E‖² on an n×n torus; a ratio that asks for less gives a
    kernel where it is least, and while a compiler traces a target does, too. The leading direction
    of that kernel may be another, along which less is possible: a second call then moves it again,
    by a third and more, and later ones by ever less. Nearness is that of the kernels.

    References
    ----------
    Sanyal, Torr & Dokania 2020, Theorem 1 and Algorithm 1.

    Examples
    --------
    >>> import numpy as np
    >>> project_stable_rank(np.eye(3), target=2.0, preserve=1).round(4)
    array([[1.    , 0.    , 0.    ],
           [0.    , 0.7071, 0.    ],
           [0.    , 0.    , 0.7071]])
    """
    ratio, target = check_stable_rank(ratio, target)
    preserve = integer(preserve, "preserve", least=0)
    start = given_state(state)
    given = prepare(w, geometry)
    if isinstance(given.geometry, Conv):
        result, info = project_kernel(given, w, ratio, target, preserve, start)
    else:
        result, info = project_matrices(given, w, ratio, target, preserve, start)
    result = nan_without(target if ratio is None else ratio, result)
    return (result, info) if return_info else result


def check_stable_rank(ratio: Any, target: Any) -> tuple[Any, Any]:
    """Both as given; raise unless exactly one is, and in range. Traced ones as in `check_bound`."""
    if (ratio is None) == (target is None):
        raise ValueError(
            f"give exactly one of ratio and target, got ratio={ratio!r} and target={target!r}"
        )
    if ratio is None:
        found = number_where(target, lambda x: (x >= 1) & (x < math.inf))
        if found is None:
            raise ValueError(
                f"target must be a finite number of at least 1, got {target!r}: stable ranks lie "
                f"in [1, min(rows, columns)] of the map"
            )
        return None, found
    found = number_where(ratio, lambda x: (x > 0) & (x <= 1))
    if found is None:
        raise ValueError(
            f"ratio must be in (0, 1], got {ratio!r}: it is a fraction of min(rows, columns) of "
            f"the map, and stable ranks lie in [1, min(rows, columns)]"
        )
    return found, None
