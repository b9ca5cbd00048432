"""The one seam between the algorithms and what the array libraries do differently.

Everything else in the core sees a namespace `xp` of the Array API standard and its arrays.
What the standard lacks (half precision, solvers that fail, tracing) is settled here.
"""

from __future__ import annotations

import math
import sys
from functools import cache
from typing import Any

import array_api_compat as compat
import numpy as np

from specops.errors import NonFiniteError, UnsupportedArrayError

Array = Any
Namespace = Any

_COMPUTE = {
    "float16": "float32",
    "bfloat16": "float32",
    "float32": "float32",
    "float64": "float64",
    "complex32": "complex64",
    "complex64": "complex64",
    "complex128": "complex128",
}
_REAL = {
    "complex64": "float32",
    "complex128": "float64",
}
_COMPLEX = {"float32": "complex64", "float64": "complex128"}


def dtype_name(dtype: Any) -> str:
    """The bare name of a dtype, the same on every backend: ``"float32"``."""
    return str(dtype).rsplit(".", 1)[-1]


def namespace(w: Array) -> Namespace:
    """Return the Array API namespace of `w`, or say why `w` cannot be measured."""
    problem = _unmeasurable(w)
    if problem:
        raise UnsupportedArrayError(problem)
    return compat.array_namespace(w)


def _unmeasurable(w: Array) -> str | None:
    kind = type(w).__name__
    if kind.startswith("Uninitialized"):
        return f"the weight is a lazy {kind} without a shape yet: run one forward pass first"
    if not compat.is_array_api_obj(w):
        return (
            f"expected an array of NumPy, CuPy, torch, JAX or another Array API library, "
            f"got {kind}: convert it first, for example with numpy.asarray"
        )
    if getattr(w, "is_meta", False):
        return "the weight is on the meta device and holds no values: materialise it first"
    if getattr(w, "is_quantized", False):
        return "the weight is stored quantised: dequantise it first"
    if "sparse" in str(getattr(w, "layout", "")):
        return "the weight is sparse: convert it to a dense array first"
    name = dtype_name(w.dtype)
    if name not in _COMPUTE:
        return (
            f"dtype {name} cannot be measured: cast the weight to float32 first "
            f"(supported: {', '.join(_COMPUTE)})"
        )
    return None


def to_compute(xp: Namespace, w: Array) -> Array:
    """`w` in the dtype its decompositions run in: half precision becomes float32."""
    target = getattr(xp, _COMPUTE[dtype_name(w.dtype)])
    return w if w.dtype == target else xp.astype(w, target)


def real_dtype(xp: Namespace, dtype: Any) -> Any:
    name = dtype_name(dtype)
    return getattr(xp, _REAL[name]) if name in _REAL else dtype


def complex_dtype(xp: Namespace, dtype: Any) -> Any:
    name = dtype_name(dtype)
    return getattr(xp, _COMPLEX[name]) if name in _COMPLEX else dtype


def is_complex(x: Array) -> bool:
    return dtype_name(x.dtype).startswith("complex")


def epsilon(dtype: Any) -> float:
    """Unit roundoff spacing of a dtype, half precision included."""
    name = dtype_name(dtype)
    if name == "bfloat16":
        return 2.0**-7
    return float(np.finfo(_REAL.get(name, name)).eps)


def constant(values: np.ndarray, like: Array, *, complex: bool = False) -> Array:
    """A host table on the device of `like`, in its real (or complex) compute dtype.

    Integer tables become 32-bit indices, which every device has.
    """
    xp = compat.array_namespace(like)
    if values.dtype.kind in "fc":
        name = _COMPUTE[dtype_name(like.dtype)]
        name = _REAL.get(name, name)
        values = values.astype(_COMPLEX[name] if complex else name)
    elif values.dtype.kind in "iu":
        values = values.astype(np.int32)
    if compat.is_jax_array(like):
        return xp.asarray(values)
    return xp.asarray(values, device=compat.device(like))


def to_numpy(x: Array) -> np.ndarray:
    """A concrete array on the host."""
    if compat.is_torch_array(x):
        x = x.detach().cpu()
    elif compat.is_cupy_array(x):
        x = x.get()
    elif not compat.is_numpy_array(x) and not compat.is_jax_array(x):
        info = compat.array_namespace(x).__array_namespace_info__()
        x = compat.to_device(x, info.default_device())
    return np.asarray(x)


