"""Values that are unknown during tracing, loops that compilers can trace, and derivatives."""

from __future__ import annotations

from typing import Any

from specops.arrays.libraries import library, library_of
from specops.typing import Array, Namespace


def truth(flag: Array) -> bool | None:
    """The value of a 0-d boolean array, or None while a compiler is only tracing it."""
    return library(flag).truth(flag)


def is_traced(x: Array) -> bool:
    """Whether the values of `x` are unknown now: under a compiler, or mapped by vmap."""
    return library(x).is_traced(x)


def is_staged(x: Array) -> bool:
    """Whether `x` is traced where loops of unknown length are possible: by JAX."""
    return library(x).is_staged(x)


def is_concrete(x: Array) -> bool:
    """Whether the values of `x` are known now and nothing is to be differentiated."""
    return library(x).is_concrete(x)


def stop_gradient(x: Array) -> Array:
    """`x` as a constant for differentiation."""
    return library(x).stop_gradient(x)


def with_derivative(value: Any, surrogate: Any, x: Array, *constants: Array) -> Array:
    """``value(x, *constants)``, which differentiates by x like ``surrogate(x, *constants)``.

    The surrogate is computed only if a derivative is asked for.
    """
    return library(x).with_derivative(value, surrogate, x, *constants)


def expanded(decompose: Any, expansion: Any, x: Array, *parameters: Array) -> Any:
    """``expansion(None, decompose(x), *parameters)`` with derivatives that `expansion` defines.

    They are those of ``expansion(h, decompose(x), *parameters)`` by h at 0 and by the parameters,
    and are computed only if asked for. For derivatives of higher order the factors are
    differentiated, too, as functions of x.
    """
    return library(x).expanded(decompose, expansion, x, *parameters)


def fori(xp: Namespace, first: int, last: int, body: Any, carry: Any) -> Any:
    """``for j in range(first, last): carry = body(j, carry)``, not unrolled by a compiler."""
    return library_of(xp).fori(first, last, body, carry)


def cond(flag: Array, yes: Any, no: Any) -> Any:
    """``yes()`` or ``no()``, decided on the device if the flag is traced."""
    return library(flag).cond(flag, yes, no)


def while_loop(xp: Namespace, cond: Any, body: Any, carry: Any) -> Any:
    """``while cond(carry): carry = body(carry)``, also where values are staged."""
    return library_of(xp).while_loop(cond, body, carry)


def compiled(function: Any, static: tuple[Any, ...], *arrays: Array) -> Any:
    """``function(*static, *arrays)``, compiled once per shape if eager loops are slow."""
    return library(arrays[0]).compiled(function, static, *arrays)
