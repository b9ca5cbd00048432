"""The groups of a kernel, inferred from the channels of its neighbours."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache
from itertools import takewhile
from typing import Final

from specops.inspection.assumptions.context import Context, Kernel, are_in_order, block_of, parts_of

_DEPTHWISE: Final = ("depthwise", "dwconv", "conv_dw", "dw_conv")
_KERAS_PLAIN: Final = re.compile(r"(^|/)conv\dd(_\d+)?/")
"""Plain convolutions in Keras files, which name layers after classes: depthwise ones differ."""
ASSUMED: Final = ", one group assumed"
_STEMS: Final = (1, 3)
"""The channels of grey and of colour images."""


@dataclass(frozen=True)
class Groups:
    """A number of groups, and the reason for it."""

    count: int
    why: str


def groups_of(name: str, outputs: int, inputs: int, context: Context) -> list[Groups]:
    """How many groups a kernel may have: one answer, or all candidates if nothing decides.

    `outputs` are the channels of the axis that is never divided, `inputs` those of one group.
    """
    named = is_depthwise_by_name(name) or _is_of_a_state_space(name, context)
    if named and inputs == 1:
        return [Groups(outputs, ", by its name depthwise")]
    if is_gated_convolution(name, context):
        return [Groups(1, "")]
    if context.layout == "keras" and inputs < outputs and _KERAS_PLAIN.search(name):
        return [Groups(1, ASSUMED)]
    if max(inputs, outputs) > 1:
        return _like_others(name, outputs, inputs, context)
    return [Groups(1, "")]


def is_depthwise_by_name(name: str) -> bool:
    """Whether a name says that each channel has a filter of its own."""
    low = name.lower()
    return any(word in low for word in _DEPTHWISE) or "dw" in parts_of(low)


def is_gated_convolution(name: str, context: Context) -> bool:
    """Whether a kernel belongs to a ConvLSTM of Keras."""
    return context.layout == "keras" and "conv_lstm" in name.lower()


def _is_of_a_state_space(name: str, context: Context) -> bool:
    """Whether it is the short convolution of Mamba, LFM2 and similar models."""
    stem = name.rpartition(".conv1d.")[0]
    if stem and f"{stem}.A_log" in context.shapes:
        return True
    stem = name.rpartition(".conv.")[0]
    behind, shape = (context.shapes.get(n, ()) for n in (f"{stem}.out_proj.weight", name))
    return f"{stem}.in_proj.weight" in context.shapes and behind[1:] == shape[:1]


def _one_input(
    name: str, outputs: int, before: tuple[Kernel, ...], context: Context
) -> list[Groups]:
    """Depthwise, or a dense layer that sees a single channel: a stem, or the end of a decoder."""
    depthwise = [Groups(outputs, "")]
    part = _part(name, context)
    feeding = [k for k in before if k.outputs == outputs]
    if context.is_sorted:
        # Kernels whose names give no order may come before it, too.
        parts = parts_of(name)
        feeding += [
            k
            for k in context.kernels
            if k.part == part and k.outputs == outputs and not are_in_order(k.parts, parts)
        ]
    inside = [k for k in before if k.part == part]
    first = not inside and (len(context.kernels) > 1) and not _has_coloured_stem(context)
    first = first and not _is_among_matrices(name, outputs, context)
    dense = first or bool(inside and inside[-1].outputs == 1)
    # After transposed layers it may be a dense layer with a single output channel.
    either = bool(feeding) and feeding[-1].turned and not context.behind(name)
    near = bool(before) or any(_are_of_one_block(k.name, name) for k in feeding)
    if feeding and near and not dense and not either:
        return [Groups(outputs, f", depthwise: {feeding[-1].name} has as many outputs")]
    if dense and not feeding:
        told = "the first kernel" if first else f"{inside[-1].name} gives one channel"
        return [Groups(1, f", of one input channel: {told}")]
    if inside and not feeding and inside[-1].outputs > 1 and outputs % inside[-1].outputs == 0:
        depthwise = [Groups(inside[-1].outputs, ", depthwise"), *depthwise]
    depthwise = [Groups(g.count, f", in {g.count} groups of one channel") for g in depthwise]
    return [*depthwise, Groups(1, ", of one input channel")]


def _are_of_one_block(one: str, other: str) -> bool:
    """Whether two names differ only in the layer's own part, or in that of a wrapper."""
    parts, others = parts_of(one), parts_of(other)
    alike = len(list(takewhile(lambda pair: pair[0] == pair[1], zip(parts, others, strict=False))))
    return alike >= len(others) - 3


