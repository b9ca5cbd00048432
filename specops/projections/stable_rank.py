"""`project_stable_rank`: the nearest weight whose stable rank is at most a given value."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from specops import arrays
from specops.errors import StateError, UnsupportedGeometryError
from specops.geometry import Conv, Dense, Geometry
from specops.geometry.arguments import integer, nan_without, number_where
from specops.maps.prepare import Prepared, matrix_blocks, prepare
from specops.maps.unread import with_unread
from specops.projections.kernel_axis import leading_axis
from specops.projections.kernel_cone import kernel_family
from specops.projections.matrix_cone import leading_vectors, matrix_family
from specops.projections.shrink import StableRankInfo, energy, rank_tolerance, shape_of, store_below
from specops.typing import Array

_AXES = 10
_SLACK = 1e-3
"""Relative room below r at which a kernel is not moved along its new direction any more."""


@arrays.in_full_precision
def project_stable_rank(
    w: Array,
    geometry: Geometry | None = None,
    *,
    ratio: Any = None,
    target: Any = None,
    preserve: int = 0,
    state: dict[str, Array] | None = None,
    return_info: bool = False,
) -> Any:
    r"""The nearest weight like `w` whose stable rank is at most r.

    The stable rank is :math:`\|A\|_F^2/\|A\|_2^2`, at least 1 and at most the rank. With the
    leading part :math:`S_1` (one singular triplet, or those to `preserve`) and the rest
    :math:`S_2` the result is :math:`\gamma_1 S_1 + \gamma_2 S_2`. For ``preserve=0`` the two
    factors move the pair of norms :math:`(a, b)` of the parts to the nearest point of the cone
    :math:`b \le \sqrt{r-1}\,a`; otherwise :math:`\gamma_1 = 1` and only the rest shrinks.

    Parameters
    ----------
    w : array
        Real or complex; half precision is computed in float32 and rounded at the end.
    geometry : Dense or Conv, optional
        The map; None is ``Dense()`` for a two-dimensional array.
    ratio : float, optional
        In (0, 1]: r = max(1, ratio · min(rows, columns)) of the map's matrix; for a Conv that
        of the whole operator, all channels and positions, all groups.
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
        As `specops.spectral_norm`.

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
    nearest *in the cone of its axis*; it is *not* guaranteed to be nearest over all axes. A
    cone has a least stable rank, n²/‖E‖² on an n×n torus; while a compiler traces, a target
    below it gives a kernel where it is least. Nearness is that of the kernels.

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
    given = prepare(w, geometry)
    if isinstance(given.geometry, Conv):
        result, info = _project_conv(given, given.geometry, w, ratio, target, preserve, state)
    else:
        result, info = _project_dense(given, given.geometry, w, ratio, target, preserve, state)
    result = nan_without(target if ratio is None else ratio, result)
    return (result, info) if return_info else result


def check_stable_rank(ratio: Any, target: Any) -> tuple[Any, Any]:
    """Both as given. Raise unless exactly one is, and in range; traced ones as `check_bound`."""
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
            f"ratio must be in (0, 1], got {ratio!r}: it is a share of min(rows, columns) of the "
            f"map, and stable ranks lie in [1, min(rows, columns)]"
        )
    return found, None


def _limit(xp: Any, ratio: Any, target: Any, side: int, like: Array) -> Array:
    """r as a 0-d array."""
    value = target if ratio is None else ratio
    if arrays.is_array(value):
        value = xp.astype(value, arrays.real_dtype(xp, like.dtype))
    else:
        value = arrays.constant(np.asarray(float(value)), like)
    if ratio is not None:
        value = value * side
    return xp.where(value < 1.0, xp.ones_like(value), value)


