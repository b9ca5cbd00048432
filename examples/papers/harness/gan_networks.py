"""Generators and discriminators: of Lin et al., tables 2 to 5, and residual, conditional ones.

Those of Lin et al. are scaled by `width`, 1 being the paper's.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, interpolate

Make = Callable[[], nn.Module]


class Makers(NamedTuple):
    """What makes the networks of a game."""

    generator: Make
    discriminator: Make
    conditional: bool
    """Whether both take labels."""


def makers(
    kind: str, shape: tuple[int, int, int], latent: int, classes: int, width: float
) -> Makers:
    """Of kind "small" or "full", of Lin et al., or "residual", which take labels."""
    if kind == "residual":
        return Makers(
            lambda: ResidualGenerator(shape, latent, classes, width),
            lambda: ProjectionDiscriminator(shape, classes, width),
            conditional=True,
        )
    networks = {
        "small": (small_generator, small_discriminator),
        "full": (full_generator, full_discriminator),
    }
    generator, discriminator = networks[kind]
    return Makers(
        lambda: generator(shape, latent, width),
        lambda: discriminator(shape, width),
        conditional=False,
    )


def small_generator(shape: tuple[int, int, int], latent: int, width: float) -> nn.Sequential:
    """Table 4, for images of sides divisible by 4, with tanh in place of the logistic function."""
    channels, side, _ = shape
    first, second = _scaled(width, 128, 64)
    start = side // 4
    up = {"kernel_size": 5, "stride": 2, "padding": 2, "output_padding": 1}
    return nn.Sequential(
        nn.Linear(latent, first * start * start),
        nn.Unflatten(1, (first, start, start)),
        nn.LeakyReLU(0.2),
        nn.BatchNorm2d(first),
        nn.ConvTranspose2d(first, second, **up),
        nn.LeakyReLU(0.2),
        nn.BatchNorm2d(second),
        nn.ConvTranspose2d(second, channels, **up),
        nn.Tanh(),
    )


def small_discriminator(shape: tuple[int, int, int], width: float) -> nn.Sequential:
    """Table 5."""
    inputs, side, _ = shape
    layers: list[nn.Module] = []
    for outputs in _scaled(width, 64, 128, 256):
        layers += [nn.Conv2d(inputs, outputs, 5, stride=2, padding=2, bias=False)]
        layers += [nn.LeakyReLU(0.2)]
        inputs, side = outputs, -(-side // 2)
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(inputs * side * side, 1, bias=False))


def full_generator(shape: tuple[int, int, int], latent: int, width: float) -> nn.Sequential:
    """Table 2, for sides divisible by 8."""
    channels, side, _ = shape
    start, (inputs, *rest) = side // 8, _scaled(width, 512, 256, 128, 64)
    layers: list[nn.Module] = [
        nn.Linear(latent, inputs * start * start),
        nn.Unflatten(1, (inputs, start, start)),
        nn.BatchNorm2d(inputs),
        nn.ReLU(),
    ]
    for outputs in rest:
        layers += [nn.ConvTranspose2d(inputs, outputs, 4, stride=2, padding=1)]
        layers += [nn.BatchNorm2d(outputs), nn.ReLU()]
        inputs = outputs
    return nn.Sequential(*layers, nn.ConvTranspose2d(inputs, channels, 3, padding=1), nn.Tanh())


def full_discriminator(shape: tuple[int, int, int], width: float) -> nn.Sequential:
    """Table 3."""
    inputs, side, _ = shape
    layers: list[nn.Module] = []
    for outputs in _scaled(width, 64, 128, 256):
        layers += [nn.Conv2d(inputs, outputs, 3, padding=1), nn.LeakyReLU(0.1)]
        layers += [nn.Conv2d(outputs, outputs, 4, stride=2, padding=1), nn.LeakyReLU(0.1)]
        inputs, side = outputs, side // 2
    (last,) = _scaled(width, 512)
    layers += [nn.Conv2d(inputs, last, 3, padding=1), nn.LeakyReLU(0.1), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(last * side * side, 1))


class ConditionalNorm(nn.Module):
    """Batch normalisation whose gain and bias are those of a class."""

    def __init__(self, channels: int, classes: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(channels, affine=False)
        self.gain, self.bias = (nn.Embedding(classes, channels) for _ in range(2))
        nn.init.ones_(self.gain.weight)
        nn.init.zeros_(self.bias.weight)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        gain, bias = (e(y)[:, :, None, None] for e in (self.gain, self.bias))
        return self.norm(x) * gain + bias


class _Up(nn.Module):
    def __init__(self, channels: int, classes: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = (ConditionalNorm(channels, classes) for _ in range(2))
        self.conv1, self.conv2 = (nn.Conv2d(channels, channels, 3, padding=1) for _ in range(2))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        h = self.conv1(interpolate(torch.relu(self.norm1(x, y)), scale_factor=2))
        return self.conv2(torch.relu(self.norm2(h, y))) + interpolate(x, scale_factor=2)


class ResidualGenerator(nn.Module):
    """Three blocks that double the side, conditional batch norm (Miyato & Koyama 2018)."""

    def __init__(self, shape: tuple[int, int, int], latent: int, classes: int, width: float = 1.0):
        super().__init__()
        channels, side, _ = shape
        (self.channels,), self.start = _scaled(width, 256), side // 8
        self.first = nn.Linear(latent, self.channels * self.start**2)
        self.blocks = nn.ModuleList(_Up(self.channels, classes) for _ in range(3))
        self.norm = nn.BatchNorm2d(self.channels)
        self.last = nn.Conv2d(self.channels, channels, 3, padding=1)

    def forward(self, z: Tensor, y: Tensor) -> Tensor:
        x = self.first(z).view(-1, self.channels, self.start, self.start)
        for block in self.blocks:
            x = block(x, y)
        return torch.tanh(self.last(torch.relu(self.norm(x))))


class _Down(nn.Module):
    def __init__(self, inputs: int, outputs: int, halve: bool) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1)
        self.short = nn.Conv2d(inputs, outputs, 1)
        self.halve = halve

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv2(torch.relu(self.conv1(torch.relu(x)))) + self.short(x)
        return avg_pool2d(h, 2) if self.halve else h


class ProjectionDiscriminator(nn.Module):
    """Residual, and the class enters by an inner product (Miyato & Koyama 2018)."""

    def __init__(self, shape: tuple[int, int, int], classes: int, width: float = 1.0) -> None:
        super().__init__()
        (channels,) = _scaled(width, 128)
        halves = [True, True, False, False]
        inputs = [shape[0], *[channels] * 3]
        self.blocks = nn.Sequential(
            *(_Down(i, channels, h) for i, h in zip(inputs, halves, strict=True))
        )
        self.linear = nn.Linear(channels, 1)
        self.classes = nn.Embedding(classes, channels)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        h = torch.relu(self.blocks(x)).sum((2, 3))
        return self.linear(h) + (self.classes(y) * h).sum(1, keepdim=True)


def _scaled(width: float, *channels: int) -> tuple[int, ...]:
    return tuple(max(4, round(width * c)) for c in channels)
