"""haiku: layers are found while a transformed function is traced."""

from __future__ import annotations

from typing import Any

import jax

from specops.errors import AdapterError
from specops.geometry.fused import gates_of
from specops.training.role import Role
from specops_jax.layers import (
    EMBEDDING,
    VECTOR,
    as_called,
    at_both,
    convolution,
    dense,
    stacked,
    transposed_convolution,
)
from specops_jax.libraries.watching import trace
from specops_jax.paths import named_leaves


def knows(module: Any) -> bool:
    """Whether it is what `haiku.transform` returns."""
    import haiku as hk

    return isinstance(module, hk.Transformed | hk.TransformedWithState)


def roles(module: Any, inputs: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Role]:
    """A role for every weight that is found by tracing `init`."""
    import haiku as hk

    if not inputs and not kwargs:
        raise AdapterError("haiku functions know their layers only when called: give the inputs")
    met: dict[str, tuple[Role, tuple[int, ...]]] = {}
    kinds = (
        *(hk.Linear, hk.Embed, hk.ConvND, hk.ConvNDTranspose),
        *(hk.DepthwiseConv1D, hk.DepthwiseConv2D, hk.DepthwiseConv3D),
        *(hk.LSTM, hk.GRU),
    )

    def look(function: Any, args: Any, given: Any, context: Any) -> Any:
        layer, result = context.module, function(*args, **given)
        if context.method_name == "__call__":
            x = args[0] if args else next(iter(given.values()), None)
            own = layer.params_dict()
            # Vectors of this layer; in a stack of layers they become arrays of more axes.
            vectors = {_attribute(k): Role(skipped=VECTOR) for k, w in own.items() if w.ndim < 2}
            for attribute, plain in (vectors | _roles(layer, x)).items():
                role = as_called(layer, plain, *kinds)
                name = f"{layer.module_name}/{attribute}"
                if name in own:
                    # An LSTM knows more about its matrix than its inner layer, which comes first.
                    again = name in met and not isinstance(layer, hk.LSTM)
                    role = at_both(met[name][0], role) if again else role
                    met[name] = role, tuple(own[name].shape)
        return result

    def init(*x: Any) -> Any:
        with hk.intercept_methods(look):
            return module.init(jax.random.key(0), *x, **kwargs)

    parameters = trace(init, inputs)
    parameters = parameters[0] if isinstance(parameters, tuple) else parameters
    found = {}
    for name, leaf in named_leaves(parameters)[0]:
        # Layers within a stack are found without the stack's name; its axis is the first.
        inner, shape = name.partition("/")[2], tuple(leaf.shape)
        if name in met:
            found[name] = stacked(*met[name], shape)
        elif inner in met and len(shape) == len(met[inner][1]) + 1:
            found[name] = stacked(*met[inner], shape)
    return found


def _attribute(name: str) -> str:
    return name.rpartition("/")[2]


def _roles(layer: Any, x: Any) -> dict[str, Role]:
    import haiku as hk

    if isinstance(layer, hk.Linear):
        return {"w": dense()}
    if isinstance(layer, hk.LSTM):
        # The matrix belongs to an inner layer, which takes the inputs beside the state.
        return {"linear/w": _gates(layer, 4)}
    if isinstance(layer, hk.GRU):
        return {"w_i": _gates(layer, 3), "w_h": _gates(layer, 3)}
    if isinstance(layer, hk.Embed):
        return {"embeddings": Role(dense().geometry, opt_in=EMBEDDING)}
    if isinstance(layer, hk.ConvNDTranspose):
        return {"w": _transposed(layer, _grid(x, layer.num_spatial_dims, layer.channel_index))}
    if isinstance(layer, hk.ConvND):
        return {"w": _convolution(layer, _grid(x, layer.num_spatial_dims, layer.channel_index))}
    if isinstance(layer, hk.DepthwiseConv1D | hk.DepthwiseConv2D | hk.DepthwiseConv3D):
        return {"w": _depthwise(layer, x, hk.get_channel_index(layer.data_format))}
    return {}


def _grid(x: Any, ndim: int, channel_index: int) -> tuple[int, ...]:
    """The sizes of an input along its spatial axes."""
    return tuple(x.shape[-ndim - 1 : -1] if channel_index == -1 else x.shape[-ndim:])


def _transposed(layer: Any, grid: tuple[int, ...]) -> Role:
    if layer.output_shape is not None:
        return Role(obstacle="a transposed layer of given output shape")
    return transposed_convolution(
        kernel=layer.kernel_shape,
        stride=layer.stride,
        dilation=1,
        padding=layer.padding,
        layout="*OI",
        flipped=False,
        input_shape=grid,
        masked=layer.mask is not None,
    )


def _convolution(layer: Any, grid: tuple[int, ...]) -> Role:
    return convolution(
        kernel=layer.kernel_shape,
        stride=layer.stride,
        dilation=layer.kernel_dilation,
        padding=layer.padding,
        groups=layer.feature_group_count,
        layout="*IO",
        input_shape=grid,
        input_dilation=layer.lhs_dilation,
        masked=layer.mask is not None,
    )


def _depthwise(layer: Any, x: Any, channel_index: int) -> Role:
    ndim = len(layer.kernel_shape)
    return convolution(
        kernel=layer.kernel_shape,
        stride=layer.stride,
        dilation=layer.rhs_dilation,
        padding=layer.padding,
        groups=int(x.shape[-1] if channel_index == -1 else x.shape[-ndim - 1]),
        layout="*IO",
        input_shape=_grid(x, ndim, channel_index),
        input_dilation=layer.lhs_dilation,
    )


def _gates(layer: Any, count: int) -> Role:
    found = gates_of(layer.hidden_size, count * layer.hidden_size, -1)
    assert found is not None
    return Role(found.geometry)
