"""JAX: values may be traced, loops are primitives, and loops outside of jit are slow."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, MutableMapping
from contextlib import AbstractContextManager, nullcontext
from copy import copy
from functools import cache
from typing import Any

import jax
import numpy as np

from specops.arrays.records import tell_of_records
from specops.arrays.standard import Library
from specops.typing import Array, Namespace


class Jax(Library):
    """Arrays and tracers of JAX."""

    finds_indices = True
    mixes_with_numpy = True

    def device(self, x: Array) -> Any:
        """None: JAX places arrays itself, and a tracer has no device."""
        return None

    def has_double(self, x: Array) -> bool:
        """Whether JAX is set to it; asking a tracer for its device would walk the whole trace."""
        return bool(jax.config.jax_enable_x64)

    def placed(self, xp: Namespace, values: np.ndarray, like: Array) -> Array:
        """Placed by JAX."""
        return xp.asarray(values)

    def zeros(self, shape: tuple[int, ...], like: Array) -> Array:
        """Placed by JAX."""
        return jax.numpy.zeros(shape, dtype=like.dtype)

    def to_numpy(self, x: Array) -> np.ndarray:
        """A view or a copy on the host."""
        return np.asarray(x)

    def on_host(self, x: Array) -> np.ndarray | None:
        """A read-only view."""
        if self.is_staged(x) or {d.platform for d in x.devices()} != {"cpu"}:
            return None
        return np.asarray(x)

    def is_dispatched(self, x: Any) -> bool:
        """Whether operations on `x` run one by one, on one CPU device."""
        if not isinstance(x, jax.Array) or isinstance(x, jax.core.Tracer):
            return False
        # Excludes arrays that are sharded over a mesh, and random keys.
        alone = isinstance(x.sharding, jax.sharding.SingleDeviceSharding)
        return alone and isinstance(x.dtype, np.dtype) and x.device.platform == "cpu"

    def on_numpy(self, function: Any, weight: Any, args: Any, kwargs: Any) -> Any:
        """The function's result, computed from NumPy views and converted back to JAX arrays.

        Arrays that it returns unchanged stay the caller's. If a tracer is among the arguments, or
        inside one of them, the function runs as it is.
        """
        leaves, structure = jax.tree.flatten((args, kwargs))
        if any(isinstance(x, jax.core.Tracer) for x in leaves):
            return function(*args, **kwargs)
        given: dict[int, Any] = {}
        views = [self._view(x, given) for x in leaves]
        own, named = jax.tree.unflatten(structure, views)
        try:
            result = function(*own, **named)
        except jax.errors.JAXTypeError:  # a schedule gave a tracer
            return function(*args, **kwargs)
        # If the weight is not on the default device, the user put it where it is.
        elsewhere = weight.device != jax.devices()[0]
        return _put_back(result, given, weight.device if elsewhere else None)

    def _view(self, x: Any, given: dict[int, Any]) -> Any:
        """A NumPy view, noted in `given`; of a mapping that is no JAX tree, one with views."""
        if isinstance(x, Mapping):
            return _like(x, {key: self._view(value, given) for key, value in x.items()})
        view = np.asarray(x) if self.is_dispatched(x) else x
        given[id(view)] = x
        return view

    def rounded(self, xp: Namespace, x: Array, dtype: Any, bits: tuple[int, int]) -> Array:
        """Rounded also where the compiler would rather keep more."""
        if self.is_staged(x):
            x = jax.lax.reduce_precision(x, *bits)
        return xp.astype(x, dtype)

    def truth(self, flag: Array) -> bool | None:
        """None for a tracer."""
        return None if isinstance(flag, jax.core.Tracer) else bool(flag)

    def is_traced(self, x: Array) -> bool:
        """Whether it is a tracer."""
        return isinstance(x, jax.core.Tracer)

    def is_staged(self, x: Array) -> bool:
        """Whether it is a tracer."""
        return isinstance(x, jax.core.Tracer)

    def is_concrete(self, x: Array) -> bool:
        """Whether it is no tracer."""
        return not isinstance(x, jax.core.Tracer)

    def stop_gradient(self, x: Array) -> Array:
        """`jax.lax.stop_gradient`."""
        return jax.lax.stop_gradient(x)

    def with_derivative(self, value: Any, surrogate: Any, x: Array, *constants: Array) -> Array:
        """A function with a rule of its own."""
        if not self.is_traced(x):
            return value(x, *constants)
        function = jax.custom_jvp(value)

        def rule(primals: Any, tangents: Any) -> Any:
            x, *others = primals
            along = jax.jvp(lambda x: surrogate(x, *others), (x,), tangents[:1])[1]
            return value(*primals), along

        function.defjvp(rule)
        return function(x, *constants)

    def expanded(self, decompose: Any, expansion: Any, x: Array, *parameters: Array) -> Any:
        """A function with a rule of its own, whose decomposition is shared."""

        def value(x: Array, *parameters: Array) -> Any:
            return expansion(None, decompose(x), *parameters)

        if not any(self.is_traced(y) for y in (x, *parameters)):
            return value(x, *parameters)

        def rule(primals: Any, tangents: Any) -> Any:
            x, *rest = primals
            factors = decompose(x)
            return jax.jvp(
                lambda h, *rest: expansion(h, factors, *rest),
                (jax.numpy.zeros_like(x), *rest),
                tangents,
            )

        function = jax.custom_jvp(value)
        function.defjvp(rule)
        return function(x, *parameters)

    def fori(self, first: int, last: int, body: Any, carry: Any) -> Any:
        """A loop that is not unrolled."""
        return jax.lax.fori_loop(first, last, body, carry)

    def cond(self, flag: Array, yes: Any, no: Any) -> Any:
        """Decided on the device where the flag is traced."""
        known = self.truth(flag)
        if known is None:
            return jax.lax.cond(flag, yes, no)
        return yes() if known else no()

    def while_loop(self, cond: Any, body: Any, carry: Any) -> Any:
        """A traced loop."""
        return jax.lax.while_loop(cond, body, carry)

    def compiled(self, function: Any, static: tuple[Any, ...], *arrays: Array) -> Any:
        """Compiled once per shape."""
        return _jit(function, len(static))(*static, *arrays)

    def argmax(self, xp: Namespace, flat: Array) -> Array:
        """On the host if the value is known, which saves compiling a program."""
        if self.is_staged(flat):
            return super().argmax(xp, flat)
        return xp.asarray(np.asarray([np.argmax(np.asarray(flat))], np.int32))

    def matmul(self, a: Array, b: Array) -> Array:
        """The product: this library does not warn."""
        return a @ b

    def eigh(self, xp: Namespace, a: Array) -> tuple[Array, Array]:
        """From the lower triangle alone, without symmetrizing."""
        values, vectors = jax.numpy.linalg.eigh(a, symmetrize_input=False)
        return values, vectors

    def has_cholesky(self, xp: Namespace, a: Array) -> Array:
        """By the last entry: where no factor exists, the result is NaN throughout."""
        factor = jax.lax.linalg.cholesky(a, symmetrize_input=False)
        return xp.isfinite(xp.real(factor[..., -1, -1]))

    def complex_of(self, xp: Namespace, real: Array, imag: Array, dtype: Any) -> Array:
        """In one pass."""
        return jax.lax.complex(real, imag)

    def add_at(self, x: Array, index: Any, value: Array) -> Array:
        """A new array, because JAX arrays cannot be changed."""
        return x.at[index].add(value)

    def broadcasting(self) -> AbstractContextManager[None]:
        """Allow broadcasting here, even if the user's ``jax_numpy_rank_promotion`` forbids it."""
        if jax.config.jax_numpy_rank_promotion == "allow":
            return nullcontext()
        context: AbstractContextManager[None] = jax.numpy_rank_promotion("allow")
        return context

    def ieee_products(self) -> AbstractContextManager[None]:
        """By JAX's setting of the precision of products."""
        context: AbstractContextManager[None] = jax.default_matmul_precision("highest")
        return context


