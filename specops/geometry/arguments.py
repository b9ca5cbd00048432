"""Checks of arguments: integers, integers per axis, positive bounds."""

from __future__ import annotations

import math
import operator
import sys
from collections.abc import Callable, Iterable
from typing import Any

import array_api_compat as compat
import numpy as np

from specops import arrays
from specops.errors import GeometryError


def integer(value: Any, name: str, *, least: int | None = None) -> int:
    """`value` as an int (numpy integers pass, booleans and floats do not)."""
    if isinstance(value, bool):
        raise GeometryError(f"{name} must be an integer, got {value!r}")
    try:
        result = operator.index(value)
    except TypeError:
        raise GeometryError(f"{name} must be an integer, got {value!r}") from None
    if least is not None and result < least:
        raise GeometryError(f"{name} must be at least {least}, got {result}")
    return result


def integers(value: Any, name: str, *, least: int | None = None) -> tuple[int, ...]:
    """A tuple of ints from one int or an iterable of them."""
    if isinstance(value, str) or not isinstance(value, Iterable):
        return (integer(value, name, least=least),)
    return tuple(integer(v, name, least=least) for v in value)


def per_axis(value: Any, ndim: int | None, name: str, *, least: int) -> int | tuple[int, ...]:
    """One int per spatial axis; a single int if all are equal and their number is not known."""
    if ndim is not None:
        return every_axis(value, ndim, name, least=least)
    values = integers(value, name, least=least)
    return values[0] if len(set(values)) == 1 else values


def every_axis(value: Any, ndim: int, name: str, *, least: int = 0) -> tuple[int, ...]:
    """Exactly `ndim` ints; a single one stands for all."""
    values = integers(value, name, least=least)
    if len(values) == 1:
        return values * ndim
    if len(values) != ndim:
        raise GeometryError(f"{name}={value!r} has {len(values)} entries for {ndim} spatial axes")
    return values


def check_choice(value: Any, name: str, allowed: tuple[str, ...]) -> None:
    """Raise unless `value` is one of those allowed."""
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {value!r}")


def non_negative(value: Any, name: str) -> float:
    """A finite float, zero or more."""
    if is_real(value) and 0 <= float(value) < math.inf:
        return float(value)
    raise ValueError(f"{name} must be a finite number, zero or more, got {value!r}")


def check_bound(value: Any, name: str, remedy: str = "") -> Any:
    """A positive finite bound: a float, or a 0-d array that is traced or differentiated.

    While a compiler traces, values are not known: an invalid bound then becomes NaN.
    """
    found = number_where(value, lambda x: (x > 0) & (x < math.inf))
    if found is None:
        raise ValueError(f"{name} must be a positive finite number, got {value!r}{remedy}")
    return found


def number_where(value: Any, fits: Callable[[Any], Any]) -> Any:
    """A number, or a 0-d array whose value is known, as a float if it `fits`; else None.

    A differentiated array stays as it is; a traced one becomes NaN if it turns out not to fit.
    """
    if is_real(value):
        number = float(value)
        return number if fits(number) else None
    if not arrays.is_array(value) or value.ndim != 0 or not _holds_reals(value):
        return None
    flag = fits(value)
    known = arrays.truth(flag)
    if known is None:
        return nan_unless(flag, value)
    if not known:
        return None
    # Of any library: the weight may be another's.
    return float(value) if arrays.is_concrete(value) else value


def is_real(value: Any) -> bool:
    """Whether it is a number that a float holds, no boolean."""
    if isinstance(value, int) and not isinstance(value, bool):
        return abs(value) <= sys.float_info.max
    return isinstance(value, float | np.integer | np.floating)


def _holds_reals(value: Any) -> bool:
    return not arrays.dtype_name(value.dtype).startswith(("bool", "complex"))


def nan_unless(fits: Any, value: Any) -> Any:
    """`value`, or NaN where the traced condition `fits` turns out to be false."""
    xp, value = compat.array_namespace(value), value * 1.0
    return xp.where(fits, value, xp.full_like(value, math.nan))


def nan_without(bound: Any, result: Any) -> Any:
    """`result`, or NaN throughout if a traced bound turned out to be invalid (NaN).

    Without it, comparisons with NaN would let the weight pass as one inside the bound.
    """
    if not (arrays.is_array(bound) and arrays.is_traced(bound)):
        return result
    xp = arrays.namespace(result)
    return xp.where(xp.isnan(bound), xp.full_like(result, math.nan), result)
