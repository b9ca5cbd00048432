"""Which linear map each variable of a Keras layer stands for."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from inspect import getattr_static
from typing import Any

import keras
import numpy as np
from keras import layers

from specops import Conv, Dense
from specops.authors import Geometry, GeometryError

_CONVS = (layers.Conv1D, layers.Conv2D, layers.Conv3D)
TRANSPOSES = (layers.Conv1DTranspose, layers.Conv2DTranspose, layers.Conv3DTranspose)
_DEPTHWISE = (layers.DepthwiseConv1D, layers.DepthwiseConv2D)
_SEPARABLE = (layers.SeparableConv1D, layers.SeparableConv2D)
SIZED = (*_CONVS, *TRANSPOSES, *_DEPTHWISE, *_SEPARABLE)
_GATES = {layers.LSTMCell: 4, layers.GRUCell: 3, layers.SimpleRNNCell: 1}
_COLUMNS = Dense(out_axes=(-1,))


@dataclass(frozen=True)
class Role:
    """What a variable is: a map, seen through `shape` where the geometry needs another one."""

    geometry: Geometry | None = None
    shape: tuple[int, ...] | None = None
    obstacle: str = ""
    opt_in: str = ""
    skipped: str = ""


def wrappers(flat: Iterable[Any]) -> dict[int, str]:
    """Names of the layers that normalise another's kernel, by the id of that other."""
    kind = layers.SpectralNormalization
    return {id(layer.layer): layer.name for layer in flat if isinstance(layer, kind)}


def roles(
    layer: Any, grid: tuple[int, ...] | None = None, wrapper: str = ""
) -> Iterator[tuple[Any, Role]]:
    """The layer's own variables that stand for maps, on a grid of this size.

    Subclasses count as their layers of Keras, unless they compute otherwise, or a `wrapper`
    normalises them; `geometries=` overrides what is wrong.
    """
    own = _normalised(wrapper) if wrapper else _computes_otherwise(layer)
    for variable, role in _roles(layer, grid):
        if own and role.geometry is not None:
            role = Role(obstacle=own, opt_in=role.opt_in)
        yield variable, role


def _normalised(wrapper: str) -> str:
    return (
        f"{wrapper} divides it by its norm in each forward pass of training: take the wrapper "
        f"off, and a rule keeps the norm at or below its bound"
    )


def _computes_otherwise(layer: Any) -> str:
    """Why a layer's arrays need not be the maps of its class of Keras; empty if they are."""
    name, plain = type(layer).__name__, layers.Layer
    plain = next((k for k in type(layer).__mro__ if k.__module__.startswith("keras.")), plain)
    if getattr(layer, "lora_enabled", False):
        return f"LoRA adds a part to the {name}'s: give its own map in geometries="
    if getattr_static(type(layer), "call", None) is getattr_static(plain, "call", None):
        return ""
    return (
        f"{name} has a call of its own, so that the layer need not compute with this array as it "
        f"is: if it does, say so by its map in geometries="
    )


def _roles(layer: Any, grid: tuple[int, ...] | None) -> Iterator[tuple[Any, Role]]:
    if not layer.built:
        return
    kernel = _stored(layer, "kernel")
    if isinstance(layer, layers.EinsumDense):
        yield kernel, _einsum(layer.equation)
        if layer.bias is not None:
            yield layer.bias, Role(skipped="a bias, no matrix")
    elif isinstance(layer, layers.Dense):
        yield kernel, Role(_COLUMNS)
    elif isinstance(layer, layers.Embedding):
        reason = "an embedding: only a pattern that names it constrains it"
        yield _stored(layer, "embeddings"), Role(_COLUMNS, opt_in=reason)
    elif isinstance(layer, TRANSPOSES):
        yield kernel, _transposed(layer, grid)
    elif isinstance(layer, _DEPTHWISE):
        yield kernel, _depthwise(layer, kernel.shape, grid)
    elif isinstance(layer, _SEPARABLE):
        depthwise = layer.depthwise_kernel
        yield depthwise, _depthwise(layer, depthwise.shape, grid)
        yield layer.pointwise_kernel, Role(_COLUMNS)  # a 1×1 kernel: a matrix at every place
    elif isinstance(layer, _CONVS):
        yield kernel, _conv(layer, grid, groups=layer.groups)
    elif gates := next((n for kind, n in _GATES.items() if isinstance(layer, kind)), 0):
        splits = (layer.units,) * gates if gates > 1 else None
        for variable in (layer.kernel, layer.recurrent_kernel):
            yield variable, Role(Dense(out_axes=(-1,), splits=splits))


