"""Checks of the vectors from which a caller wants an iteration to start."""

from __future__ import annotations

from specops import arrays
from specops.typing import Array, Namespace


def checked_start(xp: Namespace, start: Array, columns: int, least: int, like: Array) -> Array:
    """The caller's vectors, of shape (columns, p), in the library and dtype of a weight.

    Raises
    ------
    ValueError
        The vectors have another shape, are fewer than `least`, or are complex although the
        weight is real.
    NonFiniteError
        They hold NaN or infinity.
    """
    theirs = arrays.namespace(start)
    if start.ndim != 2 or start.shape[0] != columns or start.shape[1] < least:
        raise ValueError(
            f"start must have shape ({columns}, p) with p of at least k={least}, got {start.shape}"
        )
    if arrays.is_complex(start) and not arrays.is_complex(like):
        raise ValueError("start is complex, and the weight real: give it real vectors")
    arrays.check_finite(theirs, start, "start")
    if theirs is not xp or not arrays.compute_together(start, like):
        start = arrays.like(arrays.to_compute(theirs, start), like)
    return xp.astype(start, like.dtype)
