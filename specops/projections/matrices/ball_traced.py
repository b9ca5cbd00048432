"""Matrices onto the spectral ball if they are traced, or differentiated: by SVD."""

from __future__ import annotations

from typing import Any

from specops import arrays
from specops.arrays.solvers import svdvals
from specops.linalg.clip import clip
from specops.maps.prepare import MatrixBlock
from specops.projections.feasible import store_within
from specops.projections.info import ProjectionInfo
from specops.typing import Array, Namespace


def project_traced(
    xp: Namespace, block: MatrixBlock, limit: Array, target: Array, dtype: Any
) -> tuple[Array | None, ProjectionInfo]:
    """(the matrices as stored, None if all were inside; what happened).

    Nothing here depends on the values of arrays, so that compilers can trace it.
    """
    a, unit = block.matrices, block.scale[..., 0, 0]
    fixed = arrays.stop_gradient(a)
    before = svdvals(xp, fixed)[..., 0]
    within = before <= limit
    if arrays.truth(xp.all(within)):
        return None, ProjectionInfo(before * unit, before * unit, xp.zeros_like(limit), 0)
    found = clip(xp, a, target)
    clipped = xp.where(within[..., None, None], a, found.matrices)

    def norm(x: Array) -> Array:
        return svdvals(xp, arrays.stop_gradient(x / block.scale))[..., 0]

    def fits(norms: Array) -> Array:
        return within | (norms <= limit)

    x = clipped * block.scale
    if dtype == a.dtype:
        # Storing rounds nothing, and the target has a margin for the solver's rounding. A matrix
        # that is outside nevertheless is scaled down once, by two margins. A loop would run until a
        # whole stack is done, on which devices that share the stack would have to agree.
        x = xp.astype(x, dtype)  # a bound may be of higher precision
        after = norm(x)
        less = (target / limit) ** 2 * limit / xp.where(fits(after), limit, after)
        less = xp.where(fits(after), xp.ones_like(after), less)
        less = xp.astype(arrays.stop_gradient(less), after.dtype)
        stored, after = x * less[..., None, None], after * less
    else:
        stored = store_within(xp, x, dtype, lambda x: fits(norm(x)), limit.ndim)
        after = norm(arrays.to_compute(xp, stored))
    final = arrays.to_compute(xp, stored)
    gap = found.gap(xp, a, final / block.scale, target, within)
    return stored, ProjectionInfo(before * unit, after * unit, gap, 1)
