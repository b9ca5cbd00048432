"""CuPy: values live on a GPU, and solvers fail silently unless told to raise."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import numpy as np

from specops.arrays.standard import Library
from specops.typing import Array, Namespace


class CuPy(Library):
    """Arrays of CuPy."""

    finds_indices = True

    def to_numpy(self, x: Array) -> np.ndarray:
        """A copy on the host."""
        return np.asarray(x.get())

    def matmul(self, a: Array, b: Array) -> Array:
        """The product: this library does not warn."""
        return a @ b

    def complex_of(self, xp: Namespace, real: Array, imag: Array, dtype: Any) -> Array:
        """Filled in one pass."""
        out = xp.empty(real.shape, dtype=dtype)
        out.real = real
        out.imag = imag
        return out

    def solving(self) -> AbstractContextManager[None]:
        """Solvers that raise."""
        import cupyx

        context: AbstractContextManager[None] = cupyx.errstate(linalg="raise")
        return context

    @contextmanager
    def ieee_products(self) -> Iterator[None]:
        """Undo CUPY_TF32=1, for which there is no other switch."""
        import cupy

        products = cupy._core._routines_linalg
        single = np.dtype(np.float32)
        chosen = products.get_compute_type(single)
        products.set_compute_type(single, products.COMPUTE_TYPE_FP32)
        try:
            yield
        finally:
            products.set_compute_type(single, chosen)
