"""equinox: modules are pytrees; sizes of inputs are found by tracing."""

from __future__ import annotations

from functools import reduce
from typing import Any

import jax

from specops.geometry import Dense
from specops.geometry.fused import gates_of
from specops.training.role import Role
from specops_jax.layers import (
    COMPUTED,
    EMBEDDING,
    VECTOR,
    as_called,
    at_both,
    convolution,
    stacked,
    transposed_convolution,
)
from specops_jax.libraries.watching import watched
from specops_jax.paths import name_of

Shapes = dict[int, list[tuple[int, ...] | None]]


def knows(module: Any) -> bool:
    """Whether it is an equinox module."""
    import equinox as eqx

    return isinstance(module, eqx.Module)


def roles(module: Any, inputs: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Role]:
    """A role for every weight, at the sizes that `inputs` (one sample) lead to."""
    import equinox as eqx

    calls: list[tuple[Any, tuple[int, ...]]] = []

    def seen(layer: Any, x: Any) -> None:
        calls.append((layer, tuple(int(n) for n in x.shape[1:])))

    # Batch statistics would need an axis, and dropout a key.
    module = eqx.nn.inference_mode(module)
    if inputs or kwargs:
        inputs, kwargs = jax.tree.map(lambda x: x, (inputs, kwargs))  # states may be used once
        with watched((eqx.nn.Conv, eqx.nn.ConvTranspose), seen):
            eqx.filter_eval_shape(lambda: module(*_sample(inputs), **kwargs))
    return _roles(module, _sizes(module, calls))


def _sizes(module: Any, calls: list[tuple[Any, tuple[int, ...]]]) -> Shapes:
    """The sizes at which each layer was called, by its id."""
    import equinox as eqx

    kinds = (eqx.nn.Conv, eqx.nn.ConvTranspose)
    held = jax.tree.leaves(module, is_leaf=lambda x: isinstance(x, kinds))
    own = {id(layer) for layer in held}
    shapes: Shapes = {}
    for layer, size in calls:
        if id(layer) in own:
            shapes.setdefault(id(layer), []).append(size)
    # eqx.filter_checkpoint and similar functions call copies of layers, and a copy may be of any.
    copies = [(layer.weight.shape, size) for layer, size in calls if id(layer) not in own]
    for layer in held:
        if id(layer) in shapes:
            shapes[id(layer)] += [s for shape, s in copies if shape == layer.weight.shape]
    return shapes


def roles_within(params: Any) -> dict[str, Role]:
    """A role for every weight of the modules in a pytree."""
    return _roles(params, {})


