"""The one seam between the algorithms and what the array libraries do differently.

Everything else in the core sees a namespace `xp` of the Array API standard and its arrays.
What the standard lacks (half precision, solvers that fail, tracing) is settled here.
"""

from __future__ import annotations

import functools
import math
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache
from importlib import import_module
from typing import Any, ParamSpec, TypeVar

import array_api_compat as compat
import numpy as np

from specops import kinds
from specops.errors import NonFiniteError, UnsupportedArrayError

Array = Any
Namespace = Any
P = ParamSpec("P")
R = TypeVar("R")

_COMPUTE = {
    "float16": "float32",
    "bfloat16": "float32",
    "float32": "float32",
    "float64": "float64",
    "complex32": "complex64",
    "complex64": "complex64",
    "complex128": "complex128",
}
_HALF = {"float16": (5, 10), "bfloat16": (8, 7)}
"""Exponent and mantissa bits."""
_REAL = {
    "complex64": "float32",
    "complex128": "float64",
}
_COMPLEX = {"float32": "complex64", "float64": "complex128"}


def dtype_name(dtype: Any) -> str:
    """The bare name of a dtype, the same on every backend: ``"float32"``."""
    return str(dtype).rsplit(".", 1)[-1].rstrip("'>")


def namespace(w: Array) -> Namespace:
    """Return the Array API namespace of `w`, or say why `w` cannot be measured."""
    torch = sys.modules.get("torch")
    # A compiler traces what ran before, and not everything that the checks look at.
    traced = torch is not None and torch.compiler.is_compiling()
    problem = None if traced else _unmeasurable(w)
    if problem:
        raise UnsupportedArrayError(problem)
    xp = compat.array_namespace(w)
    problem = None if traced else kinds.problem_of_namespace(xp)
    if problem:
        raise UnsupportedArrayError(problem)
    return xp


def _unmeasurable(w: Array) -> str | None:
    problem = kinds.problem(w)
    if problem is not None:
        return problem
    if getattr(w, "is_meta", False):
        return "the weight is on the meta device and holds no values: materialise it first"
    if getattr(w, "is_quantized", False):
        return "the weight is stored quantised: dequantise it first"
    layout = str(getattr(w, "layout", ""))
    if "sparse" in layout:
        return "the weight is sparse: convert it to a dense array first"
    if "mkldnn" in layout:
        return "the weight is in the layout of MKL-DNN: convert it with w.to_dense() first"
    if getattr(w, "is_nested", False):
        return "the weight is a nested tensor: convert each of its tensors, w.unbind(), instead"
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


def rounded(xp: Namespace, x: Array, dtype: Any) -> Array:
    """`x` in `dtype`, to that precision also where a compiler would rather keep more."""
    info = _HALF.get(dtype_name(dtype))
    if info is not None and is_jax_traced(x):
        x = sys.modules["jax"].lax.reduce_precision(x, *info)
    return xp.astype(x, dtype)


def real_dtype(xp: Namespace, dtype: Any) -> Any:
    name = dtype_name(dtype)
    return getattr(xp, _REAL[name]) if name in _REAL else dtype


def complex_dtype(xp: Namespace, dtype: Any) -> Any:
    name = dtype_name(dtype)
    return getattr(xp, _COMPLEX[name]) if name in _COMPLEX else dtype


def double_dtype(xp: Namespace, x: Array) -> Any:
    """The double precision dtype of the kind of `x`, None where its device has none."""
    if str(getattr(x, "device", "")).startswith("mps"):
        return None
    if compat.is_torch_array(x) or compat.is_numpy_array(x):
        return xp.complex128 if is_complex(x) else xp.float64
    kind = "complex floating" if is_complex(x) else "real floating"
    info = xp.__array_namespace_info__()
    where = {} if compat.is_jax_array(x) else {"device": compat.device(x)}
    return info.dtypes(kind=kind, **where).get("complex128" if is_complex(x) else "float64")


def device_of(x: Array) -> Any:
    """The device of a concrete array; None where the library places arrays itself."""
    if isinstance(x, np.ndarray):
        return "cpu"
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(x, torch.Tensor):
        return x.device
    return None if compat.is_jax_array(x) else compat.device(x)


