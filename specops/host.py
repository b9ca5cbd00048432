"""Stacks of small matrices on the CPU: many LAPACK calls at once instead of one in pieces.

LAPACK gains little from threads inside one small matrix and loses much when they fight over
cores. Work on a stack is therefore cut into chunks, and as many workers as BLAS had threads
take them, each with one BLAS thread while it lasts. A user who gave BLAS one thread gets one
worker; whatever was set is set again afterwards.

Arrays of other libraries that live on the CPU are seen through NumPy without a copy.
"""

from __future__ import annotations

import math
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import array_api_compat as compat
import numpy as np

from specops import backend

try:
    # The public functions compute single precision in double, at twice the time.
    from numpy.linalg import _umath_linalg as _lapack

    _SINGLE = "F->f" in _lapack.svd.types
except (ImportError, AttributeError):
    _SINGLE = False

Array = Any
_CHUNK_BYTES = 4 * 2**20
_GRAM_FROM = 96
"""Smaller side from which single precision uses the Gram matrix in double."""
_GRAM_ASPECT = 1.5
_HALVE_FROM = 192
_LEAST = 1e-140
"""Length whose square is an ordinary number in double."""

_lock = threading.Lock()
_depth = 0
_restore: Any = None
_workers = 1


def as_host(x: Array) -> np.ndarray | None:
    """A NumPy view of a concrete CPU array that carries no gradient; None for others."""
    if isinstance(x, np.ndarray):
        return x
    if compat.is_torch_array(x):
        torch = sys.modules["torch"]
        if backend.is_differentiated(x) or x.device.type != "cpu" or torch.compiler.is_compiling():
            return None
        return backend.torch_to_numpy(x)
    if compat.is_jax_array(x):
        jax = sys.modules["jax"]
        if isinstance(x, jax.core.Tracer) or {d.platform for d in x.devices()} != {"cpu"}:
            return None
        return np.asarray(x)
    return None


def holds(x: Array) -> bool:
    """Whether `x` is NumPy's, or torch's on the CPU with values that are known and constant."""
    if isinstance(x, np.ndarray):
        return True
    torch = sys.modules.get("torch")
    if torch is None or not isinstance(x, torch.Tensor) or x.device.type != "cpu":
        return False
    return not (
        torch.compiler.is_compiling()
        or torch._C._functorch.is_functorch_wrapped_tensor(x)
        or backend.is_differentiated(x)
    )


def seen(x: Array) -> np.ndarray:
    """A NumPy view of what `holds` is true of."""
    if isinstance(x, np.ndarray):
        return x
    array: np.ndarray = (x.detach() if x.requires_grad else x).numpy()
    return array


def length(x: Array) -> float:
    """‖x‖ of what `holds` is true of: squares neither overflow nor vanish."""
    if isinstance(x, np.ndarray):
        wide = x.astype(np.complex128 if x.dtype.kind == "c" else np.float64, copy=False)
        norm = math.sqrt(np.vdot(wide, wide).real)
    else:
        torch = sys.modules["torch"]
        wide = torch.complex128 if x.dtype.is_complex else torch.float64
        norm = torch.linalg.vector_norm(x, dtype=wide).item()
    if _LEAST < norm < 1 / _LEAST or math.isnan(norm) or x.dtype.itemsize in (2, 4):
        return float(norm)
    xp = compat.array_namespace(x)
    scale = float(xp.max(xp.abs(x)))
    return scale * length(x / scale) if 0 < scale < math.inf else scale


def from_host(values: np.ndarray, like: Array) -> Array:
    """A NumPy result in the library of `like`."""
    if isinstance(like, np.ndarray):
        return values
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(like, torch.Tensor) and values.flags.writeable:
        if min(values.strides, default=0) < 0:
            values = values.copy()
        return torch.from_numpy(values)
    return compat.array_namespace(like).asarray(values.copy())


@lru_cache(maxsize=4)
def _controller(loaded: tuple[bool, ...]) -> Any:
    from threadpoolctl import ThreadpoolController

    del loaded  # a library imported since then brings a BLAS of its own
    return ThreadpoolController().select(user_api="blas")


@contextmanager
def one_blas_thread() -> Iterator[int]:
    """One BLAS thread per caller for the duration; yields how many there were."""
    global _depth, _restore, _workers
    with _lock:
        if _depth == 0:
            controller = _controller(tuple(m in sys.modules for m in ("torch", "scipy")))
            _workers = max((lib["num_threads"] for lib in controller.info()), default=1)
            _restore = controller.limit(limits=1)
        _depth += 1
        workers = _workers
    try:
        yield workers
    finally:
        with _lock:
            _depth -= 1
            if _depth == 0:
                _restore.restore_original_limits()


