"""Which kinds of arrays are supported, and what to do with others first.

Supported are arrays of NumPy, CuPy, torch and JAX, and of every library that follows the Array API
standard from version `OLDEST` on and whose arrays hold all their values.
"""

from __future__ import annotations

import sys
from functools import lru_cache
from typing import Any

import array_api_compat as compat
import numpy as np

from specops.arrays.dtypes import COMPUTE, dtype_name
from specops.arrays.libraries import library
from specops.errors import UnsupportedArrayError
from specops.typing import Array, Namespace

_MORE = (
    ("is_meta", "is on the meta device and holds no values: materialise it first"),
    ("is_quantized", "is stored quantised: dequantise it first"),
    ("is_nested", "is a nested tensor: convert each of its tensors, w.unbind(), instead"),
)
_LAYOUTS = (
    ("sparse", "is sparse: convert it to a dense array first"),
    ("mkldnn", "is in the layout of MKL-DNN: convert it with w.to_dense() first"),
)
OLDEST = "2023.12"
"""The first version of the standard with ``clip``, ``maximum`` and ``__array_namespace_info__``."""
_NATIVE = (
    ("numpy", "ndarray"),
    ("numpy", "generic"),
    ("torch", "Tensor"),
    ("cupy", "ndarray"),
    ("jax", "Array"),
    ("jax.core", "Tracer"),
)
_MASKED = "has masked entries, and these no value"
_IN_PARTS = "of which each rank has a part"
_WAYS_OUT = {
    "filled": _MASKED,
    "to_numpy": "follows no standard",
    "compute": "is not computed yet",
    "toarray": "is sparse",
    "todense": "is sparse",
    "unwrap_numpy": "is a node of a graph",
}
"""Methods by which unsupported kinds are converted, the best first, and what messages call them."""
_ARGUMENTS = {"filled": "0.0"}


def namespace(w: Array) -> Namespace:
    """Return the Array API namespace of `w`, or say why `w` cannot be measured.

    Raises
    ------
    UnsupportedArrayError
        No array, or one without values, or of a dtype or library that is not measured.
    """
    if library(w).is_compiling():
        return compat.array_namespace(w)
    found = problem(w) or _problem_of_values(w)
    if found:
        raise UnsupportedArrayError(found)
    xp = compat.array_namespace(w)
    found = problem_of_namespace(xp)
    if found:
        raise UnsupportedArrayError(found)
    return xp


def is_array(x: object) -> bool:
    """Whether `x` is an array of some library, all of whose values exist."""
    return bool(compat.is_array_api_obj(x)) and not isinstance(x, np.ma.MaskedArray)


def _problem_of_values(w: Array) -> str | None:
    layout = str(getattr(w, "layout", ""))
    reasons = [said for name, said in _MORE if getattr(w, name, False)]
    reasons += [said for name, said in _LAYOUTS if name in layout]
    if reasons:
        return f"the weight {reasons[0]}"
    name = dtype_name(w.dtype)
    if name not in COMPUTE:
        return (
            f"dtype {name} cannot be measured: cast the weight to float32 first "
            f"(supported: {', '.join(COMPUTE)})"
        )
    return None


def problem(w: object) -> str | None:
    """Why the kind of `w` is not supported, and a remedy; values are not looked at."""
    kind: Any = type(w)
    found, is_native = _of_type(kind)
    if found is not None or is_native:
        return found
    if not compat.is_array_api_obj(w):
        return (
            f"expected an array of NumPy, CuPy, torch, JAX or another Array API library, got "
            f"{_name(kind)}: convert it first, for example with numpy.asarray"
        )
    return None


@lru_cache(100)
def _of_type(kind: type) -> tuple[str | None, bool]:
    """(what is wrong with all arrays of a type, whether its namespace need not be checked)."""
    name = _name(kind)
    if kind.__name__.startswith("Uninitialized"):
        return f"the weight is a lazy {name} without a shape yet: run one forward pass first", True
    if issubclass(kind, np.matrix):
        return f"got {name}, which has its own products: convert it with numpy.asarray first", True
    if any(base.__name__ == "MaskedTensor" for base in kind.__mro__):
        return f"got {name}, which {_MASKED}: convert it with w.to_tensor(0.0) first", True
    if any(base.__name__ == "DTensor" for base in kind.__mro__):
        # Some operations on them, and float() of their results, give one rank's part of a sum.
        return f"got {name}, {_IN_PARTS}: gather it with w.full_tensor() first", True
    is_native = any(
        library in sys.modules and issubclass(kind, getattr(sys.modules[library], base))
        for library, base in _NATIVE
    )
    ways = _WAYS_OUT if not is_native else ("filled",)
    for way in (way for way in ways if hasattr(kind, way)):
        if way != "to_numpy" or not hasattr(kind, "__array_namespace__"):
            call = f"w.{way}({_ARGUMENTS.get(way, '')})"
            return f"got {name}, which {_WAYS_OUT[way]}: convert it with {call} first", is_native
    if hasattr(kind, "__array_namespace__") and hasattr(kind, "mask"):
        return f"got {name}, which {_MASKED}: replace them by numbers first", is_native
    if issubclass(kind, np.ndarray) and (
        kind.__array_ufunc__ is not np.ndarray.__array_ufunc__
        or kind.__array_function__ is not np.ndarray.__array_function__
    ):
        return f"got {name}, which computes its own way: convert it with numpy.asarray first", True
    return None, is_native


def problem_of_namespace(xp: Namespace) -> str | None:
    """What a library lacks; one that states no version is taken to be new enough."""
    # The version is read each time, because some libraries let users change it.
    return _of_version(xp, getattr(xp, "__array_api_version__", None))


@lru_cache(100)
def _of_version(xp: Namespace, version: Any) -> str | None:
    if isinstance(version, str) and version < OLDEST:
        return (
            f"{xp.__name__} follows version {version} of the Array API standard: update it to one "
            f"that follows {OLDEST} or later, or convert the array with numpy.asarray"
        )
    if not hasattr(xp, "linalg"):
        return (
            f"{xp.__name__} has no linear algebra (the extension linalg of the Array API "
            f"standard): convert the array first, for example with numpy.asarray"
        )
    return None


def _name(kind: type) -> str:
    library = kind.__module__.partition(".")[0]
    return kind.__name__ if library == "builtins" else f"{library} {kind.__name__}"
