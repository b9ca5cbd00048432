"""The view of a grid that each tap of a convolution reads, and the adjoint, which sums up views."""

from __future__ import annotations

import itertools
import math
from functools import lru_cache
from typing import Any, Protocol

import numpy as np

from specops import arrays
from specops.geometry import ConvSizes
from specops.typing import Array

_GATHERED_UP_TO = 2**20
"""Most entries of an index table that a compiled program may hold: a choice, 4 MiB."""


ALL = slice(None)


class Windows(Protocol):
    """The views of a grid, one for each tap."""

    in_parts: bool
    """Whether views can be asked for a part of the taps."""

    def seen(self, x: Array, taps: slice = ALL) -> Array:
        """The views of x (..., groups, columns, *fine) as (..., groups, taps·columns, coarse)."""

    def summed(self, parts: Array, taps: slice = ALL) -> Array:
        """The adjoint: adds parts (..., groups, taps, columns, *coarse) to the grid points that
        their taps read, (..., groups, columns, *fine)."""


def windows(sizes: ConvSizes, like: Array) -> Windows:
    """Windows by a gather, for compiled code with tables that are not too large, or by slices."""
    assert sizes.coarse is not None
    entries = math.prod(sizes.kernel) * max(math.prod(sizes.coarse), math.prod(sizes.fine or ()))
    if arrays.is_staged(like) and entries <= _GATHERED_UP_TO:
        return GatheredWindows(sizes)
    return SlicedWindows(sizes)


class SlicedWindows:
    """Views as strided slices of the padded grid."""

    in_parts = True

    def __init__(self, sizes: ConvSizes) -> None:
        assert sizes.fine is not None
        assert sizes.coarse is not None
        assert sizes.lower is not None
        self.sizes = sizes
        self._fine, self._coarse, self._lower = sizes.fine, sizes.coarse, sizes.lower
        self._taps = list(itertools.product(*(range(k) for k in sizes.kernel)))
        self._padded = tuple(
            max((m - 1) * s + span, n + lower)
            for n, m, s, span, lower in zip(
                self._fine, self._coarse, sizes.stride, sizes.spans, self._lower, strict=True
            )
        )

    def seen(self, x: Array, taps: slice = ALL) -> Array:
        """As `Windows.seen`."""
        xp, padded, some = arrays.namespace(x), self._pad(x), self._taps[taps]
        axis = padded.ndim - len(self._fine) - 1
        seen = xp.concat([padded[(..., *self._window(t))] for t in some], axis=axis)
        return xp.reshape(seen, (*x.shape[:axis], len(some) * self.sizes.columns, -1))

    def summed(self, parts: Array, taps: slice = ALL) -> Array:
        """As `Windows.summed`."""
        grid = len(self._coarse)
        lead, columns = parts.shape[: parts.ndim - grid - 2], self.sizes.columns
        padded = arrays.zeros((*lead, columns, *self._padded), like=parts)
        rest = [slice(None)] * (1 + grid)
        for index, tap in enumerate(self._taps[taps]):
            padded = arrays.add_at(padded, (..., *self._window(tap)), parts[(..., index, *rest)])
        return self._unpad(padded)

    def _window(self, tap: tuple[int, ...]) -> tuple[slice, ...]:
        return tuple(
            slice(d * a, d * a + (m - 1) * s + 1, s)
            for a, d, m, s in zip(
                tap, self.sizes.dilation, self._coarse, self.sizes.stride, strict=True
            )
        )

    def _pad(self, x: Array) -> Array:
        first = x.ndim - len(self._fine)
        for t, (n, lower, size) in enumerate(
            zip(self._fine, self._lower, self._padded, strict=True)
        ):
            axis = first + t
            if self.sizes.circular:
                index = (np.arange(size) - lower) % n
                x = arrays.namespace(x).take(x, arrays.constant(index, x), axis=axis)
                continue
            shape = list(x.shape)
            pieces = []
            for extra in (lower, size - lower - n):
                shape[axis] = extra
                pieces.append(arrays.zeros(tuple(shape), like=x))
            x = arrays.namespace(x).concat([pieces[0], x, pieces[1]], axis=axis)
        return x

    def _unpad(self, x: Array) -> Array:
        first = x.ndim - len(self._fine)
        for t, (n, lower, size) in enumerate(
            zip(self._fine, self._lower, self._padded, strict=True)
        ):
            keep: list[Any] = [slice(None)] * x.ndim
            keep[first + t] = slice(lower, lower + n)
            inside = x[tuple(keep)]
            if self.sizes.circular:
                inside = self._wrap(x, first + t, n, lower, size)
            x = inside
        return x

    def _wrap(self, x: Array, axis: int, n: int, lower: int, size: int) -> Array:
        """Add the entries outside the grid onto those that they wrap to."""
        landing = np.zeros((size, n))
        landing[np.arange(size), (np.arange(size) - lower) % n] = 1.0
        return arrays.along_axis(arrays.namespace(x), x, landing, axis)


