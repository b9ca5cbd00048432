"""Which convolution a kernel of a checkpoint stands for."""

from __future__ import annotations

import itertools
import math
from typing import Any, Final, Literal

from specops.errors import GeometryError
from specops.geometry import Conv
from specops.geometry.fused import fused_kernel
from specops.inspection.assumptions.channels import (
    Groups,
    groups_of,
    is_depthwise_by_name,
    is_gated_convolution,
)
from specops.inspection.assumptions.context import Context, parts_of
from specops.inspection.assumptions.reading import Assumption, Reading
from specops.inspection.assumptions.stacks import WIDEST_TAP
from specops.inspection.assumptions.strides import strides_of

_MOST_FREQUENCIES: Final = 2**20
"""Most frequencies of the grid on which the supremum over all sizes is bracketed."""
_TRANSPOSED: Final = ("transpose", "deconv", "upconv")
_GATES: Final = "4 gates are taken for one map"
Layout = Literal["OI*", "IO*", "*IO", "*OI"]


def kernel(name: str, shape: tuple[int, ...], context: Context) -> Assumption:
    """The convolutions that a tensor of three to five axes may stand for."""
    first, order = _order(shape, context.layout)
    taps = shape[:-2] if first else shape[2:]
    channels = shape[-2:] if first else shape[:2]
    size = context.hints.of(name, "input_size")
    if size is not None and len(size) == 1:
        size = size * len(taps)
    skipped = _skipped(name, taps, channels, size, context)
    if skipped is not None:
        return skipped
    transposed, how = _transposed(name, channels, first, context)
    layout: Layout = "*IO" if first else "OI*"
    if transposed:
        layout = {"keras": "*OI", "jax": "*IO"}.get(context.layout, "IO*")  # type: ignore[assignment]
    seen, groups = _groups(name, shape, channels, first, layout, context)
    told = context.configuration.layer(name)
    dilation = context.hints.of(name, "dilation")
    if dilation is None:
        dilation = told.dilation if told is not None else 1
    gaps = dilation if isinstance(dilation, tuple) else (dilation,) * len(taps)
    spans = tuple(gap * (k - 1) + 1 for gap, k in zip(gaps, taps, strict=True))
    readings = []
    for group, stride in itertools.product(groups, strides_of(name, taps, context)):
        note = how + group.why + stride.why
        padding, more, padded = _padding(
            spans, size, first, transposed, stride.value, name, context
        )
        note += padded
        try:
            geometry = Conv(
                size,
                stride=stride.value,
                dilation=dilation,
                groups=group.count,
                padding=padding,
                output_padding=more,
                boundary=context.hints.boundary,
                layout=layout,
                transposed=transposed,
            )
            geometry.sizes(seen or shape)
        except GeometryError as error:
            return Assumption(skipped=str(error), harmless=False)
        doubt = fused_kernel((parts_of(name)[-2:-1] or [""])[0])
        doubt = doubt or (_GATES if is_gated_convolution(name, context) else "")
        note += f"; {doubt}" if doubt else ""
        readings.append(Reading(geometry, f"{len(shape)}-d, {order}{note}", seen))
    return Assumption.of(*readings)


def _skipped(
    name: str, taps: tuple[int, ...], channels: tuple[int, ...], size: Any, context: Context
) -> Assumption | None:
    """Why a tensor with these taps is not measured as a kernel; None if it is."""
    wide = "×".join(map(str, taps))
    if max(taps) > WIDEST_TAP and max(channels) == 1 and not context.hints.given(name):
        return Assumption(skipped=f"{wide} and no channels: a mask or table")
    if size is not None and len(size) != len(taps):
        given = "×".join(map(str, size))
        reason = f"--input-size {given} has {len(size)} axes, the kernel {len(taps)} spatial ones"
        return Assumption(skipped=reason, harmless=False)
    points = math.prod(max(16, 8 * (k - 1)) if k > 1 else 1 for k in taps)
    if size is None and points > _MOST_FREQUENCIES:
        reason = f"{wide} taps are too many to bracket at all sizes: --input-size"
        return Assumption(skipped=reason, harmless=False)
    return None


