"""Where arrays live: constant tables on their device, and views of them on the host."""

from __future__ import annotations

import math
from typing import Any
from zlib import crc32

import array_api_compat as compat
import numpy as np

from specops.arrays.dtypes import COMPLEX, COMPUTE, REAL, dtype_name, is_complex, to_compute
from specops.arrays.libraries import library
from specops.typing import Array


def device_of(x: Array) -> Any:
    """The device of a concrete array; None if the library places arrays itself."""
    return library(x).device(x)


def constant(values: np.ndarray, like: Array, *, complex: bool = False) -> Array:
    """A host table on the device of `like`, in its real (or complex) compute dtype.

    Integer tables become 32-bit indices, which every device has.
    """
    if values.dtype.kind in "fc":
        name = COMPUTE[dtype_name(like.dtype)]
        name = REAL.get(name, name)
        values = values.astype(COMPLEX[name] if complex else name)
    elif values.dtype.kind in "iu":
        values = values.astype(np.int32)
    return library(like).placed(compat.array_namespace(like), values, like)


def like(values: Array, other: Array) -> Array:
    """`values` in the library, on the device and in the compute precision of `other`."""
    return constant(to_numpy(values), other, complex=is_complex(other))


def compute_together(x: Array, other: Array) -> bool:
    """Whether the library of one computes with both, where they lie."""
    ours, theirs = library(x), library(other)
    if ours is not theirs:
        return ours.mixes_with_numpy and theirs.mixes_with_numpy
    return bool(ours.device(x) == ours.device(other))


def in_double(x: Array) -> Array:
    """A concrete array in double precision: on its device, or on the host if that has none."""
    xp, target = compat.array_namespace(x), "complex128" if is_complex(x) else "float64"
    if not library(x).has_double(x):
        return to_numpy(x).astype(target)
    return xp.astype(x, getattr(xp, target))


def zeros(shape: tuple[int, ...], like: Array) -> Array:
    """Zeros of the dtype and device of `like`."""
    return library(like).zeros(shape, like)


def to_numpy(x: Array) -> np.ndarray:
    """A concrete array on the host."""
    return library(x).to_numpy(x)


def number(x: Any) -> float:
    """A 0-d array, or a number, as a float, without a warning that a derivative is left behind."""
    if not hasattr(x, "dtype"):
        return float(x)
    name = dtype_name(x.dtype)
    if COMPUTE.get(name, name) != name:
        # NumPy has not every kind of half precision.
        x = to_compute(compat.array_namespace(x), x)
    return float(to_numpy(x))


def on_host(x: Array) -> np.ndarray | None:
    """A NumPy view of a concrete array on the CPU without a derivative; None for others."""
    return library(x).on_host(x)


def is_constant_on_host(x: Array) -> bool:
    """Whether NumPy can view the values of `x` in place: NumPy arrays, and constant tensors."""
    return library(x).is_constant_on_host(x)


def host_view(x: Array) -> np.ndarray:
    """The NumPy view, in place, of an array for which `is_constant_on_host` is true."""
    return library(x).host_view(x)


def from_host(values: np.ndarray, like: Array) -> Array:
    """A NumPy result in the library of `like`; it may share memory."""
    return library(like).from_host(values, like)


def solves_alone(a: Array) -> bool:
    """Whether a single matrix is better left to its own library than to workers on the host.

    torch's LAPACK is faster there, and the threads of torch and NumPy slow each other down.
    """
    return a.ndim == 2 and library(a).solves_alone


def by_workers(a: Array) -> bool:
    """Whether stacks of small matrices like `a` are given to `workers`, in chunks."""
    return library(a).by_workers


def start_vector(name: str, size: int) -> np.ndarray:
    """A unit vector fixed by a layer's name: the same on every library, device and rank."""
    key = np.array([0, crc32(name.encode())], dtype=np.uint64)
    raw = np.random.Philox(key=key).random_raw(size)
    vector = raw.astype(np.float64) * (2.0 / 2**64) - 1.0
    return np.asarray(vector / math.sqrt(float(vector @ vector)))
