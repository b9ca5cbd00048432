"""`entry`: what public functions of arrays do before their own work."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

from specops.arrays.libraries import if_loaded
from specops.arrays.products import in_full_precision

P = ParamSpec("P")
R = TypeVar("R")


def entry(function: Callable[P, R]) -> Callable[P, R]:
    """Run `in_full_precision`, and run JAX arrays on the CPU through NumPy outside of jit.

    Outside of jit JAX compiles each operation for each new shape, which takes seconds where NumPy
    takes milliseconds. If the first array is a JAX array on a single CPU device, the function gets
    NumPy views, and its results are converted back. Under jit, grad and vmap, and on other devices,
    nothing changes.
    """
    whole = in_full_precision(function)

    @functools.wraps(function)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> R:
        jax, torch = if_loaded("jax"), if_loaded("torch")
        if jax is None or (torch is not None and torch.is_compiling()):
            return whole(*args, **kwargs)
        weight = _first_array(args, kwargs)
        if not jax.is_dispatched(weight):
            return whole(*args, **kwargs)
        result: R = jax.on_numpy(whole, weight, args, kwargs)
        return result

    return wrapped


def _first_array(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    given = (x for x in (*args, *kwargs.values()) if hasattr(x, "dtype"))
    return next(given, None)
