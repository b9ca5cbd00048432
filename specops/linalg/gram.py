"""Gram matrices of the smaller side, their lower triangles only where that saves products."""

from __future__ import annotations

from typing import Any

import numpy as np

from specops import backend, host

Array = Any
_HALVE_FROM = 512
_STRIPS = 8
_LONG = 4096
"""Length up to which sums in single precision, in whatever order, drift by less than 1e-4."""
_CAST = 512
"""Length of the pieces cast to double precision: small enough to stay in the cache."""


def gram(xp: Any, a: Array) -> Array:
    """AAᴴ or AᴴA, whichever is smaller; of what is above the diagonal some may be zero.

    Solvers and factorisations of Hermitian matrices read the lower triangle only.
    """
    double = None if max(a.shape[-2:]) <= _LONG else backend.double_dtype(xp, a)
    if double is not None and double != a.dtype:
        rows = _rows(xp, a)
        starts = range(0, rows.shape[-1], _LONG)
        parts = (gram(xp, rows[..., start : start + _LONG]) for start in starts)
        return xp.astype(sum(xp.astype(part, double) for part in parts), a.dtype)
    if isinstance(a, np.ndarray):
        return host.gram(a)
    if _by_strips(a):
        size = min(a.shape)
        return _fill_lower(xp, backend.zeros((size, size), a), a, 1.0)
    rows = _rows(xp, a)
    return rows @ backend.adjoint(xp, rows)


def below(xp: Any, a: Array, limit: Array, dtype: Any) -> Array:
    """limit²·I − G, computed in `dtype`; anything may stand above the diagonal."""
    limit = xp.astype(limit, backend.real_dtype(xp, dtype))
    if not isinstance(a, np.ndarray) and _by_strips(a):
        size = min(a.shape)
        g = _fill_lower(xp, a.new_empty((size, size), dtype=dtype), a, -1.0)
    else:
        g = gram(xp, xp.astype(a, dtype, copy=False))
        g *= -1.0
    return backend.add_diagonal(xp, g, limit**2)


def _by_strips(a: Array) -> bool:
    """Whether `a` is a large matrix of torch's on the CPU, free to be computed in place."""
    if a.ndim != 2 or min(a.shape) < _HALVE_FROM:
        return False
    return host.solves_alone(a) and host.as_host(a) is not None


def _rows(xp: Any, a: Array) -> Array:
    return a if a.shape[-2] <= a.shape[-1] else backend.adjoint(xp, a)


def _fill_lower(xp: Any, out: Array, a: Array, sign: float) -> Array:
    """sign·G in the lower triangle of `out`, in its precision; above it some is left as it was."""
    rows = _rows(xp, a)
    size, length = rows.shape
    piece = length if out.dtype == a.dtype else _CAST
    strip = -(-size // _STRIPS)
    for start in range(0, length, piece):
        left = rows[:, start : start + piece].to(out.dtype)
        right = backend.adjoint(xp, left)
        for j in range(0, size, strip):
            out[j:, j : j + strip].addmm_(
                left[j:], right[:, j : j + strip], beta=min(start, 1), alpha=sign
            )
    return out
