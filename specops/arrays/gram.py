"""Gram matrices of the smaller side; entries above the diagonal may be missing.

Solvers and factorisations of Hermitian matrices read only the lower triangle.
"""

from __future__ import annotations

from typing import Any

from specops.arrays.dtypes import double_dtype, real_dtype
from specops.arrays.entries import add_diagonal
from specops.arrays.libraries import library
from specops.typing import Array, Namespace

_LONG = 4096
"""Sums of so many terms in single precision, in any order, drift by less than 1e-4."""


def gram(xp: Namespace, a: Array, dtype: Any = None) -> Array:
    """AAᴴ or AᴴA, whichever is smaller, computed in `dtype` (that of `a`)."""
    dtype = a.dtype if dtype is None else dtype
    double = None if max(a.shape[-2:]) <= _LONG else double_dtype(xp, a)
    if double is None or double == dtype:
        return library(a).gram(xp, a, dtype)
    rows = library(a).rows(xp, a)
    starts = range(0, rows.shape[-1], _LONG)
    parts = (library(a).gram(xp, rows[..., s : s + _LONG], dtype) for s in starts)
    return xp.astype(sum(xp.astype(part, double) for part in parts), dtype)


def below(xp: Namespace, a: Array, limit: Array, dtype: Any) -> Array:
    """limit²·I − G, computed in `dtype`."""
    limit = xp.astype(limit, real_dtype(xp, dtype))
    g = gram(xp, a, dtype)
    g *= -1.0
    return add_diagonal(xp, g, limit**2)
