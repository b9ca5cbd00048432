"""Names of quantised weights, and of the scales beside them."""

from __future__ import annotations

from typing import Final

SCALES: Final = (
    "._scale",
    "_scale",
    "_scale_inv",
    ".scales",
    ".scale",
    ".weight_scale",
    ".absmax",
    ".zero",
)
"""Endings of the names of scales."""


def unscaled(name: str) -> str:
    """The name without the ending that marks it as scales, or as a packed weight."""
    for end in SCALES:
        if name.endswith(end):
            name = name.removesuffix(end)
    for end in ("._data", "_qdata", ".W_q", ".weight", ".qweight", ".weight_packed"):
        name = name.removesuffix(end)
    return name
