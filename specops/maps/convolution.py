"""A convolution as a linear operator: products with it and with its adjoint, matrix free.

Each product is one matrix product of the kernel with the stacked views of the grid that its taps
see (im2col), for as many taps at a time as memory allows.
"""

from __future__ import annotations

import math

import array_api_compat as compat
import numpy as np

from specops import arrays
from specops.geometry import ConvSizes
from specops.maps.windows import windows
from specops.typing import Array

_SEEN_AT_ONCE = 2**23
"""Entries of the stacked views at a time: a choice of memory, 64 MiB in double precision. A product
of 384 channels, 31×31 taps and 32×32 points took 0.4 of the time of all taps at once."""


class ConvOperator:
    """The operator of a kernel (groups, rows, columns, *taps) from the fine to the coarse grid.

    Vectors are flattened (channels, *grid) arrays; leading axes are independent vectors. A
    transposed convolution is this operator with the two products exchanged.
    """

    def __init__(self, kernel: Array, sizes: ConvSizes) -> None:
        assert sizes.fine is not None
        assert sizes.coarse is not None
        self.xp = compat.array_namespace(kernel)
        self.data = kernel
        self.sizes = sizes
        self.shape = sizes.matrix_shape()
        self.blocks = sizes.groups
        self._fine, self._coarse = sizes.fine, sizes.coarse
        self._taps = math.prod(sizes.kernel)
        self._windows = windows(sizes, kernel)
        # (groups, rows, taps·columns)
        matrix = self.xp.permute_dims(kernel, (0, 1, *range(3, kernel.ndim), 2))
        self._matrix = self.xp.reshape(matrix, (*kernel.shape[:2], -1))

    def matvec(self, x: Array) -> Array:
        """A x: (..., columns of A) to (..., rows of A)."""
        xp, sizes = self.xp, self.sizes
        lead = x.shape[:-1]
        x = xp.reshape(x, (*lead, sizes.groups, sizes.columns, *self._fine))
        images = (
            arrays.matmul(self._columns(some), self._windows.seen(x, some))
            for some in self._parts()
        )
        return xp.reshape(sum(images, start=next(images)), (*lead, self.shape[0]))

    def rmatvec(self, y: Array) -> Array:
        """Aᴴ y: (..., rows of A) to (..., columns of A)."""
        xp, sizes = self.xp, self.sizes
        lead = y.shape[:-1]
        y = xp.reshape(y, (*lead, sizes.groups, sizes.rows, math.prod(self._coarse)))
        shape = (*lead, sizes.groups, -1, sizes.columns, *self._coarse)

        def returned(some: slice) -> Array:
            parts = arrays.matmul(arrays.adjoint(xp, self._columns(some)), y)
            return self._windows.summed(xp.reshape(parts, shape), some)

        images = map(returned, self._parts())
        return xp.reshape(sum(images, start=next(images)), (*lead, self.shape[1]))

    def gradient(self, u: Array, v: Array) -> Array:
        """The kernel E with ⟨K, E⟩ = ⟨u, A(K) v⟩ for every K: for each tap Σ u times conj(v)."""
        xp, sizes = self.xp, self.sizes
        v = xp.reshape(v, (sizes.groups, sizes.columns, *self._fine))
        u = xp.reshape(u, (sizes.groups, sizes.rows, -1))
        products = [
            arrays.matmul(u, arrays.adjoint(xp, self._windows.seen(v, some)))
            for some in self._parts()
        ]
        found = products[0] if len(products) == 1 else xp.concat(products, axis=-1)
        found = xp.reshape(found, (sizes.groups, sizes.rows, *sizes.kernel, sizes.columns))
        order = (0, 1, found.ndim - 1, *range(2, found.ndim - 1))
        found = xp.permute_dims(found, order)
        # Reshaped to be contiguous: in torch the layout would pass on to all that follows.
        return xp.reshape(xp.reshape(found, (-1,)), found.shape)

    def _parts(self) -> list[slice]:
        """Slices of the taps, as many at a time as memory allows."""
        entries = self.sizes.groups * self.sizes.columns * math.prod(self._coarse)
        some = max(1, _SEEN_AT_ONCE // entries) if self._windows.in_parts else self._taps
        starts = range(0, self._taps, some)
        return [slice(first, min(first + some, self._taps)) for first in starts]

    def _columns(self, taps: slice) -> Array:
        """The columns of the kernel, as a matrix, that belong to these taps."""
        columns = self.sizes.columns
        return self._matrix[..., taps.start * columns : taps.stop * columns]

    def to_matrix(self) -> Array:
        """The explicit matrix; memory grows with its `shape`."""
        xp, n = self.xp, self.shape[1]
        some = max(1, _SEEN_AT_ONCE // (self._taps * n))
        found = []
        for first in range(0, n, some):
            eye = arrays.constant(np.eye(min(some, n - first), n, first), self.data)
            if arrays.is_complex(self.data):
                eye = xp.astype(eye, self.data.dtype)
            found.append(self.matvec(eye))
        return xp.matrix_transpose(found[0] if len(found) == 1 else xp.concat(found, axis=0))

    def squared_frobenius(self) -> Array:
        """‖A‖_F² = Σ_a ‖K_a‖² · (outputs whose tap a reads inside the grid)."""
        xp, sizes, kernel = self.xp, self.sizes, self.data
        counts = np.ones(())
        for t, (n, d, uses) in enumerate(zip(self._fine, sizes.dilation, sizes.uses, strict=True)):
            landings, landing = np.unique(d * np.arange(len(uses)) % n, return_inverse=True)
            if sizes.circular and len(landings) < len(uses):
                # Taps that wrap onto the same entry add up before they are squared.
                kernel = arrays.along_axis(xp, kernel, np.eye(len(landings))[landing], 3 + t)
                uses = uses[: len(landings)]
            counts = np.multiply.outer(counts, np.array(uses, float))
        return xp.sum(xp.abs(kernel) ** 2 * arrays.constant(counts, kernel))
