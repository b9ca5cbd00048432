"""How far a matrix inside the spectral ball is from the nearest one, certified."""

from __future__ import annotations

from typing import Any

from specops import arrays
from specops.linalg.clip import Clipped
from specops.typing import Array


def certified_gap(
    xp: Any, a: Array, clipped: Clipped, final: Array, limit: Array, within: Array
) -> Array:
    """2(primal − dual)/‖a‖², or the square of the proven distance over ‖a‖².

    Of `final` to the nearest matrix to `a` of norm at most `limit`; 0 where `a` is `within`.
    """
    whole = _squared(xp, a)
    whole = xp.where(whole > 0, whole, xp.ones_like(whole))
    if clipped.error is not None:
        gap = (clipped.error + xp.sqrt(_squared(xp, final - clipped.matrices))) ** 2 / whole
    else:
        removed = a - clipped.matrices
        product = xp.sum(arrays.conjugate(xp, removed) * clipped.matrices, axis=(-2, -1))
        product = xp.real(product) if arrays.is_complex(a) else product
        dual = 0.5 * _squared(xp, removed) + product - limit * clipped.removed
        gap = 2.0 * (0.5 * _squared(xp, a - final) - dual) / whole
        gap = xp.where(gap > 0, gap, xp.zeros_like(gap))
    return xp.where(within, xp.zeros_like(gap), gap)


def _squared(xp: Any, x: Array) -> Array:
    return xp.sum(xp.abs(x) ** 2, axis=(-2, -1))