def _project_dense(
    given: Prepared,
    geometry: Dense,
    w: Array,
    ratio: Any,
    target: Any,
    preserve: int,
    state: dict[str, Array] | None,
) -> tuple[Array, StableRankInfo]:
    xp, blocks = given.xp, matrix_blocks(given)
    names = ["v"] if geometry.splits is None else [f"v{i}" for i in range(len(blocks))]
    state = dict(state or {})
    kept, new_state = geometry.blocks(w), {}
    matrices, parts, rounds = [], [], 0
    for name, block, old in zip(names, blocks, kept, strict=True):
        a = block.matrices
        side = min(a.shape[-2:])
        limit = _limit(xp, ratio, target, side, a)
        v, basis = leading_vectors(xp, a, min(max(preserve, 1), side), state.pop(name, None))
        if basis is not None:
            new_state[name] = basis
        family, rank, count = matrix_family(xp, block, v, limit, preserve)
        tolerance = rank_tolerance(w.dtype, a.dtype)
        above = rank > limit * (1.0 + tolerance)
        after, distance, new = rank, xp.zeros_like(rank), old
        if arrays.truth(xp.any(above)) is not False:
            stored, stored_rank, taken = store_below(xp, family, w.dtype, limit, above)
            rounds = max(rounds, taken)
            new = xp.where(above[..., None, None], stored, old)
            after = xp.where(above, stored_rank, rank)
            change = arrays.to_compute(xp, stored) / block.scale - a
            distance = xp.sqrt(energy(xp, change)) * block.scale[..., 0, 0]
            distance = xp.where(above, distance, xp.zeros_like(distance))
        matrices.append(new)
        good = block.finite
        nan = xp.full_like(rank, math.nan)
        parts.append((xp.where(good, rank, nan), xp.where(good, after, nan), distance, count))
    _refuse(state)
    before, after, distances, counts = zip(*parts, strict=True)
    several = geometry.splits is not None

    def together(arrays: Any) -> Array:
        return xp.stack(arrays, axis=-1) if several else arrays[0]

    info = StableRankInfo(
        together(before),
        together(after),
        together(distances),
        together(counts) if preserve else 0,
        rounds,
        new_state,
    )
    if rounds == 0:
        return w, info
    return geometry.assemble(tuple(matrices), tuple(w.shape)), info


def _project_conv(
    given: Prepared,
    geometry: Conv,
    w: Array,
    ratio: Any,
    target: Any,
    preserve: int,
    state: dict[str, Array] | None,
) -> tuple[Array, StableRankInfo]:
    if preserve:
        raise UnsupportedGeometryError(
            "preserve must be 0 for a Conv: keeping singular triplets and shrinking the rest "
            "gives an operator that is no convolution with a kernel of this support"
        )
    xp, sizes = given.xp, geometry.sizes(tuple(w.shape))
    if sizes.fine is None:
        raise UnsupportedGeometryError(
            "Conv(input_shape=None) has no single stable rank: name the input_shape"
        )
    state = dict(state or {})
    limit = _limit(xp, ratio, target, min(sizes.matrix_shape()), given.w)
    tolerance = rank_tolerance(w.dtype, given.w.dtype)
    axis, v = leading_axis(xp, geometry.kernel(given.w), sizes, state.pop("v", None))
    _refuse(state)
    family, rank, least = kernel_family(given, geometry, axis, limit)
    above = rank > limit * (1.0 + tolerance)
    info = StableRankInfo(rank, rank, xp.zeros_like(rank), 0, 0, _state(v))
    if arrays.truth(above) is False:
        return w, info
    if arrays.truth(limit < least * (1.0 - tolerance)):
        asked = f"target={target}" if ratio is None else f"ratio={ratio}, stable rank {limit:.6g},"
        taps = "×".join(map(str, sizes.kernel))
        raise ValueError(
            f"{asked} is below {float(least):.6g}, the least stable rank of a {taps} kernel along "
            f"its leading direction: feasible are {float(least):.6g} to "
            f"{min(sizes.matrix_shape())}"
        )
    info.iterations = 1
    while info.iterations < _AXES and not arrays.is_traced(given.w):
        # The result lies in the cone of its own axis too, whose nearest point is nearer yet.
        placed = family.place(family.share)
        axis, v = leading_axis(xp, geometry.kernel(placed / given.scale), sizes, v)
        following, _, _ = kernel_family(given, geometry, axis, limit)
        reached = following.measure(placed)
        if not arrays.truth((reached > 0) & (reached < limit * (1.0 - _SLACK))):
            break
        family = following
        info.iterations += 1
    info.state = _state(v)
    stored, after, _ = store_below(xp, family, w.dtype, limit, above)
    info.rank_after = xp.where(above, after, rank)
    change = arrays.to_compute(xp, stored) / given.scale - given.w
    distance = xp.sqrt(energy(xp, xp.reshape(change, (change.shape[0], -1)))) * given.scale
    info.distance = xp.where(above, distance, xp.zeros_like(distance))
    return with_unread(xp.where(above, stored, w), w, geometry), info


def _state(v: Array | None) -> dict[str, Array]:
    return {} if v is None else {"v": v}


def _refuse(state: dict[str, Array]) -> None:
    if state:
        held = ", ".join(f"{name} {shape_of(value)}" for name, value in state.items())
        raise StateError(f"state does not belong to this weight and options: it holds {held}")
