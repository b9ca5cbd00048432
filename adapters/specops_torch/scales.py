"""Trainable scales: one parameter per layer or per rule, in a group of its own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from specops.rules import TrainableScale
from specops_torch.constrained import Constrained

_GROUP = "specops scales"


class Scales:
    """The parameters γ of an attachment, by the name of their layer or of their rule."""

    def __init__(self) -> None:
        self.parameters: dict[str, nn.Parameter] = {}

    def give(self, constrained: Sequence[Constrained], optimizer: Any) -> None:
        """Make what is missing, hand it to the normalizers and to the optimizer."""
        new = []
        for c in constrained:
            scale = getattr(c.rule, "scale", None)
            if not isinstance(scale, TrainableScale) or c.normalizer is None:
                continue
            key = f"shared by {c.rule!r}" if scale.shared else c.name
            if key not in self.parameters:
                weight = c.location.parameter
                dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
                value = torch.full((), scale.initial, dtype=dtype, device=weight.device)
                self.parameters[key] = nn.Parameter(value)
                new.append(self.parameters[key])
            c.normalizer.scale = self.parameters[key]
        if new and optimizer is not None:
            group: dict[str, Any] = {"params": new, "name": _GROUP}
            if "weight_decay" in optimizer.defaults:
                group["weight_decay"] = 0.0
            named = any("param_names" in g for g in optimizer.param_groups)
            if named:
                group["params"] = [(f"{_GROUP}.{i}", p) for i, p in enumerate(new)]
            optimizer.add_param_group(group)

    def withdraw(self, optimizer: Any) -> None:
        """Take the group out of the optimizer again."""
        if optimizer is None or not self.parameters:
            return
        own = {id(p) for p in self.parameters.values()}
        groups = optimizer.param_groups
        groups[:] = [g for g in groups if not own.issuperset(id(p) for p in g["params"])]
        for p in self.parameters.values():
            optimizer.state.pop(p, None)

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Their values."""
        return {key: p.detach().clone() for key, p in self.parameters.items()}

    @torch.no_grad()
    def load_state_dict(self, saved: dict[str, torch.Tensor]) -> None:
        """Restore `state_dict`."""
        for key, value in saved.items():
            if key in self.parameters:
                self.parameters[key].copy_(value)
