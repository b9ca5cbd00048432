"""The largest singular values of concrete matrices."""

from __future__ import annotations

import math

from specops import arrays
from specops.arrays.solvers import svdvals
from specops.linalg.lobpcg import leading_triplets, with_small_columns
from specops.typing import Array, Namespace

_ROUNDS_ABOVE = 2**16
"""Entries from which a few products with a matrix cost less than its singular values: they take
twice the time at 256², half at 362², a seventh at 1024²."""
_WIDTH = 4
_NORM_ROUNDS = 24
_NORM_RESIDUAL = 1e-2
"""Residual over σ₁ at which rounds end. With these numbers of vectors and rounds the norm of normal
matrices of 256² to 1024² was 5e-5 to 2e-4 too small."""


def norms(xp: Namespace, a: Array, start: Array | None) -> tuple[Array, Array | None]:
    """(largest singular values of stacked matrices, the basis to start from next time).

    A single large matrix takes a few rounds from `start`, which give a lower bound, to about 1e-4.
    """
    if a.ndim == 2 and math.prod(a.shape) > _ROUNDS_ABOVE:
        return _by_rounds(xp, a, start)
    return svdvals(xp, a)[..., 0], None


def _by_rounds(xp: Namespace, a: Array, start: Array | None) -> tuple[Array, Array]:
    if start is None:
        start = arrays.start_vector("leading", _WIDTH * min(a.shape))
        start = xp.astype(arrays.constant(start.reshape(-1, _WIDTH), a), a.dtype)
    _, s, _, basis = leading_triplets(
        xp, with_small_columns(xp, a), start, 1, iterations=_NORM_ROUNDS, tolerance=_NORM_RESIDUAL
    )
    return s[0], basis
