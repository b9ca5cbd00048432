"""Which convolution a kernel of a checkpoint is taken for."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

from specops.errors import GeometryError
from specops.geometry import Conv
from specops.inspection.hints import Context

WIDEST_TAP = 31
"""Kernels rarely reach further."""
_MOST_FREQUENCIES = 2**20
"""Of a grid on which the supremum over all sizes is bracketed."""
_DEPTHWISE = ("depthwise", "dwconv", ".dw.", "conv_dw")
_TRANSPOSED = ("transpose", "deconv")
Layout = Literal["OI*", "IO*", "*IO", "*OI"]


@dataclass(frozen=True)
class Guess:
    """A convolution, or why there is none.

    Attributes
    ----------
    geometry : Conv, optional
    why : str
        How it was decided.
    obstacle : str
        Why there is none.
    harmless : bool
        Whether nothing is missing then.
    shape : tuple of int, optional
        To see the tensor in.
    """

    geometry: Conv | None = None
    why: str = ""
    obstacle: str = ""
    harmless: bool = False
    shape: tuple[int, ...] | None = None


def guess_convolution(name: str, shape: tuple[int, ...], context: Context) -> Guess:
    """The convolution that a kernel of three to five axes is taken for."""
    hints, low = context.hints, name.lower()
    first, why = _order(shape, context.layout)
    taps = shape[:-2] if first else shape[2:]
    channels = shape[-2:] if first else shape[:2]
    if max(taps) > WIDEST_TAP and max(channels) == 1:
        wide = "×".join(map(str, taps))
        return Guess(obstacle=f"{wide} and no channels: a mask or table", harmless=True)
    transposed = any(word in low for word in _TRANSPOSED)
    seen, groups, note = _groups(name, shape, channels, first, context)
    layout: Layout = "*IO" if first else "OI*"
    if transposed:
        layout = {"keras": "*OI", "jax": "*IO"}.get(context.layout, "IO*")  # type: ignore[assignment]
        note += ", transposed by its name"
    size = hints.of(name, "input_size")
    if size is not None and len(size) == 1:
        size = size * len(taps)
    grid = math.prod(max(16, 8 * (k - 1)) if k > 1 else 1 for k in taps)
    if size is None and grid > _MOST_FREQUENCIES:
        wide = "×".join(map(str, taps))
        return Guess(obstacle=f"{wide} taps are too many to bracket at all sizes: --input-size")
    padding: Any = "same"
    torch_like = size is not None and not first and not transposed
    if torch_like and hints.boundary == "zeros" and all(k % 2 for k in taps):
        padding = tuple(k // 2 for k in taps)  # torch pads both sides alike at strides too
        note += ", zeros of half a kernel around"
    try:
        geometry = Conv(
            size,
            stride=hints.of(name, "stride") or 1,
            groups=groups,
            padding=padding,
            boundary=hints.boundary,
            layout=layout,
            transposed=transposed,
        )
        geometry.sizes(seen or shape)
    except GeometryError as error:
        return Guess(obstacle=str(error))
    return Guess(geometry, f"{len(shape)}-d, {why}{note}", shape=seen)


def _order(shape: tuple[int, ...], layout: str) -> tuple[bool, str]:
    """(whether the taps come first, how that was decided)."""
    if layout in ("jax", "keras"):
        return True, f"{layout}'s order: taps first"
    if layout == "torch":
        return False, "torch's order: taps last"
    if max(shape[:-2]) <= WIDEST_TAP < max(shape[-2:]) or min(shape[-2:]) > max(shape[:-2]):
        return True, "taps first, by their sizes"
    return False, "taps last, by their sizes"


def _groups(
    name: str, shape: tuple[int, ...], channels: tuple[int, ...], first: bool, context: Context
) -> tuple[tuple[int, ...] | None, int, str]:
    """(the shape to see it in, groups, how that was decided)."""
    given = context.hints.of(name, "groups")
    if given is not None:
        return None, given, ""
    low = name.lower()
    named = any(word in low for word in _DEPTHWISE)
    separable = "separable" in low and low.endswith(("/0", ".0"))
    inputs, outputs = channels if first else channels[::-1]
    if context.layout == "keras" and (named or separable):
        # (*taps, channels, multiplier), where outputs of a channel stand together.
        seen = (*shape[:-2], 1, inputs * outputs)
        return seen, inputs, ", named depthwise: (taps, channels, multiplier)"
    if inputs == 1 and outputs > 1 and (named or not context.one_channel):
        return None, outputs, ", one input for each output: depthwise"
    return None, 1, ""
