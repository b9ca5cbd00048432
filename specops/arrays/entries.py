"""Entries of arrays: their size, whether they are finite, and changes at an index."""

from __future__ import annotations

from typing import Any

from specops.arrays.dtypes import complex_dtype, dtype_name, is_complex
from specops.arrays.libraries import library
from specops.arrays.tracing import stop_gradient, truth
from specops.errors import NonFiniteError
from specops.typing import Array, Namespace


def all_finite(xp: Namespace, x: Array, axis: Any = None) -> Array:
    """Whether no entry is NaN or infinite."""
    return library(x).all_finite(xp, x, axis)


def check_finite(xp: Namespace, w: Array, what: str = "the weight") -> None:
    """Raise if `w` holds NaN or infinity; silent while `w` is being traced."""
    if truth(all_finite(xp, w)) is False:
        raise NonFiniteError(
            f"{what} holds NaN or infinity (shape {tuple(w.shape)}): look for a diverged step, "
            f"an overflow in half precision, or a bad checkpoint"
        )


def largest_entry(xp: Namespace, x: Array, axis: Any = None, *, keepdims: bool = False) -> Array:
    """max|x|, or NaN if an entry is NaN; in one pass if the library has one."""
    return library(x).largest_entry(xp, x, axis, keepdims)


def magnitude(xp: Namespace, x: Array, axis: Any = None) -> Array:
    """The power of two at or below max|x|, kept as a dimension: 1 for zeros.

    Dividing by it makes squares safe from overflow and underflow and rounds nothing.
    """
    return power_below(xp, largest_entry(xp, x, axis, keepdims=True))


def power_below(xp: Namespace, largest: Array) -> Array:
    """The power of two at or below positive numbers; 1 for zero and numbers that are not finite.

    A constant for differentiation, because it is constant between powers.
    """
    largest = stop_gradient(largest)
    ones = xp.ones_like(largest)
    exponent = xp.floor(xp.log2(xp.where(largest > 0, largest, ones)))
    # Not up to the ends of the range, so that the reciprocal is a normal number, too.
    limit = 1000.0 if dtype_name(largest.dtype) == "float64" else 120.0
    exponent = xp.clip(exponent, -limit, limit)
    return xp.where(xp.isfinite(exponent), 2.0**exponent, ones)


def argmax(xp: Namespace, x: Array) -> Array:
    """Index (shape (1,)) of the largest entry of `x` flattened."""
    return library(x).argmax(xp, xp.reshape(x, (-1,)))


def add_at(x: Array, index: Any, value: Array) -> Array:
    """`x` with `value` added at `index`; `x` must be the caller's own and not used again."""
    return library(x).add_at(x, index, value)


def add_diagonal(xp: Namespace, a: Array, values: Array) -> Array:
    """Stacked matrices plus a multiple of the identity each; `a` must not be used again."""
    return library(a).add_diagonal(xp, a, xp.astype(values, a.dtype)[..., None])


def complex_of(xp: Namespace, real: Array, imag: Array) -> Array:
    """real + i·imag, in one pass if the library has one."""
    return library(real).complex_of(xp, real, imag, complex_dtype(xp, real.dtype))


def conjugate(xp: Namespace, x: Array) -> Array:
    """Complex conjugate; real arrays as they are."""
    return xp.conj(x) if is_complex(x) else x


def real_part(xp: Namespace, x: Array) -> Array:
    """Real part; real arrays as they are."""
    return xp.real(x) if is_complex(x) else x


def nonzero(xp: Namespace, x: Array) -> Array:
    """`x` as a divisor: 1 where it is 0."""
    return xp.where(x == 0, xp.ones_like(x), x)


def along_first(factors: Array, like: Array) -> Array:
    """Factors for the first axes of an array, with axes behind them, so that they broadcast."""
    return factors[(..., *([None] * (like.ndim - factors.ndim)))]


def adjoint(xp: Namespace, a: Array) -> Array:
    """Conjugate transpose of the last two axes."""
    return conjugate(xp, xp.matrix_transpose(a))
