"""Concrete matrices onto the spectral ball, by the method that suits the device."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from specops import arrays
from specops.errors import StateError
from specops.linalg.clip_by_lobpcg import clip_by_lobpcg
from specops.linalg.clip_concrete import clip_concrete
from specops.linalg.inside import inside
from specops.linalg.norms import norms
from specops.maps.prepare import MatrixBlock
from specops.projections.feasible import store_within
from specops.projections.info import ProjectionInfo
from specops.typing import Array, Namespace


def project_concrete(
    xp: Namespace,
    block: MatrixBlock,
    limit: Array,
    target: Array,
    dtype: Any,
    *,
    method: str,
    start: Array | None,
    measure: bool,
) -> tuple[Array | None, ProjectionInfo]:
    """(the matrices as stored, None if all were inside; what happened).

    The values are known and nothing is differentiated, so each step looks at the one before.
    """
    a, unit = block.matrices, block.scale[..., 0, 0]
    unknown = xp.full_like(limit, math.nan)
    within = xp.zeros_like(limit) > 0

    def fits(final: Array) -> Array:
        return within | inside(xp, final / block.scale, limit, sharp=True)

    if start is not None:
        start = _checked(a, start)
    found = None
    if start is not None and method == "auto":
        found = clip_by_lobpcg(xp, a, limit, start)
    if found is not None:
        # If a warm start missed a value, its result is dropped, not scaled down.
        stored = xp.astype(found.matrices * block.scale, dtype)
        if not arrays.truth(fits(arrays.to_compute(xp, stored))):
            found = None
    if found is None:
        within = inside(xp, a, limit)
        if arrays.truth(xp.all(within)):
            norm, basis = norms(xp, a, start) if measure else (unknown, start)
            gap = xp.zeros_like(limit)
            return None, ProjectionInfo(norm * unit, norm * unit, gap, 0, _state(basis))
        found = clip_concrete(xp, a, target, method)
        kept = found.matrices
        if arrays.truth(xp.any(within)):
            kept = xp.where(within[..., None, None], a, kept)
        stored = store_within(xp, kept * block.scale, dtype, fits, limit.ndim)
    state = _state(found.basis)
    if not measure:
        return stored, ProjectionInfo(unknown, unknown, unknown, 1, state)
    final = arrays.to_compute(xp, stored) / block.scale
    gap = found.gap(xp, a, final, target, within)
    before = found.norm if found.norm is not None else norms(xp, a, start)[0]
    after = norms(xp, final, found.basis)[0]
    return stored, ProjectionInfo(before * unit, after * unit, gap, 1, state)


def _state(basis: Array | None) -> dict[str, Array]:
    return {} if basis is None else {"vectors": basis}


def _checked(a: Array, start: Array) -> Array:
    """The state's vectors, in the library, on the device and in the precision of `a`."""
    side = min(a.shape[-2:])
    shape = tuple(start.shape) if arrays.is_array(start) else None
    if a.ndim != 2 or shape is None or len(shape) != 2 or shape[0] != side:
        raise StateError(
            f"the state does not fit matrices of shape {tuple(a.shape)}: its vectors have shape "
            f"{shape}. Pass state=None to start afresh"
        )
    damaged = arrays.is_complex(start) and not arrays.is_complex(a)
    if damaged or not 0 < shape[1] <= side or not np.isfinite(arrays.to_numpy(start)).all():
        raise StateError("the state is damaged: pass state=None to start afresh")
    return arrays.like(start, a)
