"""Whether Hermitian matrices have a Cholesky factor: whether they are positive definite."""

from __future__ import annotations

import sys
from typing import Any

from specops import backend, host

Array = Any
_BLOCK = 96
_BLOCKS_FROM = 256


def has_cholesky(xp: Any, a: Array) -> Array:
    """Which of stacked Hermitian matrices have a factor; `a` must not be used again.

    Only lower triangles are read. torch copies a triangle against the order of memory, which
    takes as long as the factorisation; by blocks, in place, a large matrix takes half the time.
    """
    if a.ndim == 2 and a.shape[0] >= _BLOCKS_FROM and host.solves_alone(a) and host.holds(a):
        return xp.asarray(_factors_in_place(a), device=a.device)
    return backend.try_cholesky(xp, a)[1]


def _factors_in_place(a: Array) -> bool:
    """Left-looking: each block of columns less the product of those before it, then solved."""
    linalg = sys.modules["torch"].linalg
    size = a.shape[0]
    for start in range(0, size, _BLOCK):
        stop = min(start + _BLOCK, size)
        columns = a[start:, start:stop]
        columns.addmm_(a[start:, :start], a[start:stop, :start].mH, alpha=-1)
        corner, failed = linalg.cholesky_ex(columns[: stop - start])
        if failed:
            return False
        rest = columns[stop - start :]
        rest.copy_(linalg.solve_triangular(corner, rest.mH, upper=False).mH)
    return True
