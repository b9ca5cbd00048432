"""flax.nnx: layers are objects; sizes of inputs are met while a copy is traced."""

from __future__ import annotations

from functools import reduce
from typing import Any

from specops_jax.layers import (
    EMBEDDING,
    Role,
    at_both,
    convolution,
    dense,
    stacked,
    transposed_convolution,
)
from specops_jax.libraries.watching import trace, watched

Shapes = dict[str, list[tuple[int, ...] | None]]


def knows(module: Any) -> bool:
    """Whether it is an nnx module."""
    from flax import nnx

    return isinstance(module, nnx.Module)


def roles(module: Any, inputs: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Role]:
    """A role for every kernel, at the sizes that `inputs` lead to."""
    return _roles(module, _shapes(module, inputs, kwargs) if inputs or kwargs else {})


def roles_within(params: Any) -> dict[str, Role]:
    """A role for every kernel of the modules in a pytree."""
    return roles(params, (), {}) if knows(params) else {}


def _shapes(module: Any, inputs: tuple[Any, ...], kwargs: dict[str, Any]) -> Shapes:
    from flax import nnx

    definition, state = nnx.split(module)
    shapes: Shapes = {}

    def run(state: Any, *x: Any) -> Any:
        copy = nnx.merge(definition, state)
        paths = {id(layer): _name(path) for path, layer in nnx.iter_graph(copy)}

        def seen(layer: Any, x: Any) -> None:
            spatial = len(_sizes(layer.kernel_size))
            shape = tuple(int(n) for n in x.shape[-spatial - 1 : -1])
            shapes.setdefault(paths[id(layer)], []).append(shape)

        with watched((nnx.Conv, nnx.ConvTranspose), seen):
            return copy(*x, **kwargs)

    trace(run, (state, *inputs))
    return shapes


def _roles(module: Any, shapes: Shapes) -> dict[str, Role]:
    from flax import nnx

    found: dict[str, Role] = {}
    for path, layer in nnx.iter_graph(module):
        name = _name(path)
        role, attribute = None, "kernel"
        if isinstance(layer, nnx.LinearGeneral):
            role = dense(len(layer.batch_axis), len(layer.out_features))
        elif isinstance(layer, nnx.Linear):
            role = dense()
        elif isinstance(layer, nnx.Embed):
            role, attribute = Role(dense().geometry, opt_in=EMBEDDING), "embedding"
        elif isinstance(layer, nnx.Einsum):
            role = Role(obstacle="an einsum's kernel: pass its geometry")
        elif isinstance(layer, nnx.Conv | nnx.ConvTranspose):
            role = reduce(at_both, (_convolution(layer, s) for s in shapes.get(name) or [None]))
        if role is not None:
            shape, own = getattr(layer, attribute).shape, _own_shape(layer)
            role = stacked(role, own or shape, shape)
            found[f"{name}/{attribute}" if name else attribute] = role
    return found


def _convolution(layer: Any, shape: tuple[int, ...] | None) -> Role:
    from flax import nnx

    kernel, masked = _sizes(layer.kernel_size), layer.mask is not None
    if isinstance(layer, nnx.ConvTranspose):
        return transposed_convolution(
            kernel=kernel,
            stride=layer.strides,
            dilation=layer.kernel_dilation,
            padding=layer.padding,
            layout="*OI" if layer.transpose_kernel else "*IO",
            flipped=layer.transpose_kernel,
            input_shape=shape,
            masked=masked,
        )
    return convolution(
        kernel=kernel,
        stride=layer.strides,
        dilation=layer.kernel_dilation,
        padding=layer.padding,
        groups=layer.feature_group_count,
        layout="*IO",
        input_shape=shape,
        input_dilation=layer.input_dilation,
        masked=masked,
    )


def _own_shape(layer: Any) -> tuple[int, ...] | None:
    from flax import nnx

    if isinstance(layer, nnx.LinearGeneral):
        return (*dict(layer.batch_axis).values(), *layer.in_features, *layer.out_features)
    if isinstance(layer, nnx.Linear):
        return layer.in_features, layer.out_features
    if isinstance(layer, nnx.Embed):
        return layer.num_embeddings, layer.features
    if isinstance(layer, nnx.Conv | nnx.ConvTranspose):
        return tuple(layer.kernel_shape)
    return None


def _sizes(kernel_size: Any) -> tuple[int, ...]:
    return (kernel_size,) if isinstance(kernel_size, int) else tuple(kernel_size)


def _name(path: Any) -> str:
    return "/".join(str(part) for part in path)