def _sample(inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    import jax.numpy as jnp

    shapes = (jax.ShapeDtypeStruct,)
    return tuple(jnp.zeros(x.shape, x.dtype) if isinstance(x, shapes) else x for x in inputs)


def _roles(tree: Any, shapes: Shapes) -> dict[str, Role]:
    import equinox as eqx

    cells = (eqx.nn.LSTMCell, eqx.nn.GRUCell)
    kinds = (eqx.nn.Linear, eqx.nn.Conv, eqx.nn.ConvTranspose, eqx.nn.Embedding)
    norms = (eqx.nn.LayerNorm, eqx.nn.RMSNorm, eqx.nn.GroupNorm, eqx.nn.BatchNorm)
    met = jax.tree_util.tree_flatten_with_path(
        tree, is_leaf=lambda x: isinstance(x, (*kinds, *cells, *norms))
    )[0]
    wrappers = (eqx.nn.WeightNorm, eqx.nn.SpectralNorm)
    wrapped = jax.tree.leaves(tree, is_leaf=lambda x: isinstance(x, wrappers))
    computed = {id(x.layer): type(x).__name__ for x in wrapped if isinstance(x, wrappers)}
    found: dict[str, Role] = {}
    for path, layer in met:
        if isinstance(layer, (*kinds, *cells, *norms)):
            vectors = ("bias", "bias_n", *(["weight"] if isinstance(layer, norms) else []))
            held = [name_of((*path, jax.tree_util.GetAttrKey(key))) for key in vectors]
            found |= dict.fromkeys(held, Role(skipped=VECTOR))
        if isinstance(layer, cells):
            found |= _cell(path, layer, cells)
        elif isinstance(layer, kinds) and hasattr(layer.weight, "shape"):
            roles = [_role(layer, shape) for shape in shapes.get(id(layer)) or [None]]
            role = as_called(layer, reduce(at_both, roles), *kinds)
            if id(layer) in computed:
                role = Role(obstacle=COMPUTED.format(f"eqx.nn.{computed[id(layer)]}"))
            shape = tuple(layer.weight.shape)
            name = name_of((*path, jax.tree_util.GetAttrKey("weight")))
            found[name] = stacked(role, _own_shape(layer), shape)
    return found


def _cell(path: Any, layer: Any, cells: tuple[type, ...]) -> dict[str, Role]:
    """The matrices of a recurrent cell: a block for each gate."""
    found = {}
    for attribute in ("weight_ih", "weight_hh"):
        shape = tuple(getattr(getattr(layer, attribute), "shape", ()))
        gates = gates_of(layer.hidden_size, shape[-2], -2) if len(shape) >= 2 else None
        if gates is not None:
            name = name_of((*path, jax.tree_util.GetAttrKey(attribute)))
            role = as_called(layer, Role(gates.geometry), *cells)
            found[name] = stacked(role, shape[-2:], shape)
    return found


def _own_shape(layer: Any) -> tuple[int, ...]:
    """The weight's shape in a single layer, without the axes that maps over layers have added."""
    import equinox as eqx

    if isinstance(layer, eqx.nn.Linear):
        sizes = layer.out_features, layer.in_features
        return tuple(1 if n == "scalar" else n for n in sizes)
    if isinstance(layer, eqx.nn.Embedding):
        return layer.num_embeddings, layer.embedding_size
    channels = layer.in_channels // layer.groups
    return layer.out_channels, channels, *layer.kernel_size


def _role(layer: Any, shape: tuple[int, ...] | None) -> Role:
    import equinox as eqx

    if isinstance(layer, eqx.nn.Linear):
        return Role(Dense(out_axes=(-2,)))
    if isinstance(layer, eqx.nn.Embedding):
        return Role(Dense(out_axes=(-1,)), opt_in=EMBEDDING)
    mode = layer.padding_mode.upper()
    if mode not in ("ZEROS", "CIRCULAR") and _pads(layer):
        return Role(obstacle=f"padding_mode {mode.lower()!r} is no convolution on a torus")
    common = {
        "kernel": layer.kernel_size,
        "stride": layer.stride,
        "dilation": layer.dilation,
        "padding": layer.padding,
        "groups": layer.groups,
        "layout": "OI*",
        "input_shape": shape,
    }
    if isinstance(layer, eqx.nn.ConvTranspose):
        circular = mode == "CIRCULAR"
        common["padding"] = "CIRCULAR" if circular else layer._padding_transpose()
        return transposed_convolution(**common, flipped=False)
    if mode == "CIRCULAR" and _pads(layer):
        if not _closes(layer, shape):
            return Role(
                obstacle=f"padding {layer.padding!r} in mode 'circular' reads some places twice or "
                f"not at all: no convolution on a torus"
            )
        common["padding"] = "CIRCULAR"
    return convolution(**common)


def _pads(layer: Any) -> bool:
    """Whether the layer pads its input at all, so that the mode of padding matters."""
    return layer.padding not in ("VALID", ((0, 0),) * layer.num_spatial_dims)


def _closes(layer: Any, shape: tuple[int, ...] | None) -> bool:
    """Whether a circularly padded layer has as many outputs as one on a torus."""
    if isinstance(layer.padding, str):
        return True
    for axis, (k, s, d) in enumerate(
        zip(layer.kernel_size, layer.stride, layer.dilation, strict=True)
    ):
        missing = d * (k - 1) - sum(layer.padding[axis])
        n = s if shape is None else shape[axis]
        if (n - missing - 1) // s != (n - 1) // s:
            return False
    return True
