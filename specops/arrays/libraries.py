"""The array library to which an array or a namespace belongs."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np

from specops.arrays.numpy import NumPy
from specops.arrays.standard import Library
from specops.typing import Array, Namespace

_STANDARD, _NUMPY = Library(), NumPy()
_TOLD_BY_BASE: list[tuple[Any, Library]] = []
"""(class, library) of torch, once a tensor has come: constant from then on, as compilers need
it."""
_BY_TYPE: dict[type, Library] = {np.ndarray: _NUMPY, bool: _STANDARD}
_BY_NAMESPACE: dict[str, Library] = {}
_OF_OTHERS = (("jax", "Array"), ("jax.core", "Tracer"), ("cupy", "ndarray"))
_INSTANCES: dict[str, Library] = {"numpy": _NUMPY}


def library(x: Array) -> Library:
    """The library of an array, by the type of the array."""
    for base, found in _TOLD_BY_BASE:
        if isinstance(x, base):
            return found
    # Another thread may be importing torch now; without the class there are no tensors yet.
    tensor = None if _TOLD_BY_BASE else getattr(sys.modules.get("torch"), "Tensor", None)
    if tensor is not None and isinstance(x, tensor):
        _TOLD_BY_BASE.append((tensor, _instance("torch")))
        return library(x)
    known = _BY_TYPE.get(type(x))
    return _recognised(type(x)) if known is None else known


def library_of(xp: Namespace) -> Library:
    """The library of a namespace."""
    name = getattr(xp, "__name__", "")
    found = _BY_NAMESPACE.get(name)
    if found is None:
        top = name.removeprefix("array_api_compat.").partition(".")[0]
        found = _instance(top) if top in ("numpy", "torch", "jax", "cupy") else _STANDARD
        _BY_NAMESPACE[name] = found
    return found


def if_loaded(module: str) -> Library | None:
    """A library by its module's name; None if nothing has imported it."""
    return None if sys.modules.get(module) is None else _instance(module)


def _recognised(kind: type) -> Library:
    found = _NUMPY if issubclass(kind, (np.ndarray, np.generic)) else _STANDARD
    for module, base in _OF_OTHERS:
        if issubclass(kind, getattr(sys.modules.get(module), base, ())):
            found = _instance(module.partition(".")[0])
    _BY_TYPE[kind] = found
    return found


def _instance(name: str) -> Library:
    if name not in _INSTANCES:
        _INSTANCES[name] = _made(name)
    return _INSTANCES[name]


def _made(name: str) -> Library:
    # Imports are written out, because compilers cannot follow an import by name.
    if name == "torch":
        from specops.arrays.torch import Torch

        return Torch()
    if name == "jax":
        from specops.arrays.jax import Jax

        return Jax()
    from specops.arrays.cupy import CuPy

    return CuPy()
