"""Two ranks: recurrent layers that `fully_shard` wraps by themselves."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from specops import ClipSpectralNorm, SpectralNormalization
from tests.torch_adapter.distributed.models import compare, fsdp


class _Output(nn.LSTM):
    """An LSTM without its last state, so that another layer may follow."""

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = super().__call__(x)[0]
        return found


def _lstm() -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(_Output(6, 5, batch_first=True), nn.Linear(5, 3))
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(3.0)
    return model


def recurrent_layers(_: Path) -> None:
    """Each gate's matrix is constrained, as on one process."""
    for rule in (ClipSpectralNorm(1.0), SpectralNormalization(norm="reshaped")):
        attachment = compare(_lstm, fsdp, rule, 1e-5)
        assert list(attachment.weights()) == ["0.weight_ih_l0", "0.weight_hh_l0", "1.weight"]


CASES = (recurrent_layers,)
