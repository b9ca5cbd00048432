"""The networks whose training steps are timed."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from torch import nn


class Residual(nn.Module):
    """Two 3×3 convolutions with batch norm beside a shortcut of ResNet-20's kind."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        stride = 1 if inputs == outputs else 2
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut: nn.Module = nn.Identity()
        if stride == 2:
            self.shortcut = nn.Conv2d(inputs, outputs, 1, stride=2, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The block."""
        y = torch.relu(self.bn1(self.conv1(x)))
        result: torch.Tensor = torch.relu(self.bn2(self.conv2(y)) + self.shortcut(x))
        return result


def resnet20() -> tuple[nn.Module, Any]:
    """ResNet-20 at 32×32, batch 64."""
    return _resnet(3), torch.randn(64, 3, 32, 32)


def _resnet(blocks_a_stage: int) -> nn.Module:
    n = blocks_a_stage
    widths = [16] * (n + 1) + [32] * n + [64] * n
    blocks = [Residual(a, b) for a, b in pairwise(widths)]
    stem = [nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU()]
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10)]
    return nn.Sequential(*stem, *blocks, *head)


def short_resnet20() -> tuple[nn.Module, Any]:
    """ResNet-20 on two images of 8×8: so short a step that differences repeat."""
    return _resnet(3), torch.randn(2, 3, 8, 8)


def short_resnet110() -> tuple[nn.Module, Any]:
    """ResNet-110 on two images of 8×8."""
    return _resnet(18), torch.randn(2, 3, 8, 8)


def convolutions(channels: int) -> Callable[[], tuple[nn.Module, Any]]:
    """Eight 3×3 convolutions of equal channels on two images of 8×8."""

    def make() -> tuple[nn.Module, Any]:
        layers: list[nn.Module] = []
        for _ in range(8):
            layers += [nn.Conv2d(channels, channels, 3, padding=1), nn.ReLU()]
        return nn.Sequential(*layers), torch.randn(2, channels, 8, 8)

    return make


def mlp() -> tuple[nn.Module, Any]:
    """Six layers, 1024 wide, batch 64."""
    layers: list[nn.Module] = []
    for _ in range(5):
        layers += [nn.Linear(1024, 1024), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(1024, 1024)), torch.randn(64, 1024)


def transformer() -> tuple[nn.Module, Any]:
    """Six encoder layers, d = 512, 8 sequences of 64."""
    layer = nn.TransformerEncoderLayer(512, 8, 2048, dropout=0.0, batch_first=True)
    encoder = nn.TransformerEncoder(layer, 6, enable_nested_tensor=False)
    return encoder, torch.randn(8, 64, 512)


SHORT = {"ResNet-20, 2 images of 8×8": short_resnet20}
"""For what a rule adds, not for its share of a step."""
LIMITED = SHORT | {"ResNet-110, 2 images of 8×8": short_resnet110}
PENALISED = {f"8 convolutions of {n} channels": convolutions(n) for n in (16, 64)}
NETWORKS = {
    "ResNet-20, batch 64": resnet20,
    "MLP 6×1024, batch 64": mlp,
    "transformer, d = 512, 6 layers": transformer,
}