def argmax(xp: Namespace, x: Array) -> Array:
    """Index (shape (1,)) of the largest entry of `x` flattened."""
    flat = xp.reshape(x, (-1,))
    if truth(all_finite(xp, flat)) is None:
        return xp.reshape(xp.argmax(flat), (1,))
    return constant(np.asarray([int(np.argmax(to_numpy(flat)))]), flat)


def zeros(shape: tuple[int, ...], like: Array) -> Array:
    """Zeros of the dtype and device of `like`."""
    xp = compat.array_namespace(like)
    if compat.is_jax_array(like):
        return xp.zeros(shape, dtype=like.dtype)
    return xp.zeros(shape, dtype=like.dtype, device=compat.device(like))


def add_at(x: Array, index: Any, value: Array) -> Array:
    """`x` with `value` added at `index`; `x` must be the caller's own and not used again."""
    if compat.is_jax_array(x):
        return x.at[index].add(value)
    x[index] += value
    return x


def fori(xp: Namespace, first: int, last: int, body: Any, carry: Any) -> Any:
    """``for j in range(first, last): carry = body(j, carry)``, not unrolled by a compiler."""
    if compat.is_jax_namespace(xp):
        return sys.modules["jax"].lax.fori_loop(first, last, body, carry)
    for j in range(first, last):
        carry = body(j, carry)
    return carry


def compiles_per_shape(xp: Namespace) -> bool:
    """Whether picking a subset of varying size costs a compilation each time."""
    return bool(compat.is_jax_namespace(xp))


def compiled(function: Any, static: tuple[Any, ...], *arrays: Array) -> Any:
    """``function(*static, *arrays)``, compiled once per shape where eager loops are slow."""
    if compat.is_jax_array(arrays[0]):
        return _jax_jit(function, len(static))(*static, *arrays)
    return function(*static, *arrays)


@cache
def _jax_jit(function: Any, static: int) -> Any:
    return sys.modules["jax"].jit(function, static_argnums=tuple(range(static)))


def along_axis(xp: Namespace, x: Array, table: np.ndarray, axis: int) -> Array:
    """Apply a host matrix (from, to) along one axis."""
    order = list(range(x.ndim))
    order[axis], order[-1] = order[-1], order[axis]
    matrix = constant(table, x, complex=is_complex(x))
    return xp.permute_dims(xp.permute_dims(x, tuple(order)) @ matrix, tuple(order))


