"""Products of matrices, and with a few vectors from either side."""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import ParamSpec, TypeVar

import array_api_compat as compat
import numpy as np

from specops.arrays import workers
from specops.arrays.dtypes import is_complex
from specops.arrays.libraries import if_loaded, library, library_of
from specops.arrays.placement import constant
from specops.typing import Array, Namespace

P = ParamSpec("P")
R = TypeVar("R")


def matmul(a: Array, b: Array) -> Array:
    """The product a b, without warnings about entries that are not finite."""
    return library(a).matmul(a, b)


def along_axis(xp: Namespace, x: Array, table: np.ndarray, axis: int) -> Array:
    """Apply a host matrix (from, to) along one axis."""
    order = list(range(x.ndim))
    order[axis], order[-1] = order[-1], order[axis]
    matrix = constant(table, x, complex=is_complex(x))
    return xp.permute_dims(matmul(xp.permute_dims(x, tuple(order)), matrix), tuple(order))


def images(a: Array, x: Array) -> Array:
    """Ax for each row x, again as rows."""
    # BLAS is up to three times as fast with two columns beside a matrix as with two rows.
    xp = compat.array_namespace(a)
    return xp.matrix_transpose(matmul(a, xp.matrix_transpose(x)))


def coimages(a: Array, x: Array) -> Array:
    """Aᵀx for each row x, again as rows, without conjugation."""
    xp, blocks = compat.array_namespace(a), library(a).row_blocks(a)
    if blocks is None:
        return matmul(x, a)
    count, rows, _ = blocks.shape
    parts = xp.permute_dims(xp.reshape(x, (len(x), count, rows)), (1, 0, 2)) @ blocks
    return xp.sum(parts, axis=0)


def ieee_products(xp: Namespace) -> AbstractContextManager[None]:
    """Products of float32 in float32, where the library may use shorter formats."""
    return library_of(xp).ieee_products()


def in_full_precision(function: Callable[P, R]) -> Callable[P, R]:
    """Run without torch's autocast, which takes products in half precision.

    It also runs with one thread if the first argument is small, and allows the standard's
    broadcasting if JAX was told to refuse it.
    """

    @functools.wraps(function)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> R:
        torch = if_loaded("torch")
        compiling = torch is not None and torch.is_compiling()

        def run() -> R:
            first = args[0] if args else next(iter(kwargs.values()), None)
            try:
                shape = getattr(first, "shape", ())
            except RuntimeError:  # a lazy layer's weight has no shape; the function refuses it
                shape = ()
            sized = isinstance(shape, tuple) and all(isinstance(n, int) for n in shape)
            if compiling or not sized or not workers.is_small(shape):
                return function(*args, **kwargs)
            with library(first).one_thread(first):
                return function(*args, **kwargs)

        jax = None if compiling else if_loaded("jax")
        with nullcontext() if jax is None else jax.broadcasting():
            if torch is None:
                return run()
            result: R = torch.without_autocast(run)
            return result

    return wrapped