def is_complex(x: Array) -> bool:
    if isinstance(x, np.ndarray):
        return bool(x.dtype.kind == "c")
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
        return np.asarray(torch_to_numpy(x))
    if compat.is_cupy_array(x):
        x = x.get()
    elif not compat.is_numpy_array(x) and not compat.is_jax_array(x):
        info = compat.array_namespace(x).__array_namespace_info__()
        x = compat.to_device(x, info.default_device())
    return np.asarray(x)


def argmax(xp: Namespace, x: Array) -> Array:
    """Index (shape (1,)) of the largest entry of `x` flattened."""
    flat = xp.reshape(x, (-1,))
    if is_traced(flat) or compat.is_torch_array(x) or compat.is_cupy_array(x):
        return xp.reshape(xp.argmax(flat), (1,))
    return constant(np.asarray([int(np.argmax(to_numpy(flat)))]), flat)


def solving(a: Array) -> AbstractContextManager[None]:
    """Let solvers raise where they fail: CuPy's give numbers without a word unless asked to."""
    if compat.is_cupy_array(a):
        context: AbstractContextManager[None] = import_module("cupyx").errstate(linalg="raise")
        return context
    return nullcontext()


def try_cholesky(xp: Namespace, a: Array) -> tuple[Array, Array]:
    """(Cholesky factors of stacked matrices, which of them exist); never an exception.

    Where there is no factor anything may stand in its place.
    """
    if compat.is_torch_array(a):
        factor, failed = sys.modules["torch"].linalg.cholesky_ex(a)
        return factor, failed == 0
    try:
        with solving(a):
            factor = xp.linalg.cholesky(a)
    except Exception as error:
        if type(error).__name__ != "LinAlgError":
            raise
        if a.ndim == 2:
            factor = a * math.nan
        elif a.shape[0] == 1:
            factor = try_cholesky(xp, a[0, ...])[0][None, ...]
        else:
            # By halves: few calls where few have no factor.
            half = a.shape[0] // 2
            parts = [try_cholesky(xp, part)[0] for part in (a[:half, ...], a[half:, ...])]
            factor = xp.concat(parts, axis=0)
    return factor, all_finite(xp, factor, axis=(-2, -1))


def like(values: Array, other: Array) -> Array:
    """`values` of any library and device on those of `other`, in its compute precision."""
    return constant(to_numpy(values), other, complex=is_complex(other))


def zeros(shape: tuple[int, ...], like: Array) -> Array:
    """Zeros of the dtype and device of `like`."""
    if compat.is_torch_array(like):
        return like.new_zeros(shape)  # under vmap mapped like `like`
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


def add_diagonal(xp: Namespace, a: Array, values: Array) -> Array:
    """Stacked matrices plus a multiple of the identity each; `a` must not be used again."""
    values = xp.astype(values, a.dtype)[..., None]
    if compat.is_torch_array(a):
        a.diagonal(dim1=-2, dim2=-1).add_(values)
        return a
    return a + values[..., None] * xp.eye(a.shape[-1], dtype=a.dtype, device=device_of(a))


def torch_to_numpy(x: Array) -> np.ndarray | None:
    """A torch tensor on the host, also under torch.func.grad; None under torch.func.vmap."""
    x = stop_gradient(x).cpu().resolve_conj().resolve_neg()
    internals = sys.modules["torch"]._C
    x = stop_gradient(x)
    if internals._functorch.is_functorch_wrapped_tensor(x):
        return None
    with internals._DisableFuncTorch():
        return np.asarray(x.numpy())


def stop_gradient(x: Array) -> Array:
    """`x` as a constant for differentiation."""
    if compat.is_torch_array(x):
        x = x.detach()
        if sys.modules["torch"].compiler.is_compiling():
            return x
        functorch = sys.modules["torch"]._C._functorch
        # torch.func.grad wraps tensors whose values are known.
        while functorch.is_gradtrackingtensor(x):
            x = functorch.get_unwrapped(x)
        return x
    if compat.is_jax_array(x):
        return sys.modules["jax"].lax.stop_gradient(x)
    return x


