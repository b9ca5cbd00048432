"""The map that a layer's kernel stands for, from the layer's attributes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from inspect import getattr_static
from itertools import combinations
from typing import Any

from specops.errors import GeometryError
from specops.geometry import Conv, Dense
from specops.training.role import Role

COMPUTED = (
    "{} computes the layer's weight from it, so that it is not the layer's map: bound the layer by "
    "specops instead of it, or give its own map in geometries="
)
_TWO_MAPS = (
    "it is used as two different maps (strides, padding and the like of the layers that share it, "
    "or of a padding that depends on the size): give one in geometries="
)
_KERNELS = (
    "a stack of kernels of convolutions, shape {}, which no geometry stands for: map over its "
    "layers, jax.vmap of specops_jax.init and project_params on that part of the parameters"
)
VECTOR = "a bias or scale, no matrix"
EMBEDDING = "an embedding: a table of rows, constrained only by a rule that names it"


def dense(batch: int = 0, outputs: int = 1) -> Role:
    """The role of a kernel (*batch, inputs…, outputs…)."""
    return Role(Dense(out_axes=tuple(range(-outputs, 0)), batch_axes=tuple(range(batch))))


def convolution(
    *,
    kernel: Sequence[int],
    stride: Any,
    dilation: Any,
    padding: Any,
    groups: int,
    layout: str,
    input_shape: tuple[int, ...] | None,
    input_dilation: Any = 1,
    masked: bool = False,
) -> Role:
    """The role of a convolution's kernel, from arguments in the terms of XLA's libraries."""
    ndim = len(kernel)
    stride, dilation = per_axis(stride, ndim), per_axis(dilation, ndim)
    if masked:
        return Role(obstacle="its kernel is masked: the map is not that of the array")
    if set(per_axis(input_dilation, ndim)) != {1}:
        return Role(obstacle="dilated inputs are not supported: give a transposed convolution")
    boundary = "zeros"
    if isinstance(padding, str):
        name = padding.upper()
        if name == "CIRCULAR":
            boundary, padding = "circular", "same"
        elif name == "CAUSAL":
            padding = tuple((d * (k - 1), 0) for d, k in zip(dilation, kernel, strict=True))
        elif name in ("SAME", "VALID"):
            padding = name.lower()
        elif name == "SAME_LOWER":
            padding = _same_lower(kernel, stride, dilation, input_shape)
        elif name == "REFLECT" and set(kernel) == {1}:
            padding = "valid"  # a kernel of one tap needs no padding
        else:
            return Role(obstacle=f"padding {padding!r} is no convolution on a torus")
    else:
        padding = pairs(padding, ndim)
    return _checked(
        input_shape,
        stride=stride,
        dilation=dilation,
        groups=groups,
        padding=padding,
        boundary=boundary,
        layout=layout,
    )


def transposed_convolution(
    *,
    kernel: Sequence[int],
    stride: Any,
    dilation: Any,
    padding: Any,
    layout: str,
    flipped: bool,
    input_shape: tuple[int, ...] | None,
    groups: int = 1,
    masked: bool = False,
) -> Role:
    """The role of a transposed convolution: it correlates an input with stride − 1 inserted zeros.

    `padding` is a name, or the padding (before, after) of each axis. If the kernel is not flipped,
    the map is the mirror image of the transpose, with the same singular values.
    """
    ndim = len(kernel)
    stride, dilation = per_axis(stride, ndim), per_axis(dilation, ndim)
    if masked:
        return Role(obstacle="its kernel is masked: the map is not that of the array")
    circular = isinstance(padding, str) and padding.upper() == "CIRCULAR"
    if circular:
        return _checked(
            input_shape,
            stride=stride,
            dilation=dilation,
            groups=groups,
            transposed=True,
            boundary="circular",
            layout=layout,
        )
    wide = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
    if isinstance(padding, str):
        if padding.upper() not in ("SAME", "VALID"):
            return Role(obstacle=f"padding {padding!r} is no convolution on a torus")
        added = [_named(w + 1, s, padding.upper()) for w, s in zip(wide, stride, strict=True)]
    else:
        added = list(pairs(padding, ndim))
    taken = [
        (w - before, w - after) if flipped else (w - after, w - before)
        for w, (before, after) in zip(wide, added, strict=True)
    ]
    # Padding beyond the kernel's reach only adds rows of zeros, whose position does not matter.
    # Such rows before an axis that is cropped at its end cannot be expressed: if a map has fewer
    # outputs than inputs, as many zeros are missing from its singular values.
    extra = tuple(max(0, -upper) + (max(0, -lower) if upper <= 0 else 0) for lower, upper in taken)
    return _checked(
        input_shape,
        stride=stride,
        dilation=dilation,
        groups=groups,
        transposed=True,
        output_padding=extra,
        padding=tuple((max(0, lower), max(0, upper)) for lower, upper in taken),
        layout=layout,
    )


def as_called(layer: Any, role: Role, *kinds: type) -> Role:
    """The role, unless the layer is a subclass of one of these kinds with its own __call__."""
    kind = next((k for k in kinds if isinstance(layer, k)), None)
    if kind is None or role.geometry is None or _call(type(layer)) is _call(kind):
        return role
    return Role(
        obstacle=f"{type(layer).__name__} has a __call__ of its own, so that the layer need not "
        f"compute with this array as it is: if it does, say so by its map in geometries=",
        opt_in=role.opt_in,
    )


def _call(kind: type) -> Any:
    return getattr_static(kind, "__call__")


def at_both(a: Role, b: Role) -> Role:
    """The role of an array that occurs twice: at two input sizes, or in two layers.

    With a zero boundary it is that at the larger size, of which the operator at the smaller one is
    a part. For circular layers, and if "same" begins at another offset, it is that of every size.
    """
    one, two = a.geometry, b.geometry
    if one == two:
        return b
    if one is None or two is None:
        return a if one is None else b
    if (
        not isinstance(one, Conv)
        or not isinstance(two, Conv)
        or replace(one, input_shape=None) != replace(two, input_shape=None)
    ):
        return Role(obstacle=_TWO_MAPS, opt_in=a.opt_in or b.opt_in)
    return Role(two.covering(one.grid))


def stacked(role: Role, own: tuple[int, ...], found: tuple[int, ...]) -> Role:
    """The role of a stack of kernels of shape `own`, as scanned and mapped layers hold them."""
    extra = len(found) - len(own)
    if extra == 0 or role.geometry is None:
        return replace(role, shape=found)
    if isinstance(role.geometry, Conv):
        return Role(obstacle=_KERNELS.format(found))
    # The axes of scans and maps may be anywhere.
    places = [
        kept
        for kept in combinations(range(len(found)), len(own))
        if tuple(found[axis] for axis in kept) == own
    ]
    if len(places) != 1:
        return Role(obstacle=f"a stack of kernels of shape {found}: pass its geometry")
    kept = places[0]
    stack = tuple(axis for axis in range(len(found)) if axis not in kept)
    batch = stack + tuple(kept[a] for a in role.geometry.batch_axes)
    out, inner = role.geometry.out_axes, role.geometry.in_axes
    out = tuple(kept[a] for a in out)
    inner = inner and tuple(kept[a] for a in inner)
    splits, repeats = role.geometry.splits, role.geometry.repeats
    geometry = Dense(out, inner, batch_axes=batch, splits=splits, repeats=repeats)
    return Role(geometry, opt_in=role.opt_in, shape=found)


def per_axis(value: Any, ndim: int) -> tuple[int, ...]:
    """One int per axis; None stands for 1."""
    if value is None:
        return (1,) * ndim
    if isinstance(value, int):
        return (value,) * ndim
    values = tuple(int(v) for v in value)
    return values * ndim if len(values) == 1 else values


def pairs(padding: Any, ndim: int) -> tuple[tuple[int, int], ...]:
    """(before, after) per axis from an int, ints or pairs."""
    if isinstance(padding, int):
        return ((padding, padding),) * ndim
    result = tuple((p, p) if isinstance(p, int) else (int(p[0]), int(p[1])) for p in padding)
    return result * ndim if len(result) == 1 else result


def _named(reach: int, stride: int, name: str) -> tuple[int, int]:
    """The padding (before, after) of `jax.lax.conv_transpose` for a kernel of this reach."""
    if name == "VALID":
        return reach - 1, max(reach - stride, 0) + stride - 1
    total = reach + stride - 2
    before = reach - 1 if stride > reach - 1 else math.ceil(total / 2)
    return before, total - before


def _same_lower(
    kernel: Sequence[int],
    stride: Sequence[int],
    dilation: Sequence[int],
    input_shape: tuple[int, ...] | None,
) -> Any:
    """XLA's "SAME_LOWER": as "same", but an odd entry of padding comes before, not after."""
    if input_shape is None:
        return "same"
    result = []
    for k, s, d, n in zip(kernel, stride, dilation, input_shape, strict=True):
        total = max((-(-n // s) - 1) * s + d * (k - 1) + 1 - n, 0)
        result.append((total - total // 2, total // 2))
    return tuple(result)


def _checked(input_shape: tuple[int, ...] | None, **arguments: Any) -> Role:
    try:
        return Role(Conv(input_shape, **arguments))
    except GeometryError as error:
        return Role(obstacle=str(error))
