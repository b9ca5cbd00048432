"""Classifiers: residual networks for CIFAR, and a VGG-like one."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import pad


class Residual(nn.Module):
    """Two 3×3 convolutions and a shortcut without parameters (He et al. 2016, option A)."""

    def __init__(self, inputs: int, outputs: int, stride: int, norm: bool) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=not norm)
        self.norm1 = nn.BatchNorm2d(outputs) if norm else nn.Identity()
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=not norm)
        self.norm2 = nn.BatchNorm2d(outputs) if norm else nn.Identity()
        self.stride, self.extra = stride, outputs - inputs

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.norm1(self.conv1(x)))
        x = x[:, :, :: self.stride, :: self.stride]
        before = self.extra // 2
        x = pad(x, (0, 0, 0, 0, before, self.extra - before))
        return torch.relu(self.norm2(self.conv2(y)) + x)


def resnet(channels: int, classes: int, *, depth: int, width: int, norm: bool) -> nn.Sequential:
    """6n + 2 layers at three resolutions: depth 20, 32 and width 16 are the usual ones."""
    if depth % 6 != 2:
        raise ValueError(f"depth must be 6n + 2, got {depth}")
    first = nn.Conv2d(channels, width, 3, padding=1, bias=not norm)
    layers: list[tuple[str, nn.Module]] = [("conv", first)]
    if norm:
        layers.append(("norm", nn.BatchNorm2d(width)))
    layers.append(("relu", nn.ReLU()))
    inputs = width
    for stage in range(3):
        for block in range((depth - 2) // 6):
            outputs, stride = width * 2**stage, 2 if stage and not block else 1
            layers.append((f"stage{stage}_{block}", Residual(inputs, outputs, stride, norm)))
            inputs = outputs
    return _headed(layers, inputs, classes)


def vgg(channels: int, classes: int, *, width: int, norm: bool = True) -> nn.Sequential:
    """Three pairs of convolutions, each followed by pooling."""
    layers: list[tuple[str, nn.Module]] = []
    inputs = channels
    for stage in range(3):
        outputs = width * 2**stage
        for place in range(2):
            name = f"{stage}_{place}"
            conv = nn.Conv2d(inputs, outputs, 3, padding=1, bias=not norm)
            layers.append((f"conv{name}", conv))
            if norm:
                layers.append((f"norm{name}", nn.BatchNorm2d(outputs)))
            layers.append((f"relu{name}", nn.ReLU()))
            inputs = outputs
        if stage < 2:
            layers.append((f"pool{stage}", nn.MaxPool2d(2)))
    return _headed(layers, inputs, classes)


def _headed(layers: list[tuple[str, nn.Module]], inputs: int, classes: int) -> nn.Sequential:
    model = nn.Sequential()
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, classes)]
    for name, layer in [*layers, *zip(("average", "flat", "head"), head, strict=True)]:
        model.add_module(name, layer)
    for layer in model.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight)
    return model


def convolutions(model: nn.Module) -> list[str]:
    """Names of their weights."""
    return [f"{n}.weight" for n, m in model.named_modules() if isinstance(m, nn.Conv2d)]