def with_derivative(value: Any, surrogate: Any, x: Array) -> Array:
    """``value(x)``, which differentiates like ``surrogate(x)``.

    The surrogate is only computed where a derivative is asked for.
    """
    if compat.is_torch_array(x):
        if not is_differentiated(x):
            return value(x)
        along = surrogate(x)
        return value(stop_gradient(x)) + (along - along.detach())
    if compat.is_jax_array(x) and is_traced(x):
        jax = sys.modules["jax"]
        function = jax.custom_jvp(value)
        function.defjvp(
            lambda primals, tangents: (
                value(*primals),
                jax.jvp(surrogate, primals, tangents)[1],
            )
        )
        return function(x)
    return value(x)


def fori(xp: Namespace, first: int, last: int, body: Any, carry: Any) -> Any:
    """``for j in range(first, last): carry = body(j, carry)``, not unrolled by a compiler."""
    if compat.is_jax_namespace(xp):
        return sys.modules["jax"].lax.fori_loop(first, last, body, carry)
    for j in range(first, last):
        carry = body(j, carry)
    return carry


def cond(flag: Array, yes: Any, no: Any) -> Any:
    """``yes()`` or ``no()``, decided on the device where the flag is only being traced."""
    known = truth(flag)
    if known is None:
        return sys.modules["jax"].lax.cond(flag, yes, no)
    return yes() if known else no()


def while_loop(cond: Any, body: Any, carry: Any) -> Any:
    """``while cond(carry): carry = body(carry)`` while JAX traces."""
    return sys.modules["jax"].lax.while_loop(cond, body, carry)


def compiled(function: Any, static: tuple[Any, ...], *arrays: Array) -> Any:
    """``function(*static, *arrays)``, compiled once per shape where eager loops are slow."""
    if compat.is_jax_array(arrays[0]):
        return _jax_jit(function, len(static))(*static, *arrays)
    return function(*static, *arrays)


def in_full_precision(function: Callable[P, R]) -> Callable[P, R]:
    """Run without torch's autocast, which takes products in half precision."""

    @functools.wraps(function)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> R:
        torch: Any = sys.modules.get("torch")
        for device in ("cpu", "cuda", "xpu") if torch is not None else ():
            if torch.is_autocast_enabled(device):
                with torch.autocast(device, enabled=False):
                    return wrapped(*args, **kwargs)
        return function(*args, **kwargs)

    return wrapped


@contextmanager
def ieee_products(xp: Namespace) -> Iterator[None]:
    """Products of float32 in float32, where the library may use shorter formats."""
    if compat.is_jax_namespace(xp):
        with sys.modules["jax"].default_matmul_precision("highest"):
            yield
        return
    if compat.is_cupy_namespace(xp):
        # What CUPY_TF32=1 sets, for which there is no other switch.
        products = sys.modules["cupy"]._core._routines_linalg
        single = np.dtype(np.float32)
        chosen = products.get_compute_type(single)
        products.set_compute_type(single, products.COMPUTE_TYPE_FP32)
        try:
            yield
        finally:
            products.set_compute_type(single, chosen)
        return
    torch = sys.modules.get("torch")
    if not compat.is_torch_namespace(xp) or torch is None or torch.compiler.is_compiling():
        yield
        return
    settings = torch.backends.cuda.matmul
    # The older switch refuses to be read once the newer one has been set.
    new = hasattr(settings, "fp32_precision")
    name, ieee = ("fp32_precision", "ieee") if new else ("allow_tf32", False)
    before = getattr(settings, name)
    setattr(settings, name, ieee)
    try:
        yield
    finally:
        setattr(settings, name, before)


@cache
def _jax_jit(function: Any, static: int) -> Any:
    return sys.modules["jax"].jit(function, static_argnums=tuple(range(static)))


def matmul(a: Array, b: Array) -> Array:
    """The product a b, without NumPy's warnings of invalid values.

    Where a factor may be a single row or column, NumPy calls BLAS's product with a vector, and
    OpenBLAS's in single precision computes with lanes it never filled if the matrix has five
    columns. They do not reach the result, but a signalling NaN in them raises the processor's
    flag, of which NumPy then warns for finite matrices. torch and JAX do not look at it.
    """
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(a, torch.Tensor):
        return a @ b
    with np.errstate(invalid="ignore"):
        return a @ b


