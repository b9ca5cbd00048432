"""Dense weights of stable rank at most r, block by block of their splits."""

from __future__ import annotations

import math
from typing import Any

from specops import arrays
from specops.geometry import Dense
from specops.maps.prepare import MatrixBlock, Prepared, matrix_blocks
from specops.projections.feasible_rank import (
    energy,
    rank_limit,
    rank_tolerance,
    refuse_unread,
    store_below,
)
from specops.projections.info import StableRankInfo
from specops.projections.matrices.cone import leading_vectors, matrix_candidates
from specops.typing import Array, Namespace, State


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
        side = min(block.matrices.shape[-2:])
        limit = rank_limit(xp, ratio, target, side, block.matrices)
        k = min(max(preserve, 1), side)
        v, basis = leading_vectors(
            xp, arrays.stop_gradient(block.matrices), k, state.pop(name, None)
        )
        if basis is not None:
            new_state[name] = basis
        new, figures, taken = _project_block(xp, block, old, v, limit, preserve, w.dtype)
        matrices.append(new)
        parts.append(figures)
        rounds = max(rounds, taken)
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


def _project_block(
    xp: Namespace,
    block: MatrixBlock,
    old: Array,
    v: Array,
    limit: Array,
    preserve: int,
    dtype: Any,
) -> tuple[Array, tuple[Array, Array, Array, Array], int]:
    """(the matrices as stored, their figures, rounds) along the leading vectors `v`.

    The figures are the stable ranks before and after, the distance, and how many triplets stay.
    """
    a = block.matrices
    candidates, rank, count = matrix_candidates(xp, block, v, limit, preserve)
    above = rank > limit * (1.0 + rank_tolerance(dtype, a.dtype))
    after, distance, new, rounds = rank, xp.zeros_like(rank), old, 0
    if arrays.truth(xp.any(above)) is not False:
        stored, stored_rank, rounds = store_below(xp, candidates, dtype, limit, above)
        new = xp.where(above[..., None, None], stored, old)
        after = xp.where(above, stored_rank, rank)
        change = arrays.to_compute(xp, stored) / block.scale - a
        distance = xp.sqrt(energy(xp, change)) * block.scale[..., 0, 0]
        distance = xp.where(above, distance, xp.zeros_like(distance))
    good, nan = block.finite, xp.full_like(rank, math.nan)
    figures = (xp.where(good, rank, nan), xp.where(good, after, nan), distance, count)
    return new, figures, rounds
