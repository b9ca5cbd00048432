"""Matrices of spectral norm at most c: the nearest ones, by the method that suits the device."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from specops import arrays
from specops.arrays import workers
from specops.arrays.solvers import svdvals
from specops.errors import StateError
from specops.linalg.clip import Clipped, clip
from specops.linalg.gram_iteration import gram_iteration
from specops.linalg.inside import BEYOND, inside
from specops.linalg.leading_clip import clip_leading, leading_norm, warm_start
from specops.linalg.matmul_clip import clip_by_products
from specops.maps.prepare import MatrixBlock
from specops.projections.feasible import store_within
from specops.typing import Array

METHODS = ("auto", "eigh", "svd", "products")
_PRODUCTS_FROM = 128
"""Smaller side from which an accelerator is faster at products than at eigenvalues."""
_ITERATE_ABOVE = 2**16
"""Entries from which a few products with a matrix cost less than its singular values."""
_ACCEPTED = {"float32": 2e-5, "float64": 1e-12}
"""Proven error of the product method, in units of σ₁√n, below which it stands."""


@dataclass
class BlockResult:
    """One block projected.

    Attributes
    ----------
    matrices : array or None
        As stored; None if all matrices were inside.
    before, after, gap : array, shape (*batch,)
    basis : array or None
        Right singular vectors to start from next time.
    """

    matrices: Array | None
    before: Array
    after: Array
    gap: Array
    basis: Array | None


def project_block(
    xp: Any,
    block: MatrixBlock,
    max_norm: float,
    dtype: Any,
    method: str,
    start: Array | None,
    measure: bool,
) -> BlockResult:
    """Project the stacked matrices of one block."""
    a = block.matrices
    unit = block.scale[..., 0, 0]
    # Scales are powers of two, so the bound is all that rounds: down.
    limit = _rounded_down(max_norm, a) / unit
    # A hair below the limit, so that the rounding of the solver stays inside as well.
    hair = (2.0 + math.sqrt(min(a.shape[-2:])) / 3.0) * arrays.epsilon(a.dtype)
    target = limit * (1.0 - hair)
    # No matrix of the scale reaches it, and its square is an ordinary number.
    target = xp.where(target < BEYOND, target, xp.full_like(target, BEYOND))
    if not (arrays.is_concrete(a) and arrays.is_concrete(limit)):
        return _traced(xp, block, limit, target, dtype)
    if start is not None:
        start = _checked(a, start)
    warm = start is not None and method == "auto"
    found = _from_start(xp, a, limit, start) if warm else None
    within = xp.zeros_like(limit) > 0
    if found is not None:
        # All or nothing: what a warm start missed is not worth shrinking for.
        stored = xp.astype(found.matrices * block.scale, dtype)
        final = arrays.to_compute(xp, stored) / block.scale
        if not arrays.truth(inside(xp, final, limit, sharp=True)):
            found = None
    unknown = xp.full_like(limit, math.nan)
    if found is None:
        within = inside(xp, a, limit)
        if arrays.truth(xp.all(within)):
            norm, basis = _norm(xp, a, start) if measure else (unknown, start)
            return BlockResult(None, norm * unit, norm * unit, xp.zeros_like(limit), basis)
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
    if not measure:
        return BlockResult(stored, unknown, unknown, unknown, found.basis)
    final = arrays.to_compute(xp, stored) / block.scale
    gap = _gap(xp, a, found, final, target)
    gap = xp.where(within, xp.zeros_like(gap), gap)
    before = found.norm if found.norm is not None else _norm(xp, a, start)[0]
    after = _norm(xp, final, found.basis)[0]
    return BlockResult(stored, before * unit, after * unit, gap, found.basis)


@dataclass
class _Found:
    matrices: Array
    taken: Array | None
    """Nuclear norm of what was taken off."""
    error: Array | None = None
    """Proven distance to the nearest matrix, where `taken` is not known."""
    basis: Array | None = None
    norm: Array | None = None
    """The largest singular value, where it came along."""


def _rounded_down(bound: Any, a: Array) -> Any:
    """A number that the precision of `a` holds, at most the bound; arrays as they are."""
    if not isinstance(bound, float):
        return bound
    kind = np.dtype(arrays.dtype_name(arrays.real_dtype(arrays.namespace(a), a.dtype))).type
    low = kind(bound)
    return float(np.nextafter(low, kind(0)) if float(low) > bound else low)


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


def _from_start(xp: Any, a: Array, limit: Array, start: Array) -> _Found | None:
    warm = clip_leading(xp, a, limit, start)
    return warm and _Found(warm[0].matrices, warm[0].taken, None, warm[2], warm[1])


def _clipped(xp: Any, a: Array, limit: Array, method: str) -> _Found:
    on_host = None if arrays.solves_alone(a) else arrays.on_host(a)
    large = min(a.shape[-2:]) >= _PRODUCTS_FROM
    if method == "products" or (method == "auto" and large and arrays.on_host(a) is None):
        norms = gram_iteration(xp, a)
        clipped, error = clip_by_products(xp, a, limit, norms)
        accepted = _ACCEPTED[arrays.dtype_name(arrays.real_dtype(xp, a.dtype))]
        good = error <= accepted * norms * math.sqrt(min(a.shape[-2:]))
        if arrays.truth(xp.all(good)):
            return _Found(clipped, None, error)
    if on_host is None:
        return _single(clip(xp, a, limit, force_svd=method == "svd"), limit)
    return _on_host(a, on_host, np.asarray(arrays.to_numpy(limit)), method == "svd")


def _single(done: Clipped, limit: Array) -> _Found:
    if done.values is None:
        return _Found(done.matrices, done.taken)
    basis = warm_start(done.values, done.vectors) if done.matrices.ndim == 2 else None
    return _Found(done.matrices, done.taken, None, basis, limit * done.values[..., -1] ** 0.5)


def _on_host(a: Array, values: np.ndarray, limit: np.ndarray, force_svd: bool) -> _Found:
    """CPU arrays of any library; the matrices of a stack by several workers."""
    if values.ndim == 2:
        found = _single(clip(np, values, limit, force_svd=force_svd), limit)
        parts = (found.matrices, found.taken, found.basis, found.norm)
        matrices, taken, basis, norm = (
            None if x is None else arrays.from_host(np.asarray(x, x.dtype), a) for x in parts
        )
        return _Found(matrices, taken, None, basis, norm)
    flat = values.reshape(-1, *values.shape[-2:])
    limits = limit.reshape(-1)

    def work(chunk: slice) -> tuple[np.ndarray, ...]:
        return clip(np, flat[chunk], limits[chunk], force_svd=force_svd)[:2]

    chunks = workers.map_chunks(work, len(flat), flat[0].nbytes)
    matrices, taken = (np.concatenate(p) for p in zip(*chunks, strict=True))
    return _Found(
        arrays.from_host(matrices.reshape(values.shape), a),
        arrays.constant(taken.reshape(limit.shape), a),
    )


def _gap(xp: Any, a: Array, found: _Found, final: Array, limit: Array) -> Array:
    """2(primal − dual)/‖a‖², or the square of the proven distance over ‖a‖²."""

    def squared(x: Array) -> Array:
        return xp.sum(xp.abs(x) ** 2, axis=(-2, -1))

    whole = squared(a)
    whole = xp.where(whole > 0, whole, xp.ones_like(whole))
    if found.error is not None:
        return (found.error + xp.sqrt(squared(final - found.matrices))) ** 2 / whole
    removed = a - found.matrices
    product = xp.sum(arrays.conjugate(xp, removed) * found.matrices, axis=(-2, -1))
    product = xp.real(product) if arrays.is_complex(a) else product
    dual = 0.5 * squared(removed) + product - limit * found.taken
    gap = 2.0 * (0.5 * squared(a - final) - dual) / whole
    return xp.where(gap > 0, gap, xp.zeros_like(gap))


def _norm(xp: Any, a: Array, start: Array | None) -> tuple[Array, Array | None]:
    """(largest singular values, the basis to start from next time).

    Of a single large matrix by a few rounds from `start`: from below, to about 1e-4.
    """
    if a.ndim > 2 or math.prod(a.shape) <= _ITERATE_ABOVE:
        return svdvals(xp, a)[..., 0], None
    return leading_norm(xp, a, start)


def _traced(xp: Any, block: MatrixBlock, limit: Array, target: Array, dtype: Any) -> BlockResult:
    """By SVD, every decision left to the compiler, or differentiated through the vectors."""
    a, unit = block.matrices, block.scale[..., 0, 0]
    fixed = arrays.stop_gradient(a)
    before = svdvals(xp, fixed)[..., 0]
    within = before <= limit
    if arrays.truth(xp.all(within)):
        return BlockResult(None, before * unit, before * unit, xp.zeros_like(limit), None)
    # Equal singular values, such as a matrix inside may have, must not leak their derivative.
    plain = xp.eye(a.shape[-2], a.shape[-1], dtype=a.dtype, device=arrays.device_of(fixed))
    plain = plain * arrays.constant(np.arange(1.0, a.shape[-1] + 1.0), fixed)
    done = clip(xp, xp.where(within[..., None, None], plain, a), target)
    clipped = xp.where(within[..., None, None], a, done.matrices)

    def norm(x: Array) -> Array:
        return svdvals(xp, arrays.stop_gradient(x / block.scale))[..., 0]

    stored = store_within(
        xp, clipped * block.scale, dtype, lambda x: within | (norm(x) <= limit), limit.ndim
    )
    final = arrays.to_compute(xp, stored)
    gap = _gap(xp, a, _Found(done.matrices, done.taken), final / block.scale, target)
    gap = xp.where(within, xp.zeros_like(gap), gap)
    return BlockResult(stored, before * unit, norm(final) * unit, gap, None)