def _is_among_matrices(name: str, outputs: int, context: Context) -> bool:
    """Whether a matrix of its block has as many inputs or outputs, so that it is no image stem."""
    block = block_of(name)
    alike = (n for n, s in context.shapes.items() if block and len(s) == 2 and outputs in s)
    return any(block_of(n) == block for n in alike)


def _has_coloured_stem(context: Context) -> bool:
    return any(k.inputs == 3 < k.outputs and k.axes > 1 for k in context.kernels)


def _like_others(name: str, outputs: int, inputs: int, context: Context) -> list[Groups]:
    """What a layer alone tells; if that is not certain, what that layer in other blocks does."""
    found = _alone(name, outputs, inputs, context)
    if len(found) == 1 or (inputs == 1 and not _is_among_matrices(name, outputs, context)):
        return found
    alike = [
        k
        for k in context.kernels
        if k.name != name
        and (k.outputs, k.inputs) == (outputs, inputs)
        and _without_numbers(k.name) == _without_numbers(name)
    ]
    others = [_alone(k.name, outputs, inputs, context) for k in alike]
    counts = {groups[0].count for groups in others if len(groups) == 1}
    if counts != {found[0].count}:
        return found
    return [Groups(found[0].count, f"{found[0].why}, as in the blocks beside it")]


@lru_cache(maxsize=2**14)
def _without_numbers(name: str) -> str:
    return re.sub(r"\d+", "*", name)


def _alone(name: str, outputs: int, inputs: int, context: Context) -> list[Groups]:
    """What a layer alone tells; cached, because each of many similar layers asks all others."""
    key = "groups", name, outputs, inputs
    if key not in context.kept:
        context.kept[key] = _by_neighbours(name, outputs, inputs, context)
    found: list[Groups] = context.kept[key]
    return found


def _by_neighbours(name: str, outputs: int, inputs: int, context: Context) -> list[Groups]:
    """One group, unless the layer before has a multiple of the channels and no other fits."""
    before = context.before(name)
    if inputs == 1:
        return _one_input(name, outputs, before, context)
    parts = parts_of(name)
    given = any(k.outputs == inputs for k in before)
    perhaps = any(
        k.outputs == inputs and not are_in_order(k.parts, parts)
        for k in (context.kernels if context.is_sorted else ())
    )
    follows = _in_sequence(name, before)
    if follows is not None and follows.outputs == inputs:
        return [Groups(1, "")]
    nearest = follows or (before[-1] if before else None)
    grouped = []
    if nearest is not None and nearest.part == _part(name, context):
        count, rest = divmod(nearest.outputs, inputs)
        if rest == 0 and count > 1 and outputs % count == 0:
            grouped = [Groups(count, f", in {count} groups by the outputs of {nearest.name}")]
    block = block_of(name)
    if grouped and nearest is not None and (nearest.outputs, nearest.inputs) == (outputs, inputs):
        # The same layer once more: a gate may halve its outputs.
        return [*grouped, Groups(1, "")]
    vectors = (n for n, s in context.shapes.items() if s == (inputs,))
    if given or perhaps or any(block_of(n) == block for n in vectors):
        if grouped and follows is None:
            # What has as many channels as a single group needs may be anywhere in the model.
            return [Groups(1, "" if given else ASSUMED)]
        # The sequence suggests groups, another layer a single group: nothing decides.
        return [*grouped, Groups(1, "")]
    if grouped:
        return grouped
    stem = not before and inputs in _STEMS and not context.is_sorted
    return [Groups(1, "" if stem else ASSUMED)]


def _in_sequence(name: str, before: tuple[Kernel, ...]) -> Kernel | None:
    """The previous kernel of a numbered sequence: the same name with one smaller number."""
    parts = parts_of(name)
    numbered = [i for i, part in enumerate(parts) if re.search(r"\d", part)]
    if not numbered:
        return None
    # The innermost number: outer ones count blocks, between which there may be other layers.
    at = numbered[-1]
    lead, rest = parts[:at], parts[at + 1 :]
    found: list[tuple[int, Kernel]] = []
    for kernel in before:
        others = kernel.parts
        alike = others[:at] == lead and others[at + 1 :] == rest and len(others) == len(parts)
        if alike and others[at] != parts[at] and are_in_order(parts, others):
            number = re.search(r"\d+$", others[at])
            found += [(int(number[0]), kernel)] if number else []
    return max(found, key=lambda f: f[0])[1] if found else None


def _part(name: str, context: Context) -> str:
    return next((k.part for k in context.kernels if k.name == name), "")