def _order(shape: tuple[int, ...], layout: str) -> tuple[bool, str]:
    """(whether the taps come first, how that was decided)."""
    if layout in ("jax", "keras"):
        return True, f"{layout}'s order: taps first"
    if layout == "torch":
        return False, "torch's order: taps last"
    if max(shape[:-2]) <= WIDEST_TAP < max(shape[-2:]) or min(shape[-2:]) > max(shape[:-2]):
        return True, "taps first, by their sizes"
    return False, "taps last, by their sizes"


def _transposed(
    name: str, channels: tuple[int, ...], first: bool, context: Context
) -> tuple[bool, str]:
    told = context.configuration.layer(name)
    if told is not None and told.transposed:
        return True, f", transposed by {context.configuration.source}"
    if any(word in name.lower() for word in _TRANSPOSED):
        return True, ", transposed by its name"
    behind = 0 if first else context.behind(name)
    if not behind or behind == channels[0] or behind % channels[1]:
        return False, ""
    what = "the norm behind it" if context.bias(name) is None else "its bias"
    return True, f", transposed: {what} has {behind} entries"


def _padding(
    spans: tuple[int, ...],
    size: Any,
    first: bool,
    transposed: bool,
    stride: int | tuple[int, ...],
    name: str,
    context: Context,
) -> tuple[Any, Any, str]:
    """(padding, output padding, what is assumed about them)."""
    told, given = context.configuration.layer(name), context.hints.of(name, "padding")
    if size is None or context.hints.boundary != "zeros":
        moot = ", padding counts only where zeros end at an input size"
        return "same", 0, "" if given is None else moot
    steps = stride if isinstance(stride, tuple) else (stride,) * len(spans)
    if given is not None:
        more = [0] * len(spans)
        if transposed and isinstance(given, int):
            # The output is stride times the input, if this padding can give that.
            wanted = [s - k + 2 * given for s, k in zip(steps, spans, strict=True)]
            more = [n if 0 <= n < s else 0 for n, s in zip(wanted, steps, strict=True)]
        return given, tuple(more), f", padding {given} as given"
    if told is not None and told.padding is not None:
        padding = told.padding
        if padding == "causal":  # only for one spatial axis
            padding = ((spans[0] - 1, 0),)
        return padding, 0, f", padding {told.padding} by {context.configuration.source}"
    halves = tuple(k // 2 for k in spans)
    if first or not all(k % 2 for k in spans):
        return "same", 0, ", padding 'same' assumed" if max(spans) > 1 else ""
    if not transposed:
        # torch pads both sides alike at strides too
        return halves, 0, ", zeros of half a kernel around"
    # The output is stride times the input, with torch's padding, the same on both sides.
    return halves, tuple(s - 1 for s in steps), ", padding of half a kernel assumed"


def _groups(
    name: str,
    shape: tuple[int, ...],
    channels: tuple[int, ...],
    first: bool,
    layout: Layout,
    context: Context,
) -> tuple[tuple[int, ...] | None, list[Groups]]:
    """(the shape in which to view the kernel, how many groups it may have)."""
    given = context.hints.of(name, "groups")
    if given is not None:
        return None, [Groups(given, f", {given} groups as given")]
    told = context.configuration.layer(name)
    inputs, outputs = channels if first else channels[::-1]
    separable = "separable" in name.lower() and parts_of(name)[-1] in ("0", "depthwise_kernel")
    depthwise = told is not None and told.depthwise
    if context.layout == "keras" and (depthwise or is_depthwise_by_name(name) or separable):
        # (*taps, channels, multiplier): the outputs of a channel are adjacent.
        seen = (*shape[:-2], 1, inputs * outputs)
        return seen, [Groups(inputs, ", depthwise: (taps, channels, multiplier)")]
    count = told.groups or (outputs // inputs if told.width == inputs else 0) if told else 0
    if count and outputs % count == 0:
        return None, [Groups(count, f", groups by {context.configuration.source}")]
    behind = context.behind(name)
    if layout == "IO*" and behind and behind % channels[1] == 0:
        count = behind // channels[1]
        return None, [Groups(count, f", {count} groups by what is behind" if count > 1 else "")]
    return None, groups_of(name, outputs, inputs, context)
