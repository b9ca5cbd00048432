"""Kernels of stable rank at most r along the leading directions of their operators."""

from __future__ import annotations

from typing import Any

from specops import arrays
from specops.errors import UnsupportedGeometryError
from specops.geometry import Conv
from specops.maps.prepare import Prepared
from specops.maps.unread import with_unread
from specops.projections.feasible_rank import (
    energy,
    rank_limit,
    rank_tolerance,
    refuse_unread,
    store_below,
)
from specops.projections.info import StableRankInfo
from specops.projections.kernels.cone import kernel_candidates
from specops.projections.kernels.leading_direction import leading_direction
from specops.typing import Array, State

_DIRECTIONS = 10
"""Most directions along which a kernel is moved. Of 40 normal kernels of 4² channels and 3² taps 33
took one or two, none over four."""
_ROOM = 1e-3
"""A kernel is not moved along its new direction if its rank there is at most so far below r,
relatively: `StableRankInfo.rank_after` may be off by as much."""


def project_kernel(
    given: Prepared,
    w: Array,
    ratio: Any,
    target: Any,
    preserve: int,
    state: State,
) -> tuple[Array, StableRankInfo]:
    """(the weight of stable rank at most r, what happened)."""
    geometry = given.geometry
    assert isinstance(geometry, Conv)
    if preserve:
        raise UnsupportedGeometryError(
            "preserve must be 0 for a Conv: keeping singular triplets and scaling the rest "
            "gives an operator that is no convolution with a kernel of this support"
        )
    xp, sizes = given.xp, geometry.sizes(tuple(w.shape))
    if sizes.fine is None:
        raise UnsupportedGeometryError(
            "Conv(input_shape=None) has no single stable rank: name the input_shape"
        )
    limit = rank_limit(xp, ratio, target, min(sizes.matrix_shape()), given.w)
    tolerance = rank_tolerance(w.dtype, given.w.dtype)
    direction, v = leading_direction(xp, geometry.kernel(given.w), sizes, state.pop("v", None))
    refuse_unread(state)
    candidates, rank, least = kernel_candidates(given, geometry, direction, limit)
    if ratio is not None:
        # Raise the limit to the least rank, as to 1 for matrices: one ratio then suits all layers.
        limit = xp.where(limit < least, least, limit)
    above = rank > limit * (1.0 + tolerance)
    info = StableRankInfo(rank, rank, xp.zeros_like(rank), 0, 0, _state(v))
    if arrays.truth(above) is False:
        return w, info
    if arrays.truth(limit < least * (1.0 - tolerance)):
        taps, lowest = "×".join(map(str, sizes.kernel)), arrays.number(least)
        raise ValueError(
            f"target={target} is below {lowest:.6g}, the least stable rank of a {taps} "
            f"kernel along its leading direction: feasible are {lowest:.6g} to "
            f"{min(sizes.matrix_shape())}"
        )
    info.iterations = 1
    while info.iterations < _DIRECTIONS and not arrays.is_traced(given.w):
        # The result also lies in the cone of its own direction, whose nearest point is nearer.
        nearest = candidates.weight(candidates.wanted)
        direction, v = leading_direction(xp, geometry.kernel(nearest / given.scale), sizes, v)
        following, _, _ = kernel_candidates(given, geometry, direction, limit)
        reached = following.rank(nearest)
        if not arrays.truth((reached > 0) & (reached < limit * (1.0 - _ROOM))):
            break
        candidates = following
        info.iterations += 1
    info.state = _state(v)
    stored, after, _ = store_below(xp, candidates, w.dtype, limit, above)
    info.rank_after = xp.where(above, after, rank)
    change = arrays.to_compute(xp, stored) / given.scale - given.w
    distance = xp.sqrt(energy(xp, xp.reshape(change, (change.shape[0], -1)))) * given.scale
    info.distance = xp.where(above, distance, xp.zeros_like(distance))
    return with_unread(xp.where(above, stored, w), w, geometry), info


def _state(v: Array | None) -> State:
    return {} if v is None else {"v": v}
