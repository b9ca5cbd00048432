"""Whether matrices are inside the spectral ball, by a factorisation that exists only there."""

from __future__ import annotations

from typing import Any

import numpy as np

from specops import backend, host
from specops.linalg.clip import gram
from specops.linalg.decompositions import svdvals
from specops.linalg.lanczos import MatrixOperator

Array = Any
_MARGIN = 1e-4
"""Relative margin above the rounding of single precision."""
_POWER_STEPS = 6
_POWER_FROM = 256


def inside(xp: Any, a: Array, limit: Array, *, sharp: bool = False) -> Array:
    r"""Which of stacked matrices have ‖A‖ ≤ limit: booleans of shape (...).

    They are those for which limit²·I − G has a Cholesky factor, G being the Gram matrix of the
    smaller side. In single precision first, with a margin; what that leaves open is settled in
    double precision, or by the singular values where a device has none.

    Parameters
    ----------
    xp : namespace
        Of the arrays, which are concrete.
    a : array, shape (..., m, n)
        Scaled so that squares neither overflow nor underflow.
    limit : array, shape (...)
        Positive.
    sharp : bool
        Skip single precision: for matrices that are known to be close to the limit.
    """
    on_host = None if host.solves_alone(a) else host.as_host(a)
    if on_host is not None:
        flat = on_host.reshape(-1, *on_host.shape[-2:])
        bounds = np.broadcast_to(backend.to_numpy(limit), a.shape[:-2]).reshape(-1)

        def work(chunk: slice) -> np.ndarray:
            return _host_inside(flat[chunk], bounds[chunk], sharp)

        found = np.concatenate(host.map_chunks(work, len(flat), flat[0].nbytes))
        return backend.constant(found.reshape(a.shape[:-2]), a)
    double = backend.double_dtype(xp, a)
    unit = limit[..., None, None]
    scaled = a / xp.astype(unit, a.dtype)
    if double is None:
        return svdvals(xp, scaled)[..., 0] <= 1.0
    # No norm is less than an entry; larger ones are kept from overflowing.
    possible = xp.all(xp.abs(scaled) <= 2.0, axis=(-2, -1))
    a = xp.where(possible[..., None, None], a, xp.zeros_like(a))
    scaled = xp.where(possible[..., None, None], scaled, xp.zeros_like(scaled))
    clearly = xp.zeros_like(possible)
    if not sharp and double != a.dtype:
        if a.ndim == 2 and _seen_outside(xp, scaled):
            return clearly
        clearly = _fits(xp, scaled, 1.0 - _MARGIN)
        if backend.truth(xp.all(clearly)):
            return clearly & possible
    return (clearly | _fits(xp, xp.astype(a, double) / xp.astype(unit, double), 1.0)) & possible


def _fits(xp: Any, scaled: Array, bound: float) -> Array:
    g = gram(xp, scaled)
    eye = xp.eye(g.shape[-1], dtype=g.dtype, device=backend.device_of(scaled))
    return backend.try_cholesky(xp, bound**2 * eye - g)[1]


def _host_inside(a: np.ndarray, limit: np.ndarray, sharp: bool) -> np.ndarray:
    unit = limit[:, None, None]
    with np.errstate(over="ignore", divide="ignore", invalid="ignore"):
        scaled = a / unit.astype(a.real.dtype)
    result = np.zeros(len(a), bool)
    # No norm is less than an entry, and squares of large ones would overflow.
    rest = np.flatnonzero(np.abs(scaled).max(axis=(-2, -1)) <= 2.0)
    if not sharp and a.real.dtype == np.float32:
        if len(rest) == 1 and _seen_outside(np, scaled[rest[0]]):
            return result
        uncertain = host.exceeds(host.gram(scaled[rest]), 1.0 - _MARGIN)
        result[rest] = ~uncertain
        rest = rest[uncertain]
    if len(rest):
        # Divided only now: a quotient in single precision would round.
        double = a[rest].astype(np.result_type(a, np.float64)) / unit[rest].astype(float)
        result[rest] = ~host.exceeds(host.gram(double), 1.0)
    return result


def _seen_outside(xp: Any, a: Array) -> bool:
    """Whether a few power steps, far cheaper than a factorisation, exceed the limit already."""
    if min(a.shape) < _POWER_FROM:
        return False
    start = backend.start_vector("inside", a.shape[0])
    v = xp.astype(backend.constant(start, a), a.dtype)
    operator = MatrixOperator(a)
    norm = xp.linalg.vector_norm(v)
    for _ in range(_POWER_STEPS):
        v = operator.matvec(operator.rmatvec(v / xp.astype(norm, v.dtype)))
        norm = xp.linalg.vector_norm(v)
    # From unit vectors, ‖AAᴴv‖ never exceeds ‖A‖².
    return backend.truth(norm > 1.0 + _MARGIN) is True
