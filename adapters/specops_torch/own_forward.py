"""Layers that compute something else from their weight than their class of torch does."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from torch import nn

_METHODS = ("forward", "_conv_forward")


def has_own_forward(module: nn.Module) -> bool:
    """Whether a subclass, or the module itself, replaces the forward of its class of torch.

    Not so where a wrapper says that it wraps that very forward (`functools.wraps`), as mixed
    precision and hooks of others do.
    """
    kinds = (k for k in type(module).__mro__ if k.__module__.startswith("torch.nn.modules."))
    plain: Any = next(kinds, nn.Module)
    for name in (name for name in _METHODS if hasattr(plain, name)):
        found = inspect.unwrap(vars(module).get(name, getattr(type(module), name)))
        if getattr(found, "__func__", found) is not inspect.unwrap(getattr(plain, name)):
            return True
    return False


def obstacle_of(module: nn.Module) -> str:
    """Why the weight of a module is not known to be its map; empty if it is."""
    if not has_own_forward(module):
        return ""
    return (
        f"{type(module).__name__} has a forward of its own, so that the layer need not compute "
        f"with this array as it is: if it does, say so by its map in geometries="
    )


def added_to(modules: Mapping[str, nn.Module]) -> dict[str, str]:
    """By the paths of layers that an adapter (LoRA) adds a part to, why they are not the map."""
    return {
        f"{path}.base_layer".removeprefix("."): (
            f"{type(module).__name__} adds lora_B·lora_A to it, so that it is not the layer's "
            f"map: merge the parts first, or give its own map in geometries="
        )
        for path, module in modules.items()
        if hasattr(module, "base_layer") and hasattr(module, "lora_A")
    }
