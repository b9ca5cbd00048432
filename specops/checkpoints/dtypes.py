"""The types that checkpoints store, and their bytes as NumPy arrays.

NumPy has no bfloat16 and no float8. They become float32, which can represent all their values.
"""

from __future__ import annotations

from functools import cache
from typing import Any, Final

import numpy as np

# Bits of the exponent, bits of the fraction, bias, and how special values are encoded: infinities
# and NaN ("ieee"), NaN as all ones only ("fn"), or NaN in place of minus zero ("fnuz").
_FLOAT8: Final = {
    "float8_e4m3fn": (4, 3, 7, "fn"),
    "float8_e5m2": (5, 2, 15, "ieee"),
    "float8_e4m3fnuz": (4, 3, 8, "fnuz"),
    "float8_e5m2fnuz": (5, 2, 16, "fnuz"),
}
_E8M0: Final = "float8_e8m0fnu"  # powers of two, the scales of block formats
_PLAIN: Final = {"bool", "complex64", "complex128"} | {
    f"{kind}{bits}"
    for kind, widths in {
        "int": (8, 16, 32, 64),
        "uint": (8, 16, 32, 64),
        "float": (16, 32, 64),
    }.items()
    for bits in widths
}


def itemsize(dtype: str) -> int | None:
    """Bytes of one element, or None for a type that cannot be read."""
    if dtype in _FLOAT8 or dtype == _E8M0:
        return 1
    if dtype == "bfloat16":
        return 2
    return np.dtype(dtype).itemsize if dtype in _PLAIN else None


def decode(raw: np.ndarray[Any, Any], dtype: str) -> np.ndarray[Any, Any]:
    """Little-endian bytes, a flat uint8 array, as a flat array of the values they hold."""
    if dtype == "bfloat16":
        wide: np.ndarray[Any, Any] = np.left_shift(raw.view("<u2"), 16, dtype=np.uint32)
        return wide.view(np.float32)
    if dtype in _FLOAT8 or dtype == _E8M0:
        return _values(dtype).take(raw)
    if dtype == "bool":
        return raw.astype(np.bool)
    stored: np.ndarray[Any, Any] = raw.view(np.dtype(dtype).newbyteorder("<"))
    return stored.astype(np.dtype(dtype), copy=False)


def plain(array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """The array in one of NumPy's own types and in native byte order, values unchanged."""
    if array.dtype.isbuiltin == 2:  # a type that another package registered: bfloat16, int4
        name = array.dtype.name
        return array.astype({"i": np.int8, "u": np.uint8}.get(name[0], np.float32))
    return array.astype(array.dtype.newbyteorder("="), copy=False)


def is_numeric(dtype: np.dtype[Any]) -> bool:
    """Whether an array of this type is a tensor: no objects, strings, dates or records."""
    return dtype.kind in "biufc"


@cache
def _values(dtype: str) -> np.ndarray[Any, Any]:
    """The values that the 256 bytes stand for."""
    code = np.arange(256)
    if dtype == _E8M0:
        return np.where(code == 255, np.nan, np.ldexp(1.0, code - 127)).astype(np.float32)
    bits, fraction_bits, bias, special = _FLOAT8[dtype]
    sign = np.where(code >> 7, -1.0, 1.0)
    exponent = code >> fraction_bits & (1 << bits) - 1
    fraction = (code & (1 << fraction_bits) - 1) / (1 << fraction_bits)
    significand = np.where(exponent == 0, fraction, 1 + fraction)
    values: np.ndarray[Any, Any] = sign * np.ldexp(significand, np.maximum(exponent, 1) - bias)
    if special == "ieee":
        top = exponent == (1 << bits) - 1
        values[top] = np.where(fraction[top] == 0, sign[top] * np.inf, np.nan)
    elif special == "fn":
        values[(code & 0x7F) == 0x7F] = np.nan
    else:
        values[0x80] = np.nan
    return values.astype(np.float32)
