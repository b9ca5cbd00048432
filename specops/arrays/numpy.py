"""NumPy: what it does better than the standard says, and warnings that it need not give."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import numpy as np

from specops.arrays import host, workers
from specops.arrays.standard import Library
from specops.typing import Array, Namespace


class NumPy(Library):
    """Arrays and scalars of NumPy."""

    by_workers = True
    finds_indices = True
    mixes_with_numpy = True

    def device(self, x: Array) -> Any:
        """The CPU."""
        return "cpu"

    def placed(self, xp: Namespace, values: np.ndarray, like: Array) -> Array:
        """The values themselves."""
        return values

    def zeros(self, shape: tuple[int, ...], like: Array) -> Array:
        """Zeros of the dtype of `like`."""
        return np.zeros(shape, dtype=like.dtype)

    def to_numpy(self, x: Array) -> np.ndarray:
        """Itself."""
        return np.asarray(x)

    def on_host(self, x: Array) -> np.ndarray | None:
        """Itself."""
        return np.asarray(x)

    def is_constant_on_host(self, x: Array) -> bool:
        """Always."""
        return True

    def host_view(self, x: Array) -> np.ndarray:
        """Itself."""
        return np.asarray(x)

    def from_host(self, values: np.ndarray, like: Array) -> Array:
        """Itself."""
        return values

    def solvers_raise(self, x: Array) -> bool:
        """Always."""
        return True

    def is_complex(self, x: Array) -> bool:
        """By the letter of the dtype."""
        return bool(x.dtype.kind == "c")

    def has_double(self, x: Array) -> bool:
        """Always."""
        return True

    def complex_of(self, xp: Namespace, real: Array, imag: Array, dtype: Any) -> Array:
        """Filled in one pass."""
        out = np.empty(real.shape, dtype=dtype)
        out.real = real
        out.imag = imag
        return out

    def matmul(self, a: Array, b: Array) -> Array:
        """The product, without the warnings of invalid values.

        For a single row or column NumPy calls BLAS's product of a matrix with a vector. OpenBLAS's
        in single precision computes with lanes that it never filled, if the matrix has five
        columns. They do not reach the result, but a signalling NaN in them raises the processor's
        flag, and NumPy then warns although the matrices are finite.
        """
        with np.errstate(invalid="ignore"):
            return a @ b

    def gram(self, xp: Namespace, a: Array, dtype: Any) -> Array:
        """By halves where that saves products."""
        return host.gram(a.astype(dtype, copy=False))

    def one_thread(self, x: Array) -> AbstractContextManager[Any]:
        """One BLAS thread."""
        return workers.one_blas_thread()

    def eigh(self, xp: Namespace, a: Array) -> tuple[Array, Array]:
        """Keeps single precision, which NumPy's public function computes in double."""
        return host.eigh(a)

    def has_cholesky(self, xp: Namespace, a: Array) -> Array:
        """Keeps single precision, which NumPy's public function computes in double."""
        return host.have_factors(a.copy())
