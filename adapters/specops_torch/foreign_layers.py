"""Layers of Hugging Face's transformers, recognised by their class names and attributes."""

from __future__ import annotations

from typing import Any

from torch import nn

from specops.geometry import Dense
from specops.geometry.fused import Surroundings, fused_experts
from specops.training.role import Role

_OUTPUTS_LAST = Dense(out_axes=(-1,))


def foreign_role(module: nn.Module, parameter: str) -> Role | None:
    """The role of a parameter; None if the layer is not one of these."""
    kind = type(module).__name__
    weight: Any = getattr(module, parameter, None)
    shape = tuple(getattr(weight, "shape", ()))
    if kind == "Conv1D" and parameter == "weight" and len(shape) == 2 and hasattr(module, "nf"):
        return Role(_OUTPUTS_LAST)
    if kind.endswith("Router") and parameter == "weight" and len(shape) == 2:
        return Role(Dense()) if shape[0] == getattr(module, "num_experts", None) else None
    if kind.endswith("Experts") and len(shape) == 3 and parameter.endswith("proj"):
        return _experts(module, parameter, shape)
    return None


def _experts(module: nn.Module, parameter: str, shape: tuple[int, ...]) -> Role | None:
    """Stacked experts, with axes (experts, outputs, inputs) or (experts, inputs, outputs)."""
    if shape[0] != getattr(module, "num_experts", shape[0]):
        return None
    concatenated = getattr(module, "is_concatenated", None)
    found = fused_experts(
        parameter,
        shape,
        Surroundings(lambda key: _setting(module, key), lambda name: _shape(module, name)),
        turned=getattr(module, "is_transposed", None),
        alternating=None if concatenated is None else not concatenated,
    )
    if found is None:
        return Role(
            obstacle=f"which axis of the stacked experts {shape} is that of outputs is not "
            f"known: give Dense(out_axes=(1,), batch_axes=(0,)) or out_axes=(2,) in geometries="
        )
    return Role(found.geometry, remark=found.doubt)


def _setting(module: nn.Module, key: str) -> Any:
    own = getattr(module, key, None)
    return getattr(getattr(module, "config", None), key, None) if own is None else own


def _shape(module: nn.Module, name: str) -> tuple[int, ...]:
    return tuple(getattr(getattr(module, name, None), "shape", ()))
