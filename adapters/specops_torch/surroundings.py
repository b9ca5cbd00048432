"""The maps of fused layers, whose blocks only the model around a layer tells."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import nn

from specops.geometry import Conv, Dense
from specops.geometry.fused import Surroundings, fused, fused_kernel
from specops.training.role import Role
from specops_torch.geometry import role_of

WRAPPERS = {
    "DistributedDataParallel": "module",
    "DataParallel": "module",
    "OptimizedModule": "_orig_mod",
    "CheckpointWrapper": "_checkpoint_wrapped_module",
}
"""Modules that wrap another one, and the attribute in which they hold it."""


def role_within(
    modules: Mapping[str, nn.Module],
    path: str,
    parameter: str,
    shape: tuple[int, ...],
    *size: Any,
) -> Role:
    """The role of a parameter of a model's layer; never raises.

    Parameters
    ----------
    modules : mapping of str to torch.nn.Module
        All modules of the model by their paths; "" is the path of the model itself.
    path, parameter : str
        The path of the layer, and the name of its parameter.
    shape : tuple of int
        The parameter's shape.
    *size
        Input shape and output padding of a convolution, as `role_of` takes them.
    """
    role = role_of(modules[path], parameter, *size)
    block, _, layer = path.rpartition(".")
    while layer in WRAPPERS.values():
        block, _, layer = block.rpartition(".")
    if isinstance(role.geometry, Conv):
        return replace(role, remark=role.remark or fused_kernel(layer))
    if parameter != "weight" or role.geometry not in (Dense(), Dense(out_axes=(-1,))):
        return role
    assert role.geometry is not None
    around = Surroundings(_settings(modules, path), _beside(modules, block))
    found = fused(layer, shape, role.geometry.out_axes[0], around)
    if found is None:
        return role
    return Role(found.geometry, opt_in=role.opt_in, remark=found.doubt)


def _settings(modules: Mapping[str, nn.Module], path: str) -> Any:
    """A lookup in the configuration of the layer, or of the nearest module around it with one."""
    while True:
        config = getattr(modules.get(path), "config", None)
        if config is not None or not path:
            break
        path = path.rpartition(".")[0]
    if isinstance(config, Mapping):
        return config.get
    return lambda key: getattr(config, key, None)


def _beside(modules: Mapping[str, nn.Module], block: str) -> Any:
    """A lookup of shapes by name: of the weights of a block's layers, and of its parameters."""

    def shape(name: str) -> tuple[int, ...]:
        within = block
        while name.startswith("../"):
            name, within = name.removeprefix("../"), within.rpartition(".")[0]
        layer = modules.get(f"{within}.{name}".lstrip("."))
        found = getattr(modules.get(within), name, None) if layer is None else layer
        tensor = found if layer is None else getattr(found, "weight", None)
        return tuple(getattr(tensor, "shape", ()))

    return shape
