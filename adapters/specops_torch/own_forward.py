"""Layers that may compute something else from their weight than torch's own class does."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from torch import nn

_OURS = ("specops_torch", "torch.nn.utils")
_OF_LAZY_LAYERS = "torch.nn.modules.lazy"
_BESIDE_FORWARD = {
    "extra_repr",
    "reset_parameters",
    "reset_running_stats",
    "flatten_parameters",
    "_apply",
}
"""Methods of layers that a forward pass does not call; `fully_shard` replaces the last."""


def computes_plainly(module: nn.Module) -> bool:
    """Whether a module computes exactly what its torch class does.

    No subclass, and not the module itself, may replace a method of that class, except by a wrapper
    of this very method (`functools.wraps`), as mixed precision and third-party hooks install.
    """
    kinds = [k for k in type(module).__mro__ if k.__module__.startswith("torch.nn.modules.")]
    plain: Any = next(iter(kinds), nn.Module)
    if plain in (nn.Module, nn.Sequential):
        return False
    methods = {
        name
        for kind in kinds
        if kind is not nn.Module
        for name, found in vars(kind).items()
        if callable(found) and not name.startswith("__")
    }
    return all(
        _function(vars(module).get(name, getattr(type(module), name)))
        is _function(getattr(plain, name))
        for name in methods - _BESIDE_FORWARD
    )


def runs_in_turn(module: nn.Module) -> bool:
    """Whether a module runs its children one after the other, as torch's Sequential does."""
    forward = vars(module).get("forward", type(module).forward)
    return _function(forward) is nn.Sequential.forward


def hook_of_others(module: nn.Module) -> Any:
    """A third-party forward hook, which may change what the module computes; None if none."""
    for hook in (*module._forward_hooks.values(), *module._forward_pre_hooks.values()):
        homes = (type(hook).__module__, getattr(hook, "__module__", "") or "")
        if not any(home.startswith((*_OURS, _OF_LAZY_LAYERS)) for home in homes):
            return hook
    return None


def _function(method: Any) -> Any:
    found = inspect.unwrap(method)
    return getattr(found, "__func__", found)


def obstacle_of(module: nn.Module) -> str:
    """Why the weight of a module is not known to be its map; empty if it is."""
    if computes_plainly(module):
        return ""
    return (
        f"{type(module).__name__} has a forward of its own, so that the layer need not compute "
        f"with this array as it is: if it does, say so by its map in geometries="
    )


def added_to(modules: Mapping[str, nn.Module]) -> dict[str, str]:
    """Why layers that a peft adapter changes are no maps, by the paths of these layers."""
    return {
        f"{path}.base_layer".removeprefix("."): (
            f"{type(module).__name__} {_change(module)}, so that it is not the layer's map: merge "
            f"the parts first, or give its own map in geometries="
        )
        for path, module in modules.items()
        if hasattr(module, "base_layer") and _change(module)
    }


def _change(module: nn.Module) -> str:
    """What a peft layer does to the layer that it wraps; "" for other modules."""
    if hasattr(module, "lora_A"):
        return "adds lora_B·lora_A to it"
    parts = getattr(module, "adapter_layer_names", None)
    return f"changes it by {', '.join(map(str, parts))}" if parts else ""
