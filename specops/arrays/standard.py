"""`Library`: what algorithms need of an array library, done with the Array API standard alone.

The classes in `numpy.py`, `torch.py`, `jax.py` and `cupy.py` override what their library does
better, or can only do differently. `libraries.py` finds the one to which an array belongs.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import array_api_compat as compat
import numpy as np

from specops.typing import Array, Namespace

SPLIT_FROM = 2**16
"""Entries of a matrix from which its products with a few vectors gain from threads; with one thread
they run at a third of the speed of memory. torch uses threads for blocks of rows only."""


class Library:
    """A library of which no more is known than that it follows the standard."""

    by_workers = False
    """Whether stacks of small matrices are given to `workers` on the host."""
    solves_alone = False
    """Whether a single matrix is better left to its own solvers than to workers on the host."""

    finds_indices = False
    """Whether ``argmax`` works on all of its devices, also on those without 64-bit integers."""

    mixes_with_numpy = False
    """Whether it computes with arrays of NumPy beside its own."""

    # Where arrays live

    def device(self, x: Array) -> Any:
        """Its device; None if the library places arrays itself."""
        return compat.device(x)

    def placed(self, xp: Namespace, values: np.ndarray, like: Array) -> Array:
        """Values of the host on the device of `like`."""
        return xp.asarray(values, device=compat.device(like))

    def zeros(self, shape: tuple[int, ...], like: Array) -> Array:
        """Zeros of the dtype and device of `like`."""
        return compat.array_namespace(like).zeros(shape, dtype=like.dtype, device=self.device(like))

    def to_numpy(self, x: Array) -> np.ndarray:
        """A concrete array on the host."""
        info = compat.array_namespace(x).__array_namespace_info__()
        return np.asarray(compat.to_device(x, info.default_device()))

    def is_dispatched(self, x: Any) -> bool:
        """Whether operations on `x` would run one by one, which is slow: see `entry`."""
        return False

    def on_numpy(self, function: Any, weight: Any, args: Any, kwargs: Any) -> Any:
        """The function's result; for arrays that are dispatched, computed from NumPy views."""
        return function(*args, **kwargs)

    def on_host(self, x: Array) -> np.ndarray | None:
        """A NumPy view of a concrete array on the CPU without a derivative; None for others."""
        return None

    def is_constant_on_host(self, x: Array) -> bool:
        """Whether `host_view` can view the values of `x`, and change them in place."""
        return False

    def host_view(self, x: Array) -> np.ndarray:
        """The NumPy view of an array for which `is_constant_on_host` is true."""
        raise NotImplementedError

    def from_host(self, values: np.ndarray, like: Array) -> Array:
        """A NumPy result in the library of `like`."""
        return compat.array_namespace(like).asarray(values.copy())

    # Dtypes

    def is_complex(self, x: Array) -> bool:
        """Whether entries are complex."""
        return "complex" in str(x.dtype)

    def has_double(self, x: Array) -> bool:
        """Whether the device of `x` computes in double precision."""
        if str(getattr(x, "device", "")).startswith("mps"):
            return False
        info = compat.array_namespace(x).__array_namespace_info__()
        device = self.device(x)
        where = {} if device is None else {"device": device}
        return "float64" in info.dtypes(kind="real floating", **where)

    def rounded(self, xp: Namespace, x: Array, dtype: Any, bits: tuple[int, int]) -> Array:
        """`x` in a half precision of so many bits of exponent and mantissa."""
        return xp.astype(x, dtype)

    # Values that are unknown, and derivatives

    def is_compiling(self) -> bool:
        """Whether a compiler is tracing this code; it cannot follow every check of types."""
        return False

    def truth(self, flag: Array) -> bool | None:
        """The value of a 0-d boolean array, None while it is unknown."""
        return bool(flag)

    def is_traced(self, x: Array) -> bool:
        """Whether the values of `x` are unknown now: under a compiler, or mapped by vmap."""
        return False

    def is_staged(self, x: Array) -> bool:
        """Whether `x` is traced where `cond` and `while_loop` can be traced too."""
        return False

    def is_concrete(self, x: Array) -> bool:
        """Whether the values of `x` are known now and nothing is to be differentiated."""
        return True

    def stop_gradient(self, x: Array) -> Array:
        """`x` as a constant for differentiation."""
        return x

    def with_derivative(self, value: Any, surrogate: Any, x: Array, *constants: Array) -> Array:
        """``value(x, *constants)``, which differentiates by x like the surrogate."""
        return value(x, *constants)

    def expanded(self, decompose: Any, expansion: Any, x: Array, *parameters: Array) -> Any:
        """``expansion(None, decompose(x), *parameters)`` with the derivative of `expansion`."""
        return expansion(None, decompose(x), *parameters)

    # Control flow

    def fori(self, first: int, last: int, body: Any, carry: Any) -> Any:
        """``for j in range(first, last): carry = body(j, carry)``."""
        for j in range(first, last):
            carry = body(j, carry)
        return carry

    def cond(self, flag: Array, yes: Any, no: Any) -> Any:
        """``yes()`` or ``no()``."""
        known = self.truth(flag)
        if known is None:
            raise TypeError("a branch depends on values, which are not known during tracing")
        return yes() if known else no()

    def while_loop(self, cond: Any, body: Any, carry: Any) -> Any:
        """``while cond(carry): carry = body(carry)``."""
        while cond(carry):
            carry = body(carry)
        return carry

    def compiled(self, function: Any, static: tuple[Any, ...], *arrays: Array) -> Any:
        """``function(*static, *arrays)``, compiled where eager loops are slow."""
        return function(*static, *arrays)

    # Entries

    def largest_entry(self, xp: Namespace, x: Array, axis: Any, keepdims: bool) -> Array:
        """max|x|, or NaN if an entry is NaN."""
        return xp.linalg.vector_norm(x, ord=math.inf, axis=axis, keepdims=keepdims)

    def all_finite(self, xp: Namespace, x: Array, axis: Any) -> Array:
        """Whether no entry is NaN or infinite."""
        return xp.all(xp.isfinite(x), axis=axis)

    def argmax(self, xp: Namespace, flat: Array) -> Array:
        """Index, shape (1,), of the largest entry."""
        if self.finds_indices:
            return xp.reshape(xp.argmax(flat), (1,))
        index = np.asarray([np.argmax(self.to_numpy(flat))], np.int32)
        return self.placed(xp, index, flat)

    def complex_of(self, xp: Namespace, real: Array, imag: Array, dtype: Any) -> Array:
        """real + i·imag."""
        return xp.astype(real, dtype) + 1j * xp.astype(imag, dtype)

    def add_at(self, x: Array, index: Any, value: Array) -> Array:
        """`x` with `value` added at `index`; `x` must not be used again.

        `array_api_extra.at` does more at each call: it takes ten times as long for a convolution's
        taps, which are added one by one.
        """
        x[index] += value
        return x

    def add_diagonal(self, xp: Namespace, a: Array, values: Array) -> Array:
        """Stacked matrices plus multiples (..., 1) of the identity; `a` must not be used again."""
        return a + values[..., None] * xp.eye(a.shape[-1], dtype=a.dtype, device=self.device(a))

    # Products and solvers

    def matmul(self, a: Array, b: Array) -> Array:
        """The product a b, without warnings about entries that are not finite.

        Many libraries compute by NumPy, and warn where it does.
        """
        with np.errstate(invalid="ignore"):
            return a @ b

    def broadcasting(self) -> AbstractContextManager[None]:
        """A context in which arrays of different ranks broadcast, as the standard says."""
        return nullcontext()

    def ieee_products(self) -> AbstractContextManager[None]:
        """Products of float32 in float32, where the library may use shorter formats."""
        return nullcontext()

    def row_blocks(self, a: Array) -> Array | None:
        """A matrix as a stack of blocks of rows, if products are faster this way; else None."""
        return None

    def gram(self, xp: Namespace, a: Array, dtype: Any) -> Array:
        """AAᴴ or AᴴA, whichever is smaller; entries above the diagonal may be anything."""
        rows = self.rows(xp, xp.astype(a, dtype, copy=False))
        return rows @ self.adjoint(xp, rows)

    def rows(self, xp: Namespace, a: Array) -> Array:
        """`a` or its adjoint, whichever has no more rows than columns."""
        return a if a.shape[-2] <= a.shape[-1] else self.adjoint(xp, a)

    def adjoint(self, xp: Namespace, a: Array) -> Array:
        """Conjugate transpose of the last two axes."""
        turned = xp.matrix_transpose(a)
        return xp.conj(turned) if self.is_complex(a) else turned

    def solving(self) -> AbstractContextManager[None]:
        """A context in which solvers raise if they fail."""
        return nullcontext()

    def solvers_raise(self, x: Array) -> bool:
        """Whether an SVD of `x` that failed is never returned, as LAPACK tells its callers."""
        return False

    def one_thread(self, x: Array) -> AbstractContextManager[Any]:
        """A context in which work on `x` takes one thread, if threads are this process's own."""
        return nullcontext()

    def eigh(self, xp: Namespace, a: Array) -> tuple[Array, Array]:
        """Eigenvalues, ascending, and eigenvectors; raises if the solver does not converge."""
        values, vectors = xp.linalg.eigh(a)
        return values, vectors

    def try_cholesky(self, xp: Namespace, a: Array) -> tuple[Array, Array]:
        """(Cholesky factors of stacked matrices, which of them exist); never an exception."""
        try:
            with self.solving():
                factor = xp.linalg.cholesky(a)
        except Exception as error:
            if not did_not_converge(error):
                raise
            if a.ndim == 2:
                factor = a * math.nan
            elif a.shape[0] == 1:
                factor = self.try_cholesky(xp, a[0, ...])[0][None, ...]
            else:
                # By halves, which takes few calls if few matrices have no factor.
                half = a.shape[0] // 2
                halves = (a[:half, ...], a[half:, ...])
                factor = xp.concat([self.try_cholesky(xp, part)[0] for part in halves], axis=0)
        return factor, self.all_finite(xp, factor, (-2, -1))

    def has_cholesky(self, xp: Namespace, a: Array) -> Array:
        """Which Hermitian matrices have a factor; only lower triangles are read."""
        return self.try_cholesky(xp, a)[1]

    def without_autocast(self, function: Callable[[], Any]) -> Any:
        """``function()`` with products in the precision of their factors."""
        return function()


def did_not_converge(error: Exception) -> bool:
    """Whether a solver did not converge; each library has an exception class of this name."""
    return type(error).__name__ in {"LinAlgError", "_LinAlgError"}
