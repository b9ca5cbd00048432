"""Checks of the figures' arguments, which become NumPy arrays."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from specops.errors import NonFiniteError


def check_mapping(given: Any, name: str, example: str) -> Mapping[Any, Any]:
    """Raise unless `given` is a mapping with something in it."""
    if not isinstance(given, Mapping):
        raise TypeError(
            f"{name} must be a mapping such as {example}, got {type(given).__name__}: "
            f"give each item a name"
        )
    if not given:
        raise ValueError(f"{name} is empty: nothing to draw, expected something like {example}")
    return given


def real(values: Any, what: str) -> np.ndarray:
    """Real numbers in double precision, of any shape."""
    try:
        array = np.asarray(values)
        if array.dtype.kind == "c":
            raise ValueError("complex numbers have no order")
        return array.astype(np.float64)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"{what}: expected real numbers in host memory, got {type(values).__name__} "
            f"({str(error).splitlines()[0] if str(error) else type(error).__name__}); convert "
            f"arrays of other libraries first, a tensor by .detach().cpu().numpy()"
        ) from error


def vector(values: Any, what: str) -> np.ndarray:
    """Real numbers in one dimension, at least one."""
    array = real(values, what)
    if array.ndim != 1:
        raise ValueError(
            f"{what}: expected one dimension, got shape {array.shape}; give each row of a stack "
            f"a name of its own, or pass .ravel() to pool them"
        )
    if not array.size:
        raise ValueError(f"{what}: no values; leave it out")
    return array


def spectrum(values: Any, what: str) -> np.ndarray:
    """Singular values, the largest first."""
    array = vector(values, what)
    check_nonnegative(array, what, "a singular value is at least 0")
    return np.sort(array)[::-1]


def check_nonnegative(array: np.ndarray, what: str, why: str) -> None:
    """Raise if a value is NaN, infinite or negative, and say which."""
    flat = array.ravel()
    for wrong, error, hint in (
        (~np.isfinite(flat), NonFiniteError, "leave it out, or measure it again"),
        (flat < 0, ValueError, f"{why}; for eigenvalues or logarithms use another plot"),
    ):
        if wrong.any():
            where = int(np.argmax(wrong))
            position = f" at position {where}" if flat.size > 1 else ""
            raise error(f"{what}: got {flat[where]:g}{position}; {hint}")
