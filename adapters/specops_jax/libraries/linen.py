"""flax.linen: layers are found while the module is traced."""

from __future__ import annotations

from typing import Any

import jax

from specops.errors import AdapterError
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
from specops_jax.libraries.watching import trace
from specops_jax.paths import named_leaves


def knows(module: Any) -> bool:
    """Whether it is a linen module."""
    from flax import linen as nn

    return isinstance(module, nn.Module)


def roles(module: Any, inputs: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Role]:
    """A role for every kernel that is found by tracing `module.init`."""
    from flax import linen as nn

    if not inputs and not kwargs:
        raise AdapterError(
            f"{type(module).__name__}: linen modules know their layers only when called: "
            f"geometries_of(module, *inputs)"
        )
    met: dict[str, tuple[Role, tuple[int, ...]]] = {}
    kinds = (nn.DenseGeneral, nn.Dense, nn.Embed, nn.Conv, nn.ConvTranspose)

    wrappers: list[str] = []  # the wrappers that are being called

    def look(function: Any, args: Any, given: Any, context: Any) -> Any:
        layer = context.module
        wraps = isinstance(layer, nn.WeightNorm | nn.SpectralNorm)
        if wraps:
            wrappers.append(type(layer).__name__)
        result = function(*args, **given)
        if wraps:
            wrappers.pop()
        if context.method_name == "__call__":
            x = args[0] if args else next(iter(given.values()), None)
            own = layer.variables.get("params", {})
            # Vectors of this layer; scans and maps make arrays of more axes of them.
            vectors = {k: Role(skipped=VECTOR) for k, w in own.items() if _is_vector(w)}
            for attribute, plain in (vectors | _roles(layer, x)).items():
                role = as_called(layer, plain, *kinds)
                if wrappers and not role.skipped:
                    role = Role(obstacle=COMPUTED.format(f"nn.{wrappers[-1]}"))
                if attribute in own:
                    name = "/".join((*map(str, layer.path), attribute))
                    shape = nn.unbox(own[attribute]).shape
                    met[name] = at_both(met[name][0], role) if name in met else role, tuple(shape)
        return result

    keys = {name: jax.random.key(0) for name in ("params", "dropout")}
    with nn.intercept_methods(look):
        variables = trace(lambda *x: module.init(keys, *x, **kwargs), inputs)
    leaves, _ = named_leaves(variables.get("params", {}))
    return {
        name: stacked(met[name][0], met[name][1], tuple(leaf.shape))
        for name, leaf in leaves
        if name in met
    }


def _roles(layer: Any, x: Any) -> dict[str, Role]:
    from flax import linen as nn

    if isinstance(layer.parent, nn.OptimizedLSTMCell):
        # The kernels of its gates are in modules that hold them only: the cell multiplies by them.
        return {"kernel": as_called(layer.parent, dense(), nn.OptimizedLSTMCell)}
    if isinstance(layer, nn.DenseGeneral):
        axes = layer.features if isinstance(layer.features, tuple | list) else (layer.features,)
        kernel = dense(len(tuple(layer.batch_dims)), len(axes))
        return {"kernel": kernel, "bias": Role(skipped=VECTOR)}
    if isinstance(layer, nn.Dense):
        return {"kernel": dense()}
    if isinstance(layer, nn.Embed):
        return {"embedding": Role(dense().geometry, opt_in=EMBEDDING)}
    if isinstance(layer, nn.Conv | nn.ConvTranspose):
        shape = _spatial(x, len(sizes(layer.kernel_size)))
        transposed = isinstance(layer, nn.ConvTranspose)
        return {"kernel": flax_convolution(layer, shape, transposed=transposed)}
    if isinstance(layer, nn.Einsum):
        return {"kernel": Role(obstacle="an einsum's kernel: pass its geometry")}
    if isinstance(layer, nn.ConvLocal):
        return {"kernel": Role(obstacle="a locally connected layer is no convolution")}
    return {}


def _is_vector(entry: Any) -> bool:
    """Whether it is a single array with at most one axis, not a branch of the tree."""
    from flax import linen as nn

    array = nn.unbox(entry)
    return hasattr(array, "ndim") and array.ndim < 2


def _spatial(x: Any, ndim: int) -> tuple[int, ...] | None:
    return None if x is None else tuple(int(n) for n in x.shape[-ndim - 1 : -1])
