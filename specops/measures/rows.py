"""Norms of samples in a batch."""

from __future__ import annotations

import math

from specops import arrays
from specops.typing import Array


def rows(x: Array) -> Array:
    """The samples of an array (n, ...) as rows of a matrix, in compute precision."""
    # Not -1 for the length, which is unknown for no samples.
    xp = arrays.namespace(x)
    return xp.reshape(arrays.to_compute(xp, x), (x.shape[0], math.prod(x.shape[1:])))


def row_norms(x: Array) -> Array:
    """ℓ₂ norms (n,) of the samples of an array (n, ...), in compute precision, at any scale."""
    xp = arrays.namespace(x)
    flat = rows(x)
    if not flat.shape[1]:
        return xp.sum(flat, axis=-1)
    # Scaled, because squares of small and large entries leave the range of single precision.
    scale = arrays.magnitude(xp, flat, axis=-1)
    return xp.linalg.vector_norm(flat / scale, axis=-1) * scale[:, 0]


def unit_rows(x: Array) -> Array:
    """The samples of an array (n, ...) divided by their norms, at any scale; zeros stay zero."""
    xp = arrays.namespace(x)
    flat = rows(x)
    if not flat.shape[1]:
        return x
    flat = flat / arrays.magnitude(xp, flat, axis=-1)
    norms = xp.linalg.vector_norm(flat, axis=-1, keepdims=True)
    unit = flat / arrays.nonzero(xp, norms)
    return xp.reshape(xp.astype(unit, x.dtype), x.shape)
