"""Tensors of three axes and more without taps: heads, experts, layers stacked by scan."""

from __future__ import annotations

from itertools import pairwise
from typing import Final, Literal

from specops.geometry import Dense
from specops.geometry.fused import PAIRS, fused_experts, fused_stack
from specops.inspection.assumptions.context import (
    Context,
    is_attention,
    is_behind_attention,
    parts_of,
)
from specops.inspection.assumptions.reading import Reading

WIDEST_TAP: Final = 31
"""Kernels rarely have more taps along an axis."""
_STACKED: Final = {"layers", "blocks", "stack", "stacked", "scan", "scanned", "repeated", "vmap"}
Verdict = Literal["stack", "kernel", ""]


def heads(name: str, shape: tuple[int, ...], context: Context) -> Reading | None:
    """A projection of attention by heads, as flax and Keras store them, stacked or not.

    Also another layer with several output axes, if its bias has the same axes.
    """
    parts, bias = parts_of(name), context.bias(name)
    if len(shape) == 3 and bias == shape[1:] and shape[0] != shape[1] and context.taps_first:
        return Reading(Dense(out_axes=(-2, -1)), "two axes of outputs, as its bias has them")
    if not context.taps_first or parts[-1] not in ("kernel", "0") or len(shape) not in (3, 4):
        return None
    batch = (0,) if len(shape) == 4 else ()
    if len(shape) == 4 and not _stacked_by_name(parts, context):
        return None
    why = "an attention projection by heads" + (f", {shape[0]} layers of it" if batch else "")
    if is_attention(parts):
        return Reading(Dense(out_axes=(-2, -1), batch_axes=batch), why)
    if is_behind_attention(parts):
        return Reading(Dense(out_axes=(-1,), batch_axes=batch), why)
    return None


def stack_or_kernel(
    name: str, shape: tuple[int, ...], context: Context
) -> tuple[Verdict, str, str]:
    """Whether three axes are stacked matrices, or channels with taps; "" if nothing decides.

    Returns
    -------
    tuple of str
        The verdict, the evidence for a stack, and the evidence for a kernel.
    """
    parts, low = parts_of(name), name.lower()
    tapped = shape[0] if context.taps_first else shape[-1]
    wide = f"{tapped} is too wide for a kernel" if tapped > WIDEST_TAP else ""
    told = context.configuration.layer(name)
    if context.hints.named(name) or (told is not None and told.stride is not None):
        return "kernel", "", ""
    if "expert" in low:
        return "stack", "named experts", ""
    if any("moe" in part.lower().split("_") for part in parts[:-1]):
        return "stack", "in a mixture of experts", ""
    if "conv" in low:
        return "kernel", "", ""
    many = _stacked_by_name(parts, context)
    if many:
        return "stack", f"{many!r} without a number, as scan stacks layers", ""
    if context.hints.given(name):
        return "kernel", "", ""
    bias = context.bias(name)
    channels = shape[-1:] if context.taps_first else shape[:2]
    if bias is not None and len(bias) == 1 and bias[0] in channels:
        return "kernel", "", ""
    if bias is not None and len(bias) == 2 and bias[0] == shape[0] and bias[1] in shape[1:]:
        return "stack", f"its bias has {bias[0]} rows", ""
    return "", wide or "nothing tells it from a kernel", "nothing tells it from a stack"


def stack(name: str, shape: tuple[int, ...], why: str, context: Context) -> Reading:
    """The matrices along the first axis; for experts, fused ones are split into their maps."""
    parts = parts_of(name)
    parameter = parts[-2] if parts[-1] == "weight" and len(parts) > 1 else parts[-1]
    if parameter in PAIRS:
        found = fused_experts(parameter, shape, context.around(name))
        doubt = "a gate and what it gates as one: nothing says which axis is that of outputs"
        why = f"{why}; {doubt if found is None else found.why}"
        if found is not None:
            return Reading(found.geometry, f"3-d, a stack of matrices: {why}")
    out, layer = -1 if context.taps_first else 1, (parts[-2:-1] or [""])[0]
    found = fused_stack(layer, shape, out, context.around(name))
    if found is not None:
        return Reading(found.geometry, f"3-d, a stack of matrices: {why}; {found.why}")
    return Reading(Dense(out_axes=(out,), batch_axes=(0,)), f"3-d, a stack of matrices: {why}")


def _stacked_by_name(parts: list[str], context: Context) -> str:
    """A component that means many layers, and is not followed by the number of one; else ""."""
    if context.layout == "keras":
        return ""  # its files have a group "layers", numbered or not
    for part, follower in pairwise(parts):
        if part in _STACKED and not follower.isdecimal() and len(parts) > 2:
            return part
    return ""
