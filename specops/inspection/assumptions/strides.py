"""The stride of a kernel: given, in the configuration, or implied by two input sizes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from specops.inspection.assumptions.context import Context, block_of

ASSUMED: Final = ", stride 1 assumed"
"""The norm at any other stride is no larger."""
_PATCHES: Final = ("patch_embed", "patch_embedding", "patch_embeddings", "patchify")
_LARGEST_STEM: Final = 4
"""Most channels of images: after the stem, more channels go with less resolution."""
_SHORTCUTS: Final = ("downsample", "shortcut", "skip")


@dataclass(frozen=True)
class Stride:
    """A stride, and the reason for it."""

    value: int | tuple[int, ...]
    why: str


def strides_of(name: str, taps: tuple[int, ...], context: Context) -> list[Stride]:
    """The strides that a kernel may have: one answer, or all candidates if nothing decides."""
    given = context.hints.of(name, "stride")
    if given is not None:
        return [Stride(given, f", stride {given} as given")]
    told = context.configuration.layer(name)
    if told is not None and told.stride is not None:
        return [Stride(told.stride, f", stride by {context.configuration.source}")]
    low = name.lower()
    square = len(taps) > 1 and len(set(taps)) == 1 and taps[0] > 1
    if square and any(word in low for word in _PATCHES):
        apart = Stride(taps[0], f", stride {taps[0]}: patches, by its name")
        # Patches of odd size usually overlap.
        overlapping = Stride(1, ", overlapping patches at stride 1")
        return [apart, overlapping] if taps[0] % 2 else [apart]
    size = context.hints.of(name, "input_size")
    if size is None:
        return [Stride(1, "" if max(taps) == 1 else ASSUMED)]
    factor, follower = _implied(name, tuple(size), context)
    if factor == 1:
        return [Stride(1, f", stride 1: {follower} has the same size" if follower else "")]
    if factor > 1 and _has_shortcut(name, context):
        return [Stride(factor, f", stride {factor}: {follower} has 1/{factor} of the size")]
    if factor > 1:
        smaller = f"as {follower} has 1/{factor} of the size"
        found = [Stride(factor, f", stride {factor} {smaller}")]
        for stride in range(factor - 1, 0, -1):
            if factor % stride == 0:
                found.append(Stride(stride, f", stride {stride} and pooling behind it, {smaller}"))
        # Channels usually grow where the size shrinks.
        pooled = _grows(follower, context) and _keeps(name, context)
        return found[::-1] if pooled else found
    return [Stride(1, "" if max(taps) == 1 else ASSUMED)]


def _implied(name: str, size: tuple[int, ...], context: Context) -> tuple[int, str]:
    """(the factor from a kernel's input size to that of the next kernel, the next); 0 if none."""
    names = [kernel.name for kernel in context.kernels]
    after = names[names.index(name) + 1 :] if name in names else []
    sizes = ((n, context.hints.of(n, "input_size")) for n in after[:1])
    for follower, next_size in sizes:
        if next_size is None or len(next_size) != len(size):
            continue
        factors = {-(-a // b) if b else 0 for a, b in zip(size, next_size, strict=True)}
        if len(factors) == 1 and all(
            -(-a // f) == b for f in factors for a, b in zip(size, next_size, strict=True)
        ):
            return factors.pop(), follower
    return 0, ""


def _grows(name: str, context: Context) -> bool:
    """Whether a kernel has more outputs than inputs; after the stem, where that means something."""
    found = next((k for k in context.kernels if k.name == name), None)
    return found is not None and found.inputs > _LARGEST_STEM and found.outputs > found.inputs


def _keeps(name: str, context: Context) -> bool:
    """Whether a kernel has as many outputs as inputs."""
    return any(k.name == name and k.inputs == k.outputs for k in context.kernels)


def _has_shortcut(name: str, context: Context) -> bool:
    """Whether the block has a shortcut, which would need pooling as well."""
    block = block_of(name)
    return bool(block) and any(
        word in kernel.name.lower() and block_of(kernel.name).startswith(block)
        for kernel in context.kernels
        for word in _SHORTCUTS
    )
