"""Dtypes: those that are supported, those in which computations run, and their rounding."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np

from specops.arrays.libraries import library
from specops.typing import Array, Namespace

COMPUTE = {
    "float16": "float32",
    "bfloat16": "float32",
    "float32": "float32",
    "float64": "float64",
    "complex32": "complex64",
    "complex64": "complex64",
    "complex128": "complex128",
}
"""For each supported dtype, the one in which its decompositions run."""
REAL = {"complex32": "float16", "complex64": "float32", "complex128": "float64"}
COMPLEX = {"float32": "complex64", "float64": "complex128"}
_HALF = {"float16": (5, 10), "bfloat16": (8, 7)}
"""The numbers of exponent and mantissa bits."""


def dtype_name(dtype: Any) -> str:
    """The bare name of a dtype, the same on every library: ``"float32"``."""
    if isinstance(dtype, np.dtype):
        return _name_in_numpy(dtype)
    return str(dtype).rsplit(".", 1)[-1].rstrip("'>")


@lru_cache(maxsize=64)
def _name_in_numpy(dtype: np.dtype[Any]) -> str:
    # Cached: NumPy builds the name at each call, which takes as long as a small array operation.
    return str(dtype)


def to_compute(xp: Namespace, w: Array) -> Array:
    """`w` in the dtype its decompositions run in: half precision becomes float32."""
    target = getattr(xp, COMPUTE[dtype_name(w.dtype)])
    return w if w.dtype == target else xp.astype(w, target)


def rounded(xp: Namespace, x: Array, dtype: Any) -> Array:
    """`x` in `dtype`, really rounded, also where a compiler would keep more precision."""
    bits = _HALF.get(dtype_name(dtype))
    return (
        xp.astype(x, dtype, copy=False) if bits is None else library(x).rounded(xp, x, dtype, bits)
    )


def real_dtype(xp: Namespace, dtype: Any) -> Any:
    """The real dtype of the same precision."""
    name = dtype_name(dtype)
    return getattr(xp, REAL[name]) if name in REAL else dtype


def complex_dtype(xp: Namespace, dtype: Any) -> Any:
    """The complex dtype of the same precision."""
    name = dtype_name(dtype)
    return getattr(xp, COMPLEX[name]) if name in COMPLEX else dtype


def double_dtype(xp: Namespace, x: Array) -> Any:
    """The double precision dtype of the kind of `x`, None where its device has none."""
    if not library(x).has_double(x):
        return None
    return xp.complex128 if is_complex(x) else xp.float64


def is_complex(x: Array) -> bool:
    """Whether entries are complex."""
    return library(x).is_complex(x)


def epsilon(dtype: Any) -> float:
    """Unit roundoff spacing of a dtype, half precision included."""
    name = dtype_name(dtype)
    if name == "bfloat16":
        return 2.0**-7
    return float(np.finfo(REAL.get(name, name)).eps)
