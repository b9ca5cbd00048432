"""Whether a factor of a matrix is found by matrix products alone."""

from __future__ import annotations

from specops import arrays
from specops.typing import Array

_PRODUCTS_FROM = 128
"""Smaller side from which an accelerator is faster at products than at eigenvalues."""


def by_products(a: Array, method: str) -> bool:
    """Whether products are due for stacked matrices: asked for, or left open and faster."""
    if method != "auto" or min(a.shape[-2:]) < _PRODUCTS_FROM:
        return method == "products"
    return arrays.on_host(a) is None and not arrays.is_traced(a)
