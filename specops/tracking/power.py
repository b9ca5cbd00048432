"""Power steps on stacked matrices, and the vectors that they start from."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from specops import backend, host
from specops.errors import StateError
from specops.linalg.decompositions import svd
from specops.linalg.lanczos import MatrixOperator, largest_singular_triplet
from specops.linalg.products import matvec, vecmat

Array = Any
State = dict[str, Array]
START_TOLERANCE = 1e-4
_UNROLLED = 4
"""Power steps up to which a compiler is given each of them."""
_SVD_BELOW = 2**13
"""Entries of a matrix up to which its decomposition costs less than the steps of Lanczos."""


def checked(state: State, key: str, shape: tuple[int, ...], like: Array) -> Array:
    """An entry of a state, in the precision and on the device of the weight it is used with."""
    found = state.get(key)
    if found is None or found.shape != shape:
        got = None if found is None else tuple(found.shape)
        raise StateError(
            f"the state must hold {key} of shape {shape}, got {got}: it belongs to another "
            f"weight or input size"
        )
    if found.dtype == like.dtype and backend.device_of(found) == backend.device_of(like):
        return found
    if backend.dtype_name(found.dtype) in ("float16", "bfloat16"):
        found = backend.to_compute(backend.namespace(found), found)
    wanted = backend.real_dtype(backend.namespace(like), like.dtype)
    real = backend.real_dtype(backend.namespace(found), found.dtype)
    # Models are cast and moved after a state was made.
    if backend.device_of(found) != backend.device_of(like):
        return backend.constant(backend.to_numpy(found), like, complex=backend.is_complex(found))
    if backend.dtype_name(real) != backend.dtype_name(wanted):
        xp = backend.namespace(like)
        complex_ = backend.is_complex(found)
        return xp.astype(found, backend.complex_dtype(xp, wanted) if complex_ else wanted)
    return found


def leading_pair(xp: Any, a: Array, name: str) -> tuple[Array, Array, Array]:
    """(u, v, σ) of stacked matrices to start from."""
    backend.check_finite(xp, a)
    *batch, m, n = a.shape
    scale = backend.magnitude(xp, a, axis=(-2, -1))
    if not batch and m * n > _SVD_BELOW:
        start = filled(backend.start_vector(name, n), a)
        start = largest_singular_triplet(
            xp, MatrixOperator, a / scale, None, start, tolerance=START_TOLERANCE
        )[2]
    else:
        start = backend.conjugate(xp, svd(xp, a / scale)[2][..., 0, :])
    fallback = filled(np.broadcast_to(backend.start_vector(name, n), (*batch, n)).copy(), a)
    v, _ = unit(xp, start, fallback)
    u = filled(np.broadcast_to(backend.start_vector(name + "u", m), (*batch, m)).copy(), a)
    return power_step(xp, a, u, v)


def power_step(xp: Any, a: Array, u: Array, v: Array) -> tuple[Array, Array, Array]:
    """One power step: (u, v, σ) with σ = ‖Aᴴu‖ = ⟨u, Av⟩."""
    u, _ = half_step(xp, a, u, v, to_left=True)
    v, sigma = half_step(xp, a, u, v, to_left=False)
    return u, v, sigma


def half_step(xp: Any, a: Array, u: Array, v: Array, *, to_left: bool) -> tuple[Array, Array]:
    """(u ← Av/‖Av‖, ‖Av‖) or (v ← Aᴴu/‖Aᴴu‖, ‖Aᴴu‖): each norm is a lower bound of ‖A‖."""
    complex_ = backend.is_complex(a)
    # In few calls: small layers cost what they take.
    if a.ndim == 2 and host.holds(a):
        if to_left:
            x, kept = matvec(a, v), u
        else:
            x, kept = (xp.conj(vecmat(xp.conj(u), a)) if complex_ else vecmat(u, a)), v
        norm = host.length(x)
        real = xp.real(x).dtype if complex_ else x.dtype
        return (x / norm if 0 < norm < math.inf else kept), xp.asarray(norm, dtype=real)
    if to_left:
        return unit(xp, _image(a, v), u)
    image = backend.conjugate(xp, u)
    image = (
        backend.matmul(image[..., None, :], a)[..., 0, :]
        if a.ndim > 2
        else backend.matmul(image, a)
    )
    return unit(xp, backend.conjugate(xp, image), v)


def advanced(xp: Any, a: Array, u: Array, v: Array, rounds: int) -> tuple[Array, Array, Array]:
    """(u, v, σ) after that many power steps."""
    if rounds > _UNROLLED:
        u, v = backend.fori(xp, 0, rounds - 1, lambda _, pair: power_step(xp, a, *pair)[:2], (u, v))
        rounds = 1
    for _ in range(rounds):
        u, v, sigma = power_step(xp, a, u, v)
    return u, v, sigma


def power_steps(
    given: Sequence[tuple[np.ndarray, np.ndarray, np.ndarray, int]],
) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """(u, v, σ) of each small real matrix on the host from its (A, u, v, rounds)."""
    result = []
    with host.one_blas_thread():
        for a, u, v, rounds in given:
            for _ in range(rounds):
                u, _ = _divided(a.dot(v), u)
                v, sigma = _divided(u.dot(a), v)
            result.append((u, v, np.asarray(sigma, a.dtype)))
    return result


def _divided(x: np.ndarray, kept: np.ndarray) -> tuple[np.ndarray, float]:
    """(x/‖x‖, ‖x‖), `kept` where that is no direction."""
    norm = host.length(x)
    return (x / norm if 0 < norm < math.inf else kept), norm


def along(xp: Any, a: Array, u: Array, v: Array) -> Array:
    """Re⟨u, Av⟩."""
    product = xp.sum(backend.conjugate(xp, u) * _image(a, v), axis=-1)
    return xp.real(product) if backend.is_complex(product) else product


def _image(a: Array, v: Array) -> Array:
    """Av of stacked matrices and vectors."""
    return backend.matmul(a, v[..., None])[..., 0] if a.ndim > 2 else backend.matmul(a, v)


def unit(xp: Any, x: Array, fallback: Array | None) -> tuple[Array, Array]:
    """(x/‖x‖ along the last axis, ‖x‖): `fallback`, or x, where x is zero or not finite."""
    real = backend.real_dtype(xp, x.dtype)
    double = backend.double_dtype(xp, x)
    if double is None or double == x.dtype:
        # Squares of what is scaled to 1 neither overflow nor vanish.
        scale = xp.max(xp.abs(x), axis=-1, keepdims=True)
        scale = xp.where((scale > 0) & xp.isfinite(scale), scale, xp.ones_like(scale))
        norm = scale * xp.linalg.vector_norm(x / xp.astype(scale, x.dtype), axis=-1, keepdims=True)
    else:
        wide = xp.linalg.vector_norm(xp.astype(x, double), axis=-1, keepdims=True)
        norm = xp.astype(wide, real)
    usable = (norm > 0) & (norm < math.inf)
    result = x / xp.astype(xp.where(usable, norm, xp.ones_like(norm)), x.dtype)
    if fallback is not None:
        result = xp.where(usable, result, fallback)
    return result, norm[..., 0]


def inner(xp: Any, w: Array, axis: Array) -> Array:
    product = xp.sum(w * backend.conjugate(xp, axis))
    return xp.real(product) if backend.is_complex(product) else product


def filled(values: np.ndarray, like: Array) -> Array:
    return backend.constant(values, like, complex=backend.is_complex(like))
