"""Contexts: a module in evaluation mode, and a temporary seed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def evaluating(module: nn.Module) -> Iterator[nn.Module]:
    """The module in evaluation mode; afterwards each of its submodules gets its own mode back."""
    modes = [(part, part.training) for part in module.modules()]
    try:
        yield module.eval()
    finally:
        for part, training in modes:
            part.training = training


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Random numbers from this seed; afterwards all generators, of devices too, are restored."""
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(seed)
        yield
