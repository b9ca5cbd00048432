"""Dense weights onto the spectral ball: block by block, concrete or traced."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from specops import arrays
from specops.errors import StateError
from specops.geometry import Dense
from specops.linalg.inside import BEYOND
from specops.maps.prepare import MatrixBlock, Prepared
from specops.projections.info import ProjectionInfo
from specops.projections.matrices.ball_concrete import project_concrete
from specops.projections.matrices.ball_traced import project_traced
from specops.projections.of_values import changed_blocks
from specops.typing import Array, Namespace, State


def project_matrices(
    given: Prepared,
    w: Array,
    max_norm: Any,
    *,
    method: str,
    state: State,
    measure: bool,
) -> tuple[Array, ProjectionInfo]:
    """(the weight inside the ball, what happened)."""
    xp = given.xp
    assert isinstance(given.geometry, Dense)
    splits = given.geometry.splits
    keys = [f"vectors{index}" for index in range(len(splits or (0,)))]
    unknown = set(state) - set(keys)
    if unknown:
        raise StateError(f"the state of another geometry: unknown entries {sorted(unknown)}")
    done: list[ProjectionInfo] = []

    def change(block: MatrixBlock) -> Array | None:
        limit, target = _limits(xp, block, max_norm)
        if arrays.is_concrete(block.matrices) and arrays.is_concrete(limit):
            start = state.get(keys[len(done)])
            new, info = project_concrete(
                xp, block, limit, target, w.dtype, method=method, start=start, measure=measure
            )
        else:
            new, info = project_traced(xp, block, limit, target, w.dtype)
        done.append(_of_finite(xp, block, info))
        return new

    result = changed_blocks(given, w, change)

    def joined(parts: list[Array]) -> Array:
        return parts[0] if splits is None else xp.stack(parts, axis=-1)

    return result, ProjectionInfo(
        joined([info.norm_before for info in done]),
        joined([info.norm_after for info in done]),
        joined([info.gap for info in done]),
        max(info.iterations for info in done),
        {key: info.state["vectors"] for key, info in zip(keys, done, strict=True) if info.state},
    )


def _limits(xp: Namespace, block: MatrixBlock, max_norm: Any) -> tuple[Array, Array]:
    """(the bound in units of the block's scale, a slightly smaller one to aim at)."""
    a = block.matrices
    # The bound is rounded down; the division by the scale, a power of two, rounds nothing.
    limit = _rounded_down(max_norm, a) / block.scale[..., 0, 0]
    # A margin for the rounding of the solver.
    margin = (2.0 + math.sqrt(min(a.shape[-2:])) / 3.0) * arrays.epsilon(a.dtype)
    target = limit * (1.0 - margin)
    # No matrix of this scale reaches BEYOND, whose square does not overflow.
    return limit, xp.where(target < BEYOND, target, xp.full_like(target, BEYOND))


def _rounded_down(bound: Any, a: Array) -> Any:
    """The bound, rounded down to a number in the precision of `a`; arrays as they are."""
    if not isinstance(bound, float):
        return bound
    kind = np.dtype(arrays.dtype_name(arrays.real_dtype(arrays.namespace(a), a.dtype))).type
    low = kind(bound)
    return float(np.nextafter(low, kind(0)) if float(low) > bound else low)


def _of_finite(xp: Namespace, block: MatrixBlock, info: ProjectionInfo) -> ProjectionInfo:
    """The figures, with NaN for matrices that are not finite."""
    before, after, gap = (
        xp.where(block.finite, x, xp.full_like(x, math.nan))
        for x in (info.norm_before, info.norm_after, info.gap)
    )
    return ProjectionInfo(before, after, gap, info.iterations, info.state)
