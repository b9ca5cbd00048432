"""flax.nnx: layers are objects; sizes of inputs are met while a copy is traced."""

from __future__ import annotations

from functools import reduce
from typing import Any

from specops_jax.layers import EMBEDDING, Role, as_called, at_both, dense, stacked
from specops_jax.libraries.flax_layers import flax_convolution, sizes
from specops_jax.libraries.watching import trace, watched

_ADAPTED = (
    "nnx.LoRA adds a part to it, so that it is not the layer's map: merge the parts first, or give "
    "its own map in geometries="
)
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
            spatial = len(sizes(layer.kernel_size))
            shape = tuple(int(n) for n in x.shape[-spatial - 1 : -1])
            shapes.setdefault(paths[id(layer)], []).append(shape)

        with watched((nnx.Conv, nnx.ConvTranspose), seen):
            return copy(*x, **kwargs)

    trace(run, (state, *inputs))
    return shapes


def _roles(module: Any, shapes: Shapes) -> dict[str, Role]:
    from flax import nnx

    found: dict[str, Role] = {}
    kinds = (nnx.LinearGeneral, nnx.Linear, nnx.Embed, nnx.Conv, nnx.ConvTranspose)
    layers = list(nnx.iter_graph(module))
    adapted = {id(x.base_module) for _, x in layers if isinstance(x, nnx.LoRA)}
    for path, layer in layers:
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
            transposed = isinstance(layer, nnx.ConvTranspose)
            met = shapes.get(name) or [None]
            role = reduce(at_both, (flax_convolution(layer, s, transposed=transposed) for s in met))
        if role is not None:
            role = Role(obstacle=_ADAPTED) if id(layer) in adapted else role
            role = as_called(layer, role, *kinds)
            shape, own = getattr(layer, attribute).shape, _own_shape(layer)
            role = stacked(role, own or shape, shape)
            found[f"{name}/{attribute}" if name else attribute] = role
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