def truth(flag: Array) -> bool | None:
    """The value of a 0-d boolean array, or None while a compiler is only tracing it."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.compiler.is_compiling():
        return None
    jax = sys.modules.get("jax")
    if jax is not None and isinstance(flag, jax.core.Tracer):
        return None
    try:
        return bool(flag)
    except RuntimeError:
        # torch.func.vmap: the flag differs across the mapped axis.
        return None


def all_finite(xp: Namespace, x: Array, axis: Any = None) -> Array:
    return xp.all(xp.isfinite(x), axis=axis)


def check_finite(xp: Namespace, w: Array, what: str = "the weight") -> None:
    """Raise if `w` holds NaN or infinity; silent while `w` is being traced."""
    if truth(all_finite(xp, w)) is False:
        raise NonFiniteError(
            f"{what} holds NaN or infinity (shape {tuple(w.shape)}): look for a diverged step, "
            f"an overflow in half precision, or a bad checkpoint"
        )


def magnitude(xp: Namespace, x: Array, axis: Any = None) -> Array:
    """The power of two at or below max|x|, kept as a dimension: 1 for zeros.

    Dividing by it makes squares safe from overflow and underflow and rounds nothing.
    """
    largest = xp.max(xp.abs(x), axis=axis, keepdims=True)
    ones = xp.ones_like(largest)
    exponent = xp.floor(xp.log2(xp.where(largest > 0, largest, ones)))
    limit = 1000.0 if dtype_name(largest.dtype) == "float64" else 120.0
    exponent = xp.clip(exponent, -limit, limit)
    return xp.where(xp.isfinite(exponent), 2.0**exponent, ones)


def complex_of(xp: Namespace, real: Array, imag: Array) -> Array:
    """real + i·imag, in one pass where the library has one."""
    dtype = complex_dtype(xp, real.dtype)
    if compat.is_numpy_namespace(xp) or compat.is_cupy_namespace(xp):
        out = xp.empty(real.shape, dtype=dtype)
        out.real = real
        out.imag = imag
        return out
    if compat.is_torch_namespace(xp):
        return xp.complex(real, imag)
    if compat.is_jax_namespace(xp):
        return sys.modules["jax"].lax.complex(real, imag)
    return xp.astype(real, dtype) + 1j * xp.astype(imag, dtype)


def adjoint(xp: Namespace, a: Array) -> Array:
    """Conjugate transpose of the last two axes."""
    a = xp.matrix_transpose(a)
    return xp.conj(a) if is_complex(a) else a


def _did_not_converge(error: Exception) -> bool:
    return type(error).__name__ in {"LinAlgError", "_LinAlgError"}


def svdvals(xp: Namespace, a: Array) -> Array:
    """Singular values of stacked matrices, descending; survives a solver that gives up.

    Weights that were just clipped have many equal singular values, which some LAPACK builds
    fail on in single precision: the second try is in double precision, the third by the
    eigenvalues of the Gram matrix.
    """
    try:
        return xp.linalg.svdvals(a)
    except Exception as error:
        if not _did_not_converge(error):
            raise
        return _svd_fallback(xp, a, vectors=False)


def svd(xp: Namespace, a: Array) -> tuple[Array, Array, Array]:
    """Thin SVD ``(u, s, vh)`` of stacked matrices, with the fallbacks of `svdvals`."""
    try:
        u, s, vh = xp.linalg.svd(a, full_matrices=False)
        return u, s, vh
    except Exception as error:
        if not _did_not_converge(error):
            raise
        result: tuple[Array, Array, Array] = _svd_fallback(xp, a, vectors=True)
        return result


def _svd_fallback(xp: Namespace, a: Array, *, vectors: bool) -> Any:
    check_finite(xp, a, "the matrix")
    double = xp.astype(a, xp.complex128 if is_complex(a) else xp.float64)
    real = real_dtype(xp, a.dtype)
    try:
        if not vectors:
            return xp.astype(xp.linalg.svdvals(double), real)
        u, s, vh = xp.linalg.svd(double, full_matrices=False)
    except Exception as error:
        if not _did_not_converge(error):
            raise
        u, s, vh = _svd_by_gram(xp, double)
    if not vectors:
        return xp.astype(s, real)
    return xp.astype(u, a.dtype), xp.astype(s, real), xp.astype(vh, a.dtype)


def _svd_by_gram(xp: Namespace, a: Array) -> tuple[Array, Array, Array]:
    wide = a.shape[-2] < a.shape[-1]
    tall = adjoint(xp, a) if wide else a
    _, v = xp.linalg.eigh(adjoint(xp, tall) @ tall)
    v = xp.flip(v, axis=-1)
    # QR of A·V has R diagonal up to rounding: its diagonal gives sharper values than sqrt(λ).
    q, r = xp.linalg.qr(tall @ v)
    diagonal = xp.linalg.diagonal(r)
    s = xp.abs(diagonal)
    order = xp.argsort(-s, axis=-1)
    safe = xp.where(s > 0, diagonal / xp.where(s > 0, s, xp.ones_like(s)), xp.ones_like(diagonal))
    u = q * safe[..., None, :]
    s = xp.take_along_axis(s, order, axis=-1)
    u = xp.take_along_axis(u, order[..., None, :] + xp.zeros(u.shape, dtype=order.dtype), axis=-1)
    v = xp.take_along_axis(v, order[..., None, :] + xp.zeros(v.shape, dtype=order.dtype), axis=-1)
    return (v, s, adjoint(xp, u)) if wide else (u, s, adjoint(xp, v))


def start_vector(name: str, size: int, seed: int = 0) -> np.ndarray:
    """A unit vector fixed by a layer's name: the same on every backend, device and rank."""
    from zlib import crc32

    key = np.array([seed, crc32(name.encode())], dtype=np.uint64)
    raw = np.random.Philox(key=key).random_raw(size)
    vector = raw.astype(np.float64) * (2.0 / 2**64) - 1.0
    return np.asarray(vector / math.sqrt(float(vector @ vector)))