def solves_alone(a: Array) -> bool:
    """Whether a single matrix is better left to its own library.

    torch's LAPACK is faster there, and its threads and NumPy's slow each other down.
    """
    return bool(a.ndim == 2 and compat.is_torch_array(a))


def map_chunks(function: Callable[[slice], Any], count: int, item_bytes: int) -> list[Any]:
    """``[function(chunk), ...]`` for slices that cover ``range(count)``, in order."""
    if count * item_bytes <= 2**16:
        return [function(slice(0, count))]
    with one_blas_thread() as workers:
        size = max(1, min(_CHUNK_BYTES // item_bytes, -(-count // (2 * workers))))
        chunks = [slice(i, min(i + size, count)) for i in range(0, count, size)]
        if workers == 1 or len(chunks) == 1:
            return [function(chunk) for chunk in chunks]
        with ThreadPoolExecutor(min(workers, len(chunks))) as pool:
            return list(pool.map(function, chunks))


def stack_svdvals(a: np.ndarray) -> np.ndarray:
    """Singular values of a complex stack, to 1e-6 of the largest or to double precision.

    Single precision stays in single precision while that is accurate enough. Larger or
    elongated matrices go through the Gram matrix of their smaller side, formed and solved in
    double: an error of √eps of double, 1.5e-8 of the largest value, at worst.
    """
    m, n = a.shape[-2:]
    small, large = min(m, n), max(m, n)
    if a.dtype != np.complex64:
        return np.asarray(np.linalg.svd(a, compute_uv=False))
    if small >= _GRAM_FROM or large >= _GRAM_ASPECT * small:
        return np.asarray(_by_gram(a), np.float32)
    if _SINGLE:
        with np.errstate(invalid="ignore"):
            values = _lapack.svd(a, signature="F->f")
        if not np.isnan(values).any():
            return np.asarray(values)
    return np.asarray(np.linalg.svd(a, compute_uv=False))


def eigh(a: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """`numpy.linalg.eigh` that stays in single precision, in double where that fails."""
    if _SINGLE and a.dtype in (np.float32, np.complex64):
        with np.errstate(invalid="ignore"):
            values, vectors = _lapack.eigh_lo(a, signature=f"{a.dtype.char}->f{a.dtype.char}")
        if not np.isnan(values).any():
            return values, vectors
    values, vectors = np.linalg.eigh(a)
    return values, vectors


def gram(a: np.ndarray) -> np.ndarray:
    """AAᴴ or AᴴA, whichever is smaller; large ones by halves, the upper from the lower."""
    if a.dtype.kind == "f":
        # A product with its own transpose: NumPy computes half of it.
        turned = a.swapaxes(-1, -2)
        return np.asarray(a @ turned if a.shape[-2] <= a.shape[-1] else turned @ a)
    rows = a if a.shape[-2] <= a.shape[-1] else a.conj().swapaxes(-1, -2)
    columns = rows.conj().swapaxes(-1, -2)
    if rows.shape[-2] < _HALVE_FROM:
        return np.asarray(rows @ columns)
    out = np.empty((*rows.shape[:-1], rows.shape[-2]), a.dtype)
    _fill_gram(rows, columns, out)
    return out


def _fill_gram(rows: np.ndarray, columns: np.ndarray, out: np.ndarray) -> None:
    n = rows.shape[-2]
    if n < _HALVE_FROM:
        np.matmul(rows, columns, out=out)
        return
    h = n // 2
    _fill_gram(rows[..., :h, :], columns[..., :h], out[..., :h, :h])
    _fill_gram(rows[..., h:, :], columns[..., h:], out[..., h:, h:])
    np.matmul(rows[..., h:, :], columns[..., :h], out=out[..., h:, :h])
    np.conjugate(out[..., h:, :h].swapaxes(-1, -2), out=out[..., :h, h:])


def _by_gram(a: np.ndarray) -> np.ndarray:
    eigenvalues = np.linalg.eigvalsh(gram(a.astype(np.complex128)))
    return np.sqrt(np.maximum(eigenvalues, 0.0))[..., ::-1]


def exceeds(grams: np.ndarray, bound: float) -> np.ndarray:
    """Which Gram matrices have an eigenvalue above bound², up to rounding.

    The others have a Cholesky factor of ``bound²·I − G``, which is the certificate.
    """
    n = grams.shape[-1]
    shifted = -grams
    index = np.arange(n)
    shifted[..., index, index] += np.asarray(bound, grams.dtype) ** 2
    if _SINGLE:
        with np.errstate(invalid="ignore"):
            factor = _lapack.cholesky_lo(shifted)
        return np.asarray(np.isnan(factor[..., -1, -1]))
    return np.array([_has_no_factor(matrix) for matrix in shifted.reshape(-1, n, n)])


def _has_no_factor(matrix: np.ndarray) -> bool:
    try:
        np.linalg.cholesky(matrix)
    except np.linalg.LinAlgError:
        return True
    return False
