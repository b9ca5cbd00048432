"""Layers of Hugging Face's transformers, known by what they are called and have."""

from __future__ import annotations

from typing import Any

from torch import nn

from specops.geometry import Dense
from specops_torch.role import Role

_OUTPUTS_LAST = Dense(out_axes=(-1,))


def foreign_role(module: nn.Module, parameter: str) -> Role | None:
    """The role of a parameter; None where the layer is none of these."""
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
    """A matrix for each expert, (experts, outputs, inputs) or the other way round."""
    if shape[0] != getattr(module, "num_experts", shape[0]):
        return None
    turned = getattr(module, "is_transposed", None)
    if turned is None:
        hidden = getattr(module, "hidden_dim", getattr(module, "hidden_size", None))
        at = [axis for axis in (1, 2) if shape[axis] == hidden]
        if len(at) != 1:
            return Role(
                obstacle=f"which axis of the stacked experts {shape} is that of outputs is not "
                f"known: give Dense(out_axes=(1,), batch_axes=(0,)) or out_axes=(2,) in geometries="
            )
        turned = at == ([2] if parameter.startswith("down") else [1])
    return Role(Dense(out_axes=(2,) if turned else (1,), batch_axes=(0,)))