@cache
def _jit(function: Any, static: int) -> Any:
    return jax.jit(function, static_argnums=tuple(range(static)))


def _like(x: Any, values: dict[Any, Any]) -> Any:
    """A mapping of the type of `x` with other values; `x` itself if they are its own."""
    if all(values[key] is x[key] for key in x):
        return x
    if not isinstance(x, MutableMapping):
        try:
            return type(x)(values)
        except TypeError:  # its constructor does not take a mapping
            return values
    found = copy(x)  # keeps its other attributes, such as defaults
    found.update(values)
    return found


def _put_back(x: Any, given: dict[int, Any], device: Any) -> Any:
    """JAX arrays in place of NumPy arrays, also within containers and dataclasses."""
    if isinstance(x, np.ndarray | np.generic):
        if id(x) in given:
            return given[id(x)]
        return jax.numpy.array(x) if device is None else jax.device_put(x, device)
    if isinstance(x, Mapping):
        return _like(x, {key: _put_back(value, given, device) for key, value in x.items()})
    if isinstance(x, tuple | list):
        parts = [_put_back(part, given, device) for part in x]
        return type(x)(*parts) if hasattr(x, "_fields") else type(x)(parts)
    if dataclasses.is_dataclass(x) and not isinstance(x, type):
        names = [field.name for field in dataclasses.fields(x) if field.init]
        return dataclasses.replace(x, **{n: _put_back(getattr(x, n), given, device) for n in names})
    return x


def _register(kind: type, fixed: tuple[str, ...]) -> None:
    """Register a record with JAX, so that functions under ``jit`` and ``vmap`` may return it."""
    names = [field.name for field in dataclasses.fields(kind)]
    free = [name for name in names if name not in fixed]
    jax.tree_util.register_dataclass(kind, free, list(fixed))


tell_of_records(_register)