def along_axis(xp: Namespace, x: Array, table: np.ndarray, axis: int) -> Array:
    """Apply a host matrix (from, to) along one axis."""
    order = list(range(x.ndim))
    order[axis], order[-1] = order[-1], order[axis]
    matrix = constant(table, x, complex=is_complex(x))
    return xp.permute_dims(matmul(xp.permute_dims(x, tuple(order)), matrix), tuple(order))


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
        return None  # torch.func.vmap: the flag differs across the mapped axis


def is_traced(x: Array) -> bool:
    """Whether the values of `x` are unknown now: under a compiler, or mapped by vmap."""
    jax = sys.modules.get("jax")
    if jax is not None and isinstance(x, jax.core.Tracer):
        return True
    if not compat.is_torch_array(x):
        return False
    torch = sys.modules["torch"]
    if torch.compiler.is_compiling():
        return True
    functorch = torch._C._functorch
    while functorch.is_gradtrackingtensor(x):
        x = functorch.get_unwrapped(x)
    return bool(functorch.is_batchedtensor(x))


def is_jax_traced(x: Array) -> bool:
    """Whether JAX traces `x`: loops of unknown length are possible then."""
    jax = sys.modules.get("jax")
    return jax is not None and isinstance(x, jax.core.Tracer)


def is_concrete(x: Array) -> bool:
    """Whether the values of `x` are known now and nothing is to be differentiated."""
    if compat.is_torch_array(x) and is_differentiated(x):
        return False
    return not is_traced(x)


def is_differentiated(x: Array) -> bool:
    """Whether a torch tensor carries a derivative, in reverse or forward mode."""
    torch = sys.modules["torch"]
    if x.requires_grad and torch.is_grad_enabled():
        return True
    if torch._C._functorch.is_gradtrackingtensor(x):
        return True
    return torch.autograd.forward_ad.unpack_dual(x).tangent is not None


def all_finite(xp: Namespace, x: Array, axis: Any = None) -> Array:
    if _scans_slowly(x):
        return xp.isfinite(largest_entry(xp, x, axis))
    return xp.all(xp.isfinite(x), axis=axis)


def _scans_slowly(x: Array) -> bool:
    """Whether only least and greatest values are found fast: torch on the CPU, by 20 times."""
    torch = sys.modules.get("torch")
    if torch is None or not isinstance(x, torch.Tensor) or x.device.type != "cpu":
        return False
    return bool(x.is_floating_point()) and x.numel() > 0


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
    return power_below(xp, largest_entry(xp, x, axis, keepdims=True))


def largest_entry(xp: Namespace, x: Array, axis: Any = None, *, keepdims: bool = False) -> Array:
    """max|x|, NaN where an entry is: in one pass where the library has one."""
    if _scans_slowly(x):
        dims = () if axis is None else axis
        return xp.maximum(x.amax(dims, keepdim=keepdims), -x.amin(dims, keepdim=keepdims))
    return xp.linalg.vector_norm(x, ord=math.inf, axis=axis, keepdims=keepdims)


def power_below(xp: Namespace, largest: Array) -> Array:
    """The power of two at or below positive numbers; 1 for zero and what is not finite."""
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


def conjugate(xp: Namespace, x: Array) -> Array:
    """Complex conjugate; real arrays as they are."""
    return xp.conj(x) if is_complex(x) else x


def adjoint(xp: Namespace, a: Array) -> Array:
    """Conjugate transpose of the last two axes."""
    return conjugate(xp, xp.matrix_transpose(a))


def start_vector(name: str, size: int, seed: int = 0) -> np.ndarray:
    """A unit vector fixed by a layer's name: the same on every backend, device and rank."""
    from zlib import crc32

    key = np.array([seed, crc32(name.encode())], dtype=np.uint64)
    raw = np.random.Philox(key=key).random_raw(size)
    vector = raw.astype(np.float64) * (2.0 / 2**64) - 1.0
    return np.asarray(vector / math.sqrt(float(vector @ vector)))
