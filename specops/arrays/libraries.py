"""Which array library something belongs to."""

from __future__ import annotations

import sys
from importlib import import_module

import numpy as np

from specops.arrays.numpy import NumPy
from specops.arrays.standard import Library
from specops.typing import Array, Namespace

_STANDARD, _NUMPY = Library(), NumPy()
_BY_TYPE: dict[type, Library] = {np.ndarray: _NUMPY, bool: _STANDARD}
_BY_NAMESPACE: dict[str, Library] = {}
_CLASSES = {"numpy": "NumPy", "torch": "Torch", "jax": "Jax", "cupy": "CuPy"}
_OF_OTHERS = (("torch", "Tensor"), ("jax", "Array"), ("jax.core", "Tracer"), ("cupy", "ndarray"))
_INSTANCES: dict[str, Library] = {"NumPy": _NUMPY}


def library(x: Array) -> Library:
    """What is known of the library of an array, by the type of the array."""
    found = _BY_TYPE.get(type(x))
    return _recognised(type(x)) if found is None else found


def library_of(xp: Namespace) -> Library:
    """The same of a namespace."""
    name = xp.__name__
    found = _BY_NAMESPACE.get(name)
    if found is None:
        top = name.removeprefix("array_api_compat.").partition(".")[0]
        found = _instance(_CLASSES[top]) if top in _CLASSES else _STANDARD
        _BY_NAMESPACE[name] = found
    return found


def if_loaded(module: str) -> Library | None:
    """What is known of a library that something has imported, None if nothing has."""
    return _instance(_CLASSES[module]) if module in sys.modules else None


def _recognised(kind: type) -> Library:
    found = _STANDARD
    if issubclass(kind, np.ndarray | np.generic):
        found = _NUMPY
    for module, base in _OF_OTHERS:
        if module in sys.modules and issubclass(kind, getattr(sys.modules[module], base)):
            found = _instance(_CLASSES[module.partition(".")[0]])
    _BY_TYPE[kind] = found
    return found


def _instance(name: str) -> Library:
    if name not in _INSTANCES:
        module = import_module(f"specops.arrays.{name.lower()}")
        _INSTANCES[name] = getattr(module, name)()
    return _INSTANCES[name]
