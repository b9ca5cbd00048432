"""flax.nnx: layers are objects; sizes of inputs are found by tracing a copy."""

from __future__ import annotations

from functools import reduce
from typing import Any

from specops.training.role import Role
from specops_jax.layers import (
    COMPUTED,
    EMBEDDING,
    VECTOR,
    as_called,
    at_both,
    dense,
    stacked,
)
from specops_jax.libraries.flax_layers import flax_convolution, sizes
from specops_jax.libraries.watching import trace, watched

_ADAPTED = (
    "nnx.LoRA adds a part to it, so that it is not the layer's map: merge the parts first, or give "
    "its own map in geometries="
)
_VECTORS = ("bias", "scale", "mean", "var")
_NORMS = ("LayerNorm", "RMSNorm", "BatchNorm", "GroupNorm", "InstanceNorm")
_MARK = "specops_path"
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
        # The mark is in the layer itself, so that copies by nnx.remat, nnx.jit and others have it.
        for path, layer in nnx.iter_graph(copy):
            if isinstance(layer, nnx.Conv | nnx.ConvTranspose):
                setattr(layer, _MARK, _name(path))

        def seen(layer: Any, x: Any) -> None:
            if not hasattr(layer, _MARK):
                return  # a layer that was made in the call, not one of the module
            spatial = len(sizes(layer.kernel_size))
            shape = tuple(int(n) for n in x.shape[-spatial - 1 : -1])
            shapes.setdefault(getattr(layer, _MARK), []).append(shape)

        with watched((nnx.Conv, nnx.ConvTranspose), seen):
            return copy(*x, **kwargs)

    trace(run, (state, *inputs))
    return shapes


def _known(*names: str) -> tuple[Any, ...]:
    """The classes of nnx with these names, as far as this version has them."""
    from flax import nnx

    return tuple(getattr(nnx, name) for name in names if hasattr(nnx, name))


def _roles(module: Any, shapes: Shapes) -> dict[str, Role]:
    from flax import nnx

    found: dict[str, Role] = {}
    kinds = (nnx.LinearGeneral, nnx.Linear, nnx.Embed, nnx.Conv, nnx.ConvTranspose)
    norms, wrappers = _known(*_NORMS), _known("WeightNorm", "SpectralNorm")
    layers = list(nnx.iter_graph(module))
    adapted = {id(x.base_module): _ADAPTED for _, x in layers if isinstance(x, nnx.LoRA)}
    for _, x in layers:
        if isinstance(x, wrappers):
            computed = COMPUTED.format(f"nnx.{type(x).__name__}")
            adapted |= {id(inner): computed for _, inner in nnx.iter_graph(x.layer_instance)}
    shared: dict[int, list[str]] = {}
    for path, layer in layers:
        name = _name(path)
        role, attribute = None, "kernel"
        if isinstance(layer, (*kinds, *norms, nnx.Einsum)):
            held = [f"{name}/{k}".lstrip("/") for k in _VECTORS if hasattr(layer, k)]
            found |= dict.fromkeys(held, Role(skipped=VECTOR))
        if isinstance(layer, nnx.LinearGeneral):
            role = dense(len(layer.batch_axis), len(layer.out_features))
        elif isinstance(layer, nnx.Linear):
            role = dense()
        elif isinstance(layer, nnx.Embed):
            role, attribute = Role(dense().geometry, opt_in=EMBEDDING), "embedding"
        elif isinstance(layer, nnx.Einsum):
            role = Role(obstacle="an einsum's kernel: pass its geometry")
        elif isinstance(layer, nnx.Conv | nnx.ConvTranspose):
            transposed = isinstance(layer, nnx.ConvTranspose)
            met = shapes.get(name) or [None]
            role = reduce(at_both, (flax_convolution(layer, s, transposed=transposed) for s in met))
        if role is not None:
            if id(layer) in adapted:
                role = Role(obstacle=adapted[id(layer)])
            role = as_called(layer, role, *kinds)
            kernel, own = getattr(layer, attribute), _own_shape(layer)
            role = stacked(role, own or kernel.shape, kernel.shape)
            # A variable that several layers share is one array, with a single name in the state.
            names = shared.setdefault(id(kernel), [])
            role = at_both(found[names[0]], role) if names else role
            names.append(f"{name}/{attribute}" if name else attribute)
            found |= dict.fromkeys(names, role)
    return found


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


def _name(path: Any) -> str:
    return "/".join(str(part) for part in path)