def grid_of(layer: Any, input_shape: Any) -> tuple[int, ...] | None:
    """The spatial part of a convolution's input shape; None unless all of it is known."""
    if not input_shape or len(input_shape) < 3:
        return None
    last = layer.data_format == "channels_last"
    grid = tuple(input_shape[1:-1] if last else input_shape[2:])
    return None if None in grid else tuple(int(n) for n in grid)


def _conv(layer: Any, grid: Any, **options: Any) -> Role:
    padding: Any = layer.padding
    if padding == "causal":
        padding = tuple((d * (k - 1), 0) for k, d in _spans(layer))
    try:
        return Role(
            Conv(
                grid,
                stride=tuple(layer.strides),
                dilation=tuple(layer.dilation_rate),
                padding=padding,
                layout="*IO",
                **options,
            )
        )
    except GeometryError as error:
        return Role(obstacle=str(error))


def _depthwise(layer: Any, shape: tuple[int, ...], grid: Any) -> Role:
    """(*kernel, in, multiplier): output c·multiplier + m belongs to the group of input c."""
    *kernel, channels, multiplier = shape
    role = _conv(layer, grid, groups=channels)
    return Role(role.geometry, (*kernel, 1, channels * multiplier), role.obstacle)


def _transposed(layer: Any, grid: Any) -> Role:
    windows = [_window(layer, axis) for axis in range(len(layer.kernel_size))]
    try:
        return Role(
            Conv(
                grid,
                stride=tuple(layer.strides),
                dilation=tuple(layer.dilation_rate),
                padding=tuple((low, max(high, 0)) for low, high in windows),
                output_padding=tuple(max(-high, 0) for _, high in windows),
                transposed=True,
                layout="*OI",
            )
        )
    except GeometryError as error:
        return Role(obstacle=str(error))


def _window(layer: Any, axis: int) -> tuple[int, int]:
    """What a transposed convolution cuts off below and above (negative: adds), by asking it.

    Versions and backends of Keras differ in where "same" and `output_padding` put the window,
    so a unit impulse is sent through a kernel with distinct entries.
    """
    k, s, d = layer.kernel_size[axis], layer.strides[axis], layer.dilation_rate[axis]
    span, extra = d * (k - 1) + 1, layer.output_padding
    n = 2 * span + 1
    impulse = np.zeros((1, n, 1), "float32")
    impulse[0, span] = 1.0
    answer = keras.ops.conv_transpose(
        keras.ops.convert_to_tensor(impulse),
        keras.ops.convert_to_tensor(np.arange(1.0, k + 1.0, dtype="float32").reshape(k, 1, 1)),
        strides=s,
        padding=layer.padding,
        output_padding=extra[axis] if isinstance(extra, tuple | list) else extra,
        data_format="channels_last",
        dilation_rate=d,
    )
    answer = keras.ops.convert_to_numpy(answer)[0, :, 0]
    low = s * span - int(np.argmin(np.abs(answer - 1.0)))
    return low, (n - 1) * s + span - low - len(answer)


def _einsum(equation: str) -> Role:
    """Letters of the kernel: shared with both sides a stack, with one side its rows or columns."""
    left, _, out = equation.replace(" ", "").replace("...", "").partition("->")
    given, _, kernel = left.partition(",")
    if any(len(set(part)) != len(part) for part in (given, kernel, out)):
        return Role(obstacle=f"the equation {equation!r} repeats an index")
    if set(kernel) - set(given) - set(out):
        return Role(obstacle=f"the equation {equation!r} sums the kernel over an index alone")
    if set(given) - set(kernel) - set(out):
        return Role(obstacle=f"the equation {equation!r} sums the input over an index alone")
    axes: dict[str, tuple[int, ...]] = {
        kind: tuple(i for i, c in enumerate(kernel) if (c in given, c in out) == where)
        for kind, where in [("out", (False, True)), ("in", (True, False)), ("batch", (True, True))]
    }
    if not axes["out"] or not axes["in"]:
        return Role(obstacle=f"the equation {equation!r} makes the kernel no matrix")
    return Role(Dense(axes["out"], axes["in"], axes["batch"]))


def _stored(layer: Any, name: str) -> Any:
    """The variable; the public attribute may be what a call makes of it (LoRA, quantisation)."""
    variable = getattr(layer, f"_{name}", None)
    return getattr(layer, name, None) if variable is None else variable


def _spans(layer: Any) -> Iterator[tuple[int, int]]:
    return zip(layer.kernel_size, layer.dilation_rate, strict=True)
