"""Matrices of spectral norm at most c: the nearest ones, by the method that suits the device."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from specops import arrays
from specops.arrays import workers
from specops.arrays.solvers import svdvals
from specops.errors import StateError
from specops.linalg.clip import Clipped, clip
from specops.linalg.clip_by_lobpcg import clip_by_lobpcg, norm_by_lobpcg
from specops.linalg.clip_by_products import clip_by_products
from specops.linalg.gram_iteration import gram_iteration
from specops.linalg.inside import inside
from specops.maps.prepare import MatrixBlock
from specops.projections.feasible import store_within
from specops.projections.info import ProjectionInfo
from specops.projections.matrices.gap import certified_gap
from specops.projections.matrices.products import by_products
from specops.typing import Array

_NORM_BY_ROUNDS_ABOVE = 2**16
"""Entries from which a few products with a matrix cost less than its singular values."""
_ACCEPTED = {"float32": 2e-5, "float64": 1e-12}
"""Proven error of the product method, in units of σ₁√n, below which it stands."""


def project_concrete(
    xp: Any,
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
    if start is not None:
        start = _checked(a, start)
    found = None
    if start is not None and method == "auto":
        found = clip_by_lobpcg(xp, a, limit, start)
    if found is not None:
        # All or nothing: what a warm start missed is not worth scaling down for.
        stored = xp.astype(found.matrices * block.scale, dtype)
        final = arrays.to_compute(xp, stored) / block.scale
        if not arrays.truth(inside(xp, final, limit, sharp=True)):
            found = None
    if found is None:
        within = inside(xp, a, limit)
        if arrays.truth(xp.all(within)):
            norm, basis = _norm(xp, a, start) if measure else (unknown, start)
            gap = xp.zeros_like(limit)
            return None, ProjectionInfo(norm * unit, norm * unit, gap, 0, _state(basis))
        found = _clipped(xp, a, target, method)
        kept = found.matrices
        if arrays.truth(xp.any(within)):
            kept = xp.where(within[..., None, None], a, kept)
        stored = store_within(
            xp,
            kept * block.scale,
            dtype,
            lambda x: within | inside(xp, x / block.scale, limit, sharp=True),
            limit.ndim,
        )
    state = _state(found.basis)
    if not measure:
        return stored, ProjectionInfo(unknown, unknown, unknown, 1, state)
    final = arrays.to_compute(xp, stored) / block.scale
    gap = certified_gap(xp, a, found, final, target, within)
    before = found.norm if found.norm is not None else _norm(xp, a, start)[0]
    after = _norm(xp, final, found.basis)[0]
    return stored, ProjectionInfo(before * unit, after * unit, gap, 1, state)


def _state(basis: Array | None) -> dict[str, Array]:
    return {} if basis is None else {"vectors": basis}


def _checked(a: Array, start: Array) -> Array:
    """The state's vectors on the library, device and precision of `a`."""
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


def _clipped(xp: Any, a: Array, limit: Array, method: str) -> Clipped:
    if by_products(a, method):
        norms = gram_iteration(xp, a)
        clipped, error = clip_by_products(xp, a, limit, norms)
        accepted = _ACCEPTED[arrays.dtype_name(arrays.real_dtype(xp, a.dtype))]
        good = error <= accepted * norms * math.sqrt(min(a.shape[-2:]))
        if arrays.truth(xp.all(good)):
            return Clipped(clipped, None, error)
    force_svd = method == "svd"
    on_host = None if arrays.solves_alone(a) else arrays.on_host(a)
    if on_host is None:
        return clip(xp, a, limit, force_svd=force_svd, keep_basis=True)
    limits = np.asarray(arrays.to_numpy(limit))
    if on_host.ndim > 2:
        return _by_workers(a, on_host, limits, force_svd)
    found = clip(np, on_host, limits, force_svd=force_svd, keep_basis=True)
    return Clipped(
        **{
            field: None if value is None else arrays.from_host(np.asarray(value, value.dtype), a)
            for field, value in vars(found).items()
        }
    )


def _by_workers(a: Array, values: np.ndarray, limits: np.ndarray, force_svd: bool) -> Clipped:
    """The matrices of a stack on the CPU, of any library, by several workers."""
    flat, flat_limits = values.reshape(-1, *values.shape[-2:]), limits.reshape(-1)

    def work(chunk: slice) -> tuple[Array, Array]:
        found = clip(np, flat[chunk], flat_limits[chunk], force_svd=force_svd)
        return found.matrices, found.removed

    chunks = workers.map_chunks(work, len(flat), flat[0].nbytes)
    matrices, removed = (np.concatenate(p) for p in zip(*chunks, strict=True))
    return Clipped(
        arrays.from_host(matrices.reshape(values.shape), a),
        arrays.constant(removed.reshape(limits.shape), a),
    )


def _norm(xp: Any, a: Array, start: Array | None) -> tuple[Array, Array | None]:
    """(largest singular values, the basis to start from next time).

    Of a single large matrix by a few rounds from `start`: from below, to about 1e-4.
    """
    if a.ndim > 2 or math.prod(a.shape) <= _NORM_BY_ROUNDS_ABOVE:
        return svdvals(xp, a)[..., 0], None
    return norm_by_lobpcg(xp, a, start)
