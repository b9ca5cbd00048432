"""A convolution as a linear operator: products with it and with its adjoint, matrix free.

Each product is one small matrix product per kernel tap on a shifted view of the grid.
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import array_api_compat as compat
import numpy as np

from specops import arrays
from specops.geometry import ConvSizes
from specops.typing import Array


class ConvOperator:
    """The operator of a kernel (groups, rows, columns, *taps) from the fine to the coarse grid.

    Vectors are flattened (channels, *grid) arrays; leading axes are independent vectors. A
    transposed convolution is this operator with the two products exchanged.
    """

    def __init__(self, kernel: Array, sizes: ConvSizes) -> None:
        assert sizes.fine is not None
        assert sizes.coarse is not None
        assert sizes.lower is not None
        self.xp = compat.array_namespace(kernel)
        self.data = kernel
        self.sizes = sizes
        self.shape = sizes.matrix_shape()
        self.blocks = sizes.groups
        self._fine, self._coarse, self._lower = sizes.fine, sizes.coarse, sizes.lower
        self._taps = list(itertools.product(*(range(k) for k in sizes.kernel)))
        self._padded = tuple(
            max((m - 1) * s + span, n + lower)
            for n, m, s, span, lower in zip(
                self._fine, self._coarse, sizes.stride, sizes.spans, self._lower, strict=True
            )
        )

    def matvec(self, x: Array) -> Array:
        """A x: (..., columns of A) to (..., rows of A)."""
        xp, sizes = self.xp, self.sizes
        lead = x.shape[:-1]
        x = xp.reshape(x, (*lead, sizes.groups, sizes.columns, *self._fine))
        x = self._pad(x)
        total = None
        for tap in self._taps:
            seen = xp.reshape(
                x[(..., *self._window(tap))],
                (*lead, sizes.groups, sizes.columns, math.prod(self._coarse)),
            )
            part = arrays.matmul(self._matrix(tap), seen)
            total = part if total is None else total + part
        return xp.reshape(total, (*lead, self.shape[0]))

    def rmatvec(self, y: Array) -> Array:
        """Aᴴ y: (..., rows of A) to (..., columns of A)."""
        xp, sizes = self.xp, self.sizes
        lead = y.shape[:-1]
        y = xp.reshape(y, (*lead, sizes.groups, sizes.rows, math.prod(self._coarse)))
        padded = arrays.zeros((*lead, sizes.groups, sizes.columns, *self._padded), like=self.data)
        for tap in self._taps:
            part = arrays.matmul(arrays.adjoint(xp, self._matrix(tap)), y)
            part = xp.reshape(part, (*lead, sizes.groups, sizes.columns, *self._coarse))
            padded = arrays.add_at(padded, (..., *self._window(tap)), part)
        return xp.reshape(self._unpad(padded), (*lead, self.shape[1]))

    def gradient(self, u: Array, v: Array) -> Array:
        """The kernel E with ⟨K, E⟩ = ⟨u, A(K) v⟩ for every K: for each tap Σ u times conj(v)."""
        xp, sizes = self.xp, self.sizes
        v = self._pad(xp.reshape(v, (sizes.groups, sizes.columns, *self._fine)))
        u = xp.reshape(u, (sizes.groups, sizes.rows, -1))
        per_tap = []
        for tap in self._taps:
            seen = xp.reshape(v[(..., *self._window(tap))], (sizes.groups, sizes.columns, -1))
            per_tap.append(arrays.matmul(u, arrays.adjoint(xp, seen)))
        return xp.reshape(xp.stack(per_tap, axis=-1), self.data.shape)

    def to_matrix(self) -> Array:
        """The explicit matrix; memory grows with its `shape`."""
        eye = arrays.constant(np.eye(self.shape[1]), self.data)
        if arrays.is_complex(self.data):
            eye = self.xp.astype(eye, self.data.dtype)
        return self.xp.matrix_transpose(self.matvec(eye))

    def squared_frobenius(self) -> Array:
        """‖A‖_F² = Σ_a ‖K_a‖² · (outputs whose tap a reads inside the grid)."""
        xp, sizes, kernel = self.xp, self.sizes, self.data
        counts = np.ones(())
        for t, (n, d, uses) in enumerate(zip(self._fine, sizes.dilation, sizes.uses, strict=True)):
            landings, landing = np.unique(d * np.arange(len(uses)) % n, return_inverse=True)
            if sizes.circular and len(landings) < len(uses):
                # Taps that wrap onto each other add up, at every output, before they are squared.
                kernel = arrays.along_axis(xp, kernel, np.eye(len(landings))[landing], 3 + t)
                uses = uses[: len(landings)]
            counts = np.multiply.outer(counts, np.array(uses, float))
        return xp.sum(xp.abs(kernel) ** 2 * arrays.constant(counts, kernel))

    def _matrix(self, tap: tuple[int, ...]) -> Array:
        return self.data[(..., *tap)]

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
                x = self.xp.take(x, arrays.constant(index, x), axis=axis)
                continue
            shape = list(x.shape)
            pieces = []
            for extra in (lower, size - lower - n):
                shape[axis] = extra
                pieces.append(arrays.zeros(tuple(shape), like=x))
            x = self.xp.concat([pieces[0], x, pieces[1]], axis=axis)
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
        return arrays.along_axis(self.xp, x, landing, axis)
