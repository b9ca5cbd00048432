"""What rules add to a training step, against the papers' algorithms written plainly in torch."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn.functional import normalize
from torch.nn.utils import parametrize

Step = Callable[[], None]


class StableRank(nn.Module):
    """Sanyal, Torr & Dokania 2020, Algorithm 2: one power step in each forward pass."""

    def __init__(self, w: torch.Tensor, ratio: float) -> None:
        super().__init__()
        matrix = w.detach().flatten(1)
        self.room = math.sqrt(max(1.0, ratio * min(matrix.shape)) - 1.0)
        self.register_buffer("u", normalize(torch.randn(matrix.shape[0]), dim=0))
        self.register_buffer("v", normalize(torch.randn(matrix.shape[1]), dim=0))

    def forward(self, w: torch.Tensor) -> torch.Tensor:
        """The weight in use."""
        matrix = w.flatten(1)
        if self.training:
            with torch.no_grad():
                self.v = normalize(matrix.T @ self.u, dim=0)
                self.u = normalize(matrix @ self.v, dim=0)
        used = matrix / (self.u @ matrix @ self.v)
        lead = torch.outer(self.u, self.v)
        rest = used - lead
        length = rest.norm()
        return (used if length <= self.room else lead + rest * (self.room / length)).view_as(w)


def limited(ratio: float) -> Callable[[Any, Any], None]:
    """Every layer under `StableRank`."""

    def prepare(optimizer: Any, model: nn.Module) -> None:
        for module in list(model.modules()):
            if isinstance(module, nn.Linear | nn.Conv2d):
                rule = StableRank(module.weight, ratio)
                parametrize.register_parametrization(module, "weight", rule)

    return prepare


def penalised(model: nn.Module, x: torch.Tensor, optimizer: Any, strength: float) -> Step:
    """Yoshida & Miyato 2017, Algorithm 1, as a term of the loss: one power step for each layer."""
    weights = [m.weight for m in model.modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    vectors = [normalize(torch.randn(w.flatten(1).shape[1]), dim=0) for w in weights]

    def step() -> None:
        optimizer.zero_grad()
        loss = model(x).square().mean()
        for i, w in enumerate(weights):
            matrix = w.flatten(1)
            with torch.no_grad():
                u = normalize(matrix @ vectors[i], dim=0)
                vectors[i] = normalize(matrix.T @ u, dim=0)
            loss = loss + 0.5 * strength * (u @ matrix @ vectors[i]).square()
        loss.backward()
        optimizer.step()

    return step