class GatheredWindows:
    """Views by one gather from an index table, which compiles five times faster than slices."""

    in_parts = False

    def __init__(self, sizes: ConvSizes) -> None:
        self.sizes = sizes
        self._reads, self._returns = _tables(sizes)

    def seen(self, x: Array, taps: slice = ALL) -> Array:
        """As `Windows.seen`."""
        xp, sizes = arrays.namespace(x), self.sizes
        lead = x.shape[: x.ndim - len(sizes.kernel) - 1]
        found = _taken(xp.reshape(x, (*lead, sizes.columns, -1)), self._reads)
        found = xp.reshape(found, (*lead, sizes.columns, math.prod(sizes.kernel), -1))
        n = len(lead)
        found = xp.permute_dims(found, (*range(n), n + 1, n, n + 2))
        return xp.reshape(found, (*lead, sizes.columns * math.prod(sizes.kernel), -1))

    def summed(self, parts: Array, taps: slice = ALL) -> Array:
        """As `Windows.summed`."""
        xp, sizes, count = arrays.namespace(parts), self.sizes, math.prod(self.sizes.kernel)
        assert sizes.fine is not None
        lead = parts.shape[: parts.ndim - len(sizes.kernel) - 2]
        n = len(lead)
        parts = xp.reshape(parts, (*lead, count, sizes.columns, -1))
        parts = xp.permute_dims(parts, (*range(n), n + 1, n, n + 2))
        found = _taken(xp.reshape(parts, (*lead, sizes.columns, -1)), self._returns)
        found = xp.sum(xp.reshape(found, (*lead, sizes.columns, count, -1)), axis=-2)
        return xp.reshape(found, (*lead, sizes.columns, *sizes.fine))


def _taken(x: Array, table: np.ndarray) -> Array:
    """Entries of the last axis by a table of indices; the index past the end gives zero."""
    xp = arrays.namespace(x)
    x = xp.concat([x, arrays.zeros((*x.shape[:-1], 1), like=x)], axis=-1)
    return xp.take(x, arrays.constant(table, x), axis=-1)


@lru_cache(maxsize=16)
def _tables(sizes: ConvSizes) -> tuple[np.ndarray, np.ndarray]:
    """Two index tables: the grid point that each tap reads for each output, and the (tap, output)
    that each tap returns to each grid point. The index past the end stands for none."""
    assert sizes.fine is not None
    assert sizes.coarse is not None
    assert sizes.lower is not None
    points = np.zeros((1, 1), int)
    inside = np.ones((1, 1), bool)
    for n, m, s, d, k, lower in zip(
        sizes.fine,
        sizes.coarse,
        sizes.stride,
        sizes.dilation,
        sizes.kernel,
        sizes.lower,
        strict=True,
    ):
        own = d * np.arange(k)[:, None] + s * np.arange(m) - lower
        known = np.ones_like(own, bool) if sizes.circular else (own >= 0) & (own < n)
        points = points[:, None, :, None] * n + (own % n)[None, :, None, :]
        points = points.reshape(points.shape[0] * k, -1)
        inside = inside[:, None, :, None] & known[None, :, None, :]
        inside = inside.reshape(points.shape)
    size, outputs = math.prod(sizes.fine), math.prod(sizes.coarse)
    reads = np.where(inside, points, size)
    returns = np.full((len(points), size), len(points) * outputs)
    tap, output = np.nonzero(inside)
    # With one tap no two outputs read the same point.
    returns[tap, points[inside]] = tap * outputs + output
    return reads.ravel().astype(np.int32), returns.ravel().astype(np.int32)
