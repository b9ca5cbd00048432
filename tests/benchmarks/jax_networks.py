"""The network whose training step is timed in JAX."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import jax.numpy as jnp
from flax import linen as nn


class Residual(nn.Module):
    """Two 3×3 convolutions with group norm beside a shortcut of ResNet-20's kind."""

    outputs: int
    stride: int = 1

    @nn.compact
    def __call__(self, x: Any) -> Any:
        """The block."""
        y = nn.Conv(self.outputs, (3, 3), strides=self.stride, use_bias=False)(x)
        y = nn.relu(nn.GroupNorm(4)(y))
        y = nn.GroupNorm(4)(nn.Conv(self.outputs, (3, 3), use_bias=False)(y))
        if self.stride > 1:
            x = nn.Conv(self.outputs, (1, 1), strides=self.stride, use_bias=False)(x)
        return nn.relu(y + x)


class ResNet20(nn.Module):
    """ResNet-20 at 32×32, without state beside its parameters."""

    widths: tuple[int, ...] = (16,) * 4 + (32,) * 3 + (64,) * 3

    @nn.compact
    def __call__(self, x: Any) -> Any:
        """Ten scores for each image."""
        x = nn.relu(nn.GroupNorm(4)(nn.Conv(16, (3, 3), use_bias=False)(x)))
        for before, after in pairwise(self.widths):
            x = Residual(after, 1 if before == after else 2)(x)
        return nn.Dense(10)(jnp.mean(x, axis=(1, 2)))
