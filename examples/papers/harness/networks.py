"""Classifiers: residual networks for CIFAR, a VGG-like one, and layers without convolutions."""

from __future__ import annotations

import math
from itertools import pairwise

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


def vgg(channels: int, classes: int, *, width: int) -> nn.Sequential:
    """Three pairs of normalised convolutions, each followed by pooling."""
    layers: list[tuple[str, nn.Module]] = []
    inputs = channels
    for stage in range(3):
        outputs = width * 2**stage
        for place in range(2):
            name = f"{stage}_{place}"
            conv = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
            layers.append((f"conv{name}", conv))
            layers.append((f"norm{name}", nn.BatchNorm2d(outputs)))
            layers.append((f"relu{name}", nn.ReLU()))
            inputs = outputs
        if stage < 2:
            layers.append((f"pool{stage}", nn.MaxPool2d(2)))
    return _headed(layers, inputs, classes)


def mlp(shape: tuple[int, ...], classes: int, *, width: int, depth: int) -> nn.Sequential:
    """So many linear layers, rectified in between."""
    sizes = [math.prod(shape), *[width] * (depth - 1), classes]
    layers: list[nn.Module] = [nn.Flatten()]
    for inputs, outputs in pairwise(sizes):
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


class Branch(nn.Module):
    """Two linear layers beside the identity."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.second(torch.relu(self.first(x)))


def residual_mlp(shape: tuple[int, ...], classes: int, *, width: int, depth: int) -> nn.Sequential:
    """So many linear layers, all but the first and the last in pairs beside the identity."""
    if depth % 2:
        raise ValueError(f"depth must be even, got {depth}")
    branches = [Branch(width) for _ in range(depth // 2 - 1)]
    first, last = nn.Linear(math.prod(shape), width), nn.Linear(width, classes)
    return nn.Sequential(nn.Flatten(), first, *branches, nn.ReLU(), last)


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
