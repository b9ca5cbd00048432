"""Dense weights of stable rank at most r, block by block of their splits."""

from __future__ import annotations

import math
from typing import Any

from specops import arrays
from specops.geometry import Dense
from specops.maps.prepare import Prepared, matrix_blocks
from specops.projections.feasible_rank import (
    energy,
    rank_limit,
    rank_tolerance,
    refuse_unread,
    store_below,
)
from specops.projections.info import StableRankInfo
from specops.projections.matrices.cone import leading_vectors, matrix_candidates
from specops.typing import Array, State


def project_matrices(
    given: Prepared,
    w: Array,
    ratio: Any,
    target: Any,
    preserve: int,
    state: State,
) -> tuple[Array, StableRankInfo]:
    """(the weight of stable rank at most r, what happened)."""
    geometry = given.geometry
    assert isinstance(geometry, Dense)
    xp, blocks = given.xp, matrix_blocks(given)
    names = ["v"] if geometry.splits is None else [f"v{i}" for i in range(len(blocks))]
    kept, new_state = geometry.blocks(w), {}
    matrices, parts, rounds = [], [], 0
    for name, block, old in zip(names, blocks, kept, strict=True):
        a = block.matrices
        side = min(a.shape[-2:])
        limit = rank_limit(xp, ratio, target, side, a)
        v, basis = leading_vectors(
            xp, arrays.stop_gradient(a), min(max(preserve, 1), side), state.pop(name, None)
        )
        if basis is not None:
            new_state[name] = basis
        candidates, rank, count = matrix_candidates(xp, block, v, limit, preserve)
        tolerance = rank_tolerance(w.dtype, a.dtype)
        above = rank > limit * (1.0 + tolerance)
        after, distance, new = rank, xp.zeros_like(rank), old
        if arrays.truth(xp.any(above)) is not False:
            stored, stored_rank, taken = store_below(xp, candidates, w.dtype, limit, above)
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
    refuse_unread(state)
    before, after, distances, counts = zip(*parts, strict=True)
    several = geometry.splits is not None

    def joined(parts: Any) -> Array:
        return xp.stack(parts, axis=-1) if several else parts[0]

    info = StableRankInfo(
        joined(before),
        joined(after),
        joined(distances),
        joined(counts) if preserve else 0,
        rounds,
        new_state,
    )
    if rounds == 0:
        return w, info
    return geometry.assemble(tuple(matrices), tuple(w.shape)), info
