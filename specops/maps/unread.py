"""Unread taps: entries of a kernel that only ever meet padding, and are no part of its map."""

from __future__ import annotations

from functools import lru_cache

import array_api_compat as compat
import numpy as np

from specops import arrays
from specops.geometry.conv import Conv
from specops.typing import Array


def without_unread(w: Array, geometry: Conv) -> Array:
    """The weight with zeros at taps that no output reads; `w` itself if there are none."""
    where = _read(geometry, tuple(w.shape))
    if where is None:
        return w
    xp = compat.array_namespace(w)
    return xp.where(arrays.constant(where, w), w, xp.zeros_like(w))


def with_unread(result: Array, w: Array, geometry: Conv) -> Array:
    """The result with the entries of `w`, bit for bit, at taps that no output reads."""
    where = None if result is w else _read(geometry, tuple(w.shape))
    if where is None:
        return result
    xp = compat.array_namespace(w)
    return xp.where(arrays.constant(where, w), result, w)


@lru_cache(maxsize=256)
def _read(geometry: Conv, shape: tuple[int, ...]) -> np.ndarray | None:
    """A mask of the entries that are read, which broadcasts to the weight; None if all are."""
    sizes = geometry.sizes(shape)
    if sizes.reads_all:
        return None
    where = np.ones((), bool)
    for k, taps in zip(sizes.kernel, sizes.read, strict=True):
        where = np.multiply.outer(where, np.isin(np.arange(k), taps))
    return where if geometry.spatial_last else where[..., None, None]
