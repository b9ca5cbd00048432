"""torch: compilers and transforms that hide values, autograd, autocast, and slow operations."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from specops.arrays import workers
from specops.arrays.standard import SPLIT_FROM, Library
from specops.typing import Array, Namespace

_FACTOR_FROM = 256
"""Side from which a Cholesky factor by blocks of columns, in place, takes half the time of torch's
own, which copies a triangle against the order of memory."""
_FACTOR_BLOCK = 96
"""Columns of such a block: a choice between few products and small diagonal blocks, which are
copied."""
_STRIPS_FROM = 512
"""Smaller side from which only the lower triangle of a Gram matrix is formed, in strips of columns
that are then at least 64 wide: a choice between fewer multiplications and thinner products."""
_STRIPS = 8
"""The number of strips: with it they take 9/16 of the multiplications of the whole matrix; more
strips would take down to a half."""
_CAST = 512
"""Length of the pieces that are cast to double precision: small enough to stay in the cache."""


class Torch(Library):
    """Tensors of torch."""

    solves_alone = True
    finds_indices = True

    def device(self, x: Array) -> Any:
        """Its device."""
        return x.device

    def placed(self, xp: Namespace, values: np.ndarray, like: Array) -> Array:
        """On the device of `like`."""
        return xp.asarray(values, device=like.device)

    def zeros(self, shape: tuple[int, ...], like: Array) -> Array:
        """Zeros of the dtype and device of `like`; under vmap batched like it."""
        return like.new_zeros(shape)

    def to_numpy(self, x: Array) -> np.ndarray:
        """A view if it is on the CPU, else a copy."""
        return np.asarray(_values(x))

    def on_host(self, x: Array) -> np.ndarray | None:
        """A view; None under vmap and compilers."""
        if is_differentiated(x) or x.device.type != "cpu" or torch.compiler.is_compiling():
            return None
        return _values(x)

    def is_constant_on_host(self, x: Array) -> bool:
        """A tensor of the CPU outside compilers, transforms and autograd."""
        return x.device.type == "cpu" and not (
            torch.compiler.is_compiling()
            or torch._C._functorch.is_functorch_wrapped_tensor(x)
            or is_differentiated(x)
        )

    def host_view(self, x: Array) -> np.ndarray:
        """The view that shares memory."""
        array: np.ndarray = (x.detach() if x.requires_grad else x).numpy()
        return array

    def from_host(self, values: np.ndarray, like: Array) -> Array:
        """Shares memory if possible."""
        if not values.flags.writeable or min(values.strides, default=0) < 0:
            values = values.copy()
        return torch.from_numpy(values)

    def is_complex(self, x: Array) -> bool:
        """By the dtype."""
        return bool(x.dtype.is_complex)

    def solvers_raise(self, x: Array) -> bool:
        """On the CPU."""
        return bool(x.device.type == "cpu")

    def has_double(self, x: Array) -> bool:
        """Everywhere but on Apple's GPUs."""
        return bool(x.device.type != "mps")

    def is_compiling(self) -> bool:
        """Under `torch.compile` and export."""
        return bool(torch.compiler.is_compiling())

    def truth(self, flag: Array) -> bool | None:
        """None under a compiler, and under vmap if the flag differs along the mapped axis."""
        if torch.compiler.is_compiling():
            return None
        try:
            return bool(flag)
        except RuntimeError:
            return None

    def is_traced(self, x: Array) -> bool:
        """Under a compiler, or mapped by vmap."""
        if torch.compiler.is_compiling():
            return True
        functorch = torch._C._functorch
        while functorch.is_gradtrackingtensor(x):
            x = functorch.get_unwrapped(x)
        return bool(functorch.is_batchedtensor(x))

    def is_concrete(self, x: Array) -> bool:
        """Neither traced nor differentiated."""
        return not is_differentiated(x) and not self.is_traced(x)

    def stop_gradient(self, x: Array) -> Array:
        """Detached, also from what torch.func.grad wraps it in."""
        x = x.detach()
        if torch.compiler.is_compiling():
            return x
        functorch = torch._C._functorch
        while functorch.is_gradtrackingtensor(x):
            x = functorch.get_unwrapped(x)
        return x

    def with_derivative(self, value: Any, surrogate: Any, x: Array, *constants: Array) -> Array:
        """The surrogate is computed only if a derivative is needed."""
        if not is_differentiated(x):
            return value(x, *constants)
        along = surrogate(x, *constants)
        return value(self.stop_gradient(x), *constants) + (along - along.detach())

    def expanded(self, decompose: Any, expansion: Any, x: Array, *parameters: Array) -> Any:
        """An autograd function; under a compiler, the expansion about a constant instead."""
        if not any(is_differentiated(y) for y in (x, *parameters)):
            return expansion(None, decompose(x), *parameters)
        fixed = self.stop_gradient(x)
        factors = decompose(fixed)
        if torch.compiler.is_compiling():
            return expansion(x - fixed, factors, *parameters)
        return _Expansion.apply(decompose, expansion, len(factors), x, *factors, *parameters)

    def largest_entry(self, xp: Namespace, x: Array, axis: Any, keepdims: bool) -> Array:
        """From the minimum and maximum, which the CPU finds twenty times faster than the norm."""
        if not _scans_slowly(x):
            return super().largest_entry(xp, x, axis, keepdims)
        dims = () if axis is None else axis
        return torch.maximum(x.amax(dims, keepdim=keepdims), -x.amin(dims, keepdim=keepdims))

    def all_finite(self, xp: Namespace, x: Array, axis: Any) -> Array:
        """As `largest_entry`."""
        if not _scans_slowly(x):
            return super().all_finite(xp, x, axis)
        return torch.isfinite(self.largest_entry(xp, x, axis, keepdims=False))

    def matmul(self, a: Array, b: Array) -> Array:
        """The product: this library does not warn."""
        return a @ b

    def complex_of(self, xp: Namespace, real: Array, imag: Array, dtype: Any) -> Array:
        """In one pass."""
        return torch.complex(real, imag)

    def add_at(self, x: Array, index: Any, value: Array) -> Array:
        """By one operation: written back, all of a subclass's entries pass for a leaf."""
        x[index].add_(value)
        return x

    def add_diagonal(self, xp: Namespace, a: Array, values: Array) -> Array:
        """In place."""
        a.diagonal(dim1=-2, dim2=-1).add_(values)
        return a

    @contextmanager
    def ieee_products(self) -> Iterator[None]:
        """By torch's setting for products on GPUs, which compiled code does not see."""
        if torch.compiler.is_compiling():
            yield
            return
        settings: Any = torch.backends.cuda.matmul
        # The older switch cannot be read once the newer one has been set.
        new = hasattr(settings, "fp32_precision")
        name, ieee = ("fp32_precision", "ieee") if new else ("allow_tf32", False)
        before = getattr(settings, name)
        setattr(settings, name, ieee)
        try:
            yield
        finally:
            setattr(settings, name, before)

    def without_autocast(self, function: Callable[[], Any]) -> Any:
        """Run without autocast, under which products are in half precision."""
        for device in ("cpu", "cuda", "xpu"):
            if torch.is_autocast_enabled(device):
                with torch.autocast(device, enabled=False):
                    return self.without_autocast(function)
        return function()

    @contextmanager
    def one_thread(self, x: Array) -> Iterator[None]:
        """One thread in NumPy's BLAS, which works on views of tensors, and in torch's own.

        Not by `torch.set_num_threads`: threads that start meanwhile would keep that number.
        """
        if torch.compiler.is_compiling() or x.device.type != "cpu":
            yield
            return
        # A thread takes over torch's number at its first operation, or when it is asked for it.
        torch.get_num_threads()
        with workers.one_blas_thread(), workers.one_openmp_thread():
            yield

    def row_blocks(self, a: Array) -> Array | None:
        """As many blocks as threads, or twice as many; None if threads do not pay."""
        if a.numel() < SPLIT_FROM or not a.is_contiguous() or not self.is_constant_on_host(a):
            return None
        threads = torch.get_num_threads()
        count = next((c for c in (2 * threads, threads) if threads > 1 and len(a) % c == 0), 0)
        return a.view(count, -1, a.shape[1]) if count else None

    def gram(self, xp: Namespace, a: Array, dtype: Any) -> Array:
        """Of large matrices only the lower triangle, cast piece by piece."""
        if not self._by_strips(a):
            return super().gram(xp, a, dtype)
        size = min(a.shape)
        return self._fill_lower(xp, a.new_zeros((size, size), dtype=dtype), a)

    def _by_strips(self, a: Array) -> bool:
        large = a.ndim == 2 and min(a.shape) >= _STRIPS_FROM
        return large and self.on_host(a) is not None

    def _fill_lower(self, xp: Namespace, out: Array, a: Array) -> Array:
        """Write the Gram matrix to the lower triangle of `out`, in the precision of `out`."""
        rows = self.rows(xp, a)
        size, length = rows.shape
        piece = length if out.dtype == a.dtype else _CAST
        strip = -(-size // _STRIPS)
        for start in range(0, length, piece):
            left = rows[:, start : start + piece].to(out.dtype)
            right = self.adjoint(xp, left)
            for j in range(0, size, strip):
                out[j:, j : j + strip].addmm_(left[j:], right[:, j : j + strip], beta=min(start, 1))
        return out

    def try_cholesky(self, xp: Namespace, a: Array) -> tuple[Array, Array]:
        """torch says which factors exist."""
        factor, failed = torch.linalg.cholesky_ex(a)
        return factor, failed == 0

    def has_cholesky(self, xp: Namespace, a: Array) -> Array:
        """By blocks, in place, where that is faster."""
        if a.ndim != 2 or a.shape[0] < _FACTOR_FROM or not self.is_constant_on_host(a):
            return super().has_cholesky(xp, a)
        return xp.asarray(_factors_in_place(a), device=a.device)


class _Expansion(torch.autograd.Function):  # type: ignore[misc]
    """`Torch.expanded`; the factors are arguments, so that a first derivative can reuse them."""

    generate_vmap_rule = True

    @staticmethod
    def forward(decompose: Any, expansion: Any, count: int, x: Array, *others: Array) -> Any:
        return expansion(None, others[:count], *others[count:])

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.decompose, ctx.expansion, ctx.count = inputs[:3]
        ctx.save_for_backward(*inputs[3:])
        ctx.save_for_forward(*inputs[3:])

    @staticmethod
    def _at(ctx: Any) -> tuple[Any, tuple[Array, ...]]:
        """(the expansion as a function of h and the parameters, the point of its derivative)."""
        x, *others = ctx.saved_tensors
        factors, parameters = others[: ctx.count], others[ctx.count :]
        if torch.is_grad_enabled():
            factors = ctx.decompose(x)
        return (
            lambda h, *rest: ctx.expansion(h, factors, *rest),
            (torch.zeros_like(x), *parameters),
        )

    @staticmethod
    def backward(ctx: Any, *cotangents: Array) -> Any:
        function, point = _Expansion._at(ctx)
        _, pull = torch.func.vjp(function, *point)
        by_x, *by_parameters = pull(cotangents)
        return None, None, None, by_x, *([None] * ctx.count), *by_parameters

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        function, point = _Expansion._at(ctx)
        of_x, of_parameters = tangents[3], tangents[4 + ctx.count :]
        along = (of_x, *of_parameters)
        known = tuple(
            torch.zeros_like(p) if t is None else t for p, t in zip(point, along, strict=True)
        )
        # Forward mode cannot be nested, so the derivative is that of the pullback, which is linear.
        images, pull = torch.func.vjp(function, *point)
        zeros = tuple(map(torch.zeros_like, images))
        _, push = torch.func.vjp(lambda *cotangents: pull(cotangents), *zeros)
        return push(known)


def is_differentiated(x: Array) -> bool:
    """Whether a tensor carries a derivative, in reverse or forward mode."""
    if x.requires_grad and torch.is_grad_enabled():
        return True
    if torch._C._functorch.is_gradtrackingtensor(x):
        return True
    return torch.autograd.forward_ad.unpack_dual(x).tangent is not None


def _values(x: Array) -> np.ndarray | None:
    """A tensor on the host, also under torch.func.grad; None under torch.func.vmap."""
    library = Torch()
    x = library.stop_gradient(x).cpu().resolve_conj().resolve_neg()
    x = library.stop_gradient(x)
    if torch._C._functorch.is_functorch_wrapped_tensor(x):
        return None
    with torch._C._DisableFuncTorch():
        return np.asarray(x.numpy())


def _scans_slowly(x: Array) -> bool:
    """Whether scans other than minimum and maximum are slow, as they are on the CPU."""
    return bool(x.device.type == "cpu" and x.is_floating_point() and x.numel() > 0)


def _factors_in_place(a: Array) -> bool:
    """A left-looking Cholesky: from each block of columns subtract products of those before it."""
    size = a.shape[0]
    for start in range(0, size, _FACTOR_BLOCK):
        stop = min(start + _FACTOR_BLOCK, size)
        columns = a[start:, start:stop]
        columns.addmm_(a[start:, :start], a[start:stop, :start].mH, alpha=-1)
        corner, failed = torch.linalg.cholesky_ex(columns[: stop - start])
        if failed:
            return False
        rest = columns[stop - start :]
        rest.copy_(torch.linalg.solve_triangular(corner, rest.mH, upper=False).mH)
    return True
