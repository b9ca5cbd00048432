"""Models, plain and sharded, that are trained alike and compared."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import distributed as dist
from torch import nn
from torch.distributed import checkpoint as dcp
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import init_device_mesh
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)

import specops
import specops_torch

Shard = Callable[[nn.Module], Any]


class Attending(nn.Module):
    """Fused projections, in blocks."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(size, 2, batch_first=True, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.attention(x, x, x, need_weights=False)[0]
        return x + found


def dense() -> nn.Sequential:
    """Uneven shards, and on the last layer an empty one; three blocks in one parameter."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(6, 8), Attending(8), nn.Linear(8, 5), nn.Tanh(), nn.Linear(5, 1)
    )
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(3.0)
    return model


def conv() -> nn.Sequential:
    """A convolution and a dense layer."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 5, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(5 * 16, 3)
    )


class Experts(nn.Module):
    """A stack of matrices that layers apply to their part of the input each."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 6, 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.einsum("bej,ejk->bek", x, self.weight)


def experts() -> nn.Sequential:
    """A stack of matrices, as a mixture of experts has it."""
    torch.manual_seed(0)
    return nn.Sequential(Experts())


def chain() -> nn.Sequential:
    """Two dense layers."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 5))
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(3.0)
    return model


def in_columns(model: nn.Module, mesh: Any = None) -> nn.Module:
    """Tensor parallel: the first layer column-wise, the last row-wise."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),)) if mesh is None else mesh
    last = str(len(model) - 1)
    return parallelize_module(model, mesh, {"0": ColwiseParallel(), last: RowwiseParallel()})


class Breaking:
    """A rule that fails for one layer, where it is owned."""

    stage = "weights"

    def init(self, weight: Any, geometry: Any, name: str) -> Any:
        """None."""
        return {}

    def update(
        self, weight: Any, geometry: Any, state: Any, *, step: int = 1, name: str = ""
    ) -> Any:
        """Twice as large."""
        if name == "4.weight":
            raise ValueError("broken")
        return 2 * weight, state, {}

    def __repr__(self) -> str:
        return "Breaking()"


@contextmanager
def raises(kind: type[BaseException], *words: str) -> Iterator[Any]:
    """As `pytest.raises`, of a message that has all the words."""
    with pytest.raises(kind) as caught:
        yield caught
    assert all(word in str(caught.value) for word in words), str(caught.value)


def counted(mode: Any) -> dict[str, int]:
    """Collectives by name."""
    return {str(op).rpartition(".")[2]: n for op, n in mode.get_comm_counts().items() if n}


def batch(model: nn.Module) -> torch.Tensor:
    """Something that it takes, the same on every rank."""
    torch.manual_seed(1)
    first = getattr(model, "module", model)[0]
    shape = (4, 2, 4, 4) if isinstance(first, nn.Conv2d) else (4, 3, 6)
    return torch.randn(shape)


def fsdp(model: nn.Module, mesh: Any = None, **options: Any) -> nn.Module:
    """Layer by layer, and what is left."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),)) if mesh is None else mesh
    for layer in model:
        if any(True for _ in layer.parameters()):
            fully_shard(layer, mesh=mesh, **options)
    fully_shard(model, mesh=mesh, **options)
    return model


def train(
    model: nn.Module, rule: Any, steps: int = 3, rate: float = 0.3, **options: Any
) -> tuple[specops.Attachment, torch.optim.Optimizer]:
    """A few steps on one batch."""
    optimizer = torch.optim.SGD(model.parameters(), lr=rate)
    if not isinstance(rule, specops.Plan):
        rule = specops.Plan([("*", rule)])
    attachment = specops.attach(optimizer, model, rule, **options)
    for _ in range(steps):
        step(model, optimizer)
    return attachment, optimizer


def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """One of them."""
    optimizer.zero_grad()
    model(batch(model)).square().mean().backward()
    optimizer.step()


def whole(model: nn.Module) -> dict[str, torch.Tensor]:
    """Its parameters, brought together."""
    return {
        name: (p.full_tensor() if hasattr(p, "full_tensor") else p).detach().clone()
        for name, p in model.named_parameters()
    }


def compare(
    make: Callable[[], nn.Module], shard: Shard, rule: Any, tolerance: float, **options: Any
) -> specops.Attachment:
    """Train plain and sharded; weights, states and histories are the same."""
    plain = make()
    sharded = shard(copy.deepcopy(plain))
    expected, _ = train(plain, rule, **options)
    attachment, _ = train(sharded, rule, **options)
    same(whole(sharded), whole(plain), tolerance)
    same(flat(attachment.history), flat(expected.history), tolerance)
    same(flat(attachment.state_dict()), flat(expected.state_dict()), tolerance)
    found, wanted = attachment.report(), expected.report()
    assert [row.name for row in found.rows] == [row.name for row in wanted.rows]
    for row, other in zip(found.rows, wanted.rows, strict=True):
        assert row.norm == (other.norm and torch.tensor(other.norm).item()) or close(
            row.norm, other.norm, tolerance
        )
    expected.detach()
    return attachment


def close(a: Any, b: Any, tolerance: float) -> bool:
    return abs(float(a) - float(b)) <= tolerance * max(1.0, abs(float(b)))


def same(found: dict[str, Any], expected: dict[str, Any], tolerance: float) -> None:
    """Bitwise with tolerance 0; vectors up to how far they have converged are not compared."""
    assert list(found) == list(expected)
    for name, value in found.items():
        wanted = expected[name]
        if not isinstance(value, torch.Tensor | float | np.ndarray | np.floating):
            assert value == wanted, (name, value, wanted)
            continue
        value, wanted = (_real(x) for x in (value, wanted))
        assert value.shape == wanted.shape, (name, value.shape, wanted.shape)
        error = float((value - wanted).abs().max()) if value.numel() else 0.0
        scale = max(1.0, float(wanted.abs().max())) if value.numel() else 1.0
        assert error <= tolerance * scale, (name, error, scale)


def _real(x: Any) -> torch.Tensor:
    x = torch.as_tensor(x)
    return (torch.view_as_real(x) if x.is_complex() else x).double()


def flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Leaves by path."""
    if isinstance(tree, dict):
        items: Any = tree.items()
    elif isinstance(tree, list | tuple):
        items = enumerate(tree)
    else:
        return {prefix: tree}
    return {k: v for key, x in items for k, v in flat(x, f"{prefix}/{key}").items()}


RESUMED = {
    "clip": specops.ClipSpectralNorm(1.0),
    "screened": specops.ClipSpectralNorm(20.0),
    "forward": specops.SpectralNormalization(norm="reshaped"),
    "penalty": specops.SpectralNormPenalty(0.1, norm="reshaped"),
}
"""Rules whose states are saved on some ranks and loaded on others."""


def load(folder: Path, shard: Shard) -> None:
    """What two ranks have saved goes on bitwise."""
    for name, rule in RESUMED.items():
        model = shard(dense())
        parts: dict[str, Any] = {"model": model.state_dict()}
        dcp.load(parts, checkpoint_id=folder / name)
        model.load_state_dict(parts["model"])
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        attachment = specops.attach(optimizer, model, rule)
        dcp.load({"rule": specops_torch.Stateful(attachment)}, checkpoint_id=folder / name)
        weights, state = torch.load(folder / f"{name}.pt", weights_only=True)
        same(whole(model), weights, 0.0)
        same(flat(attachment.state_dict()), flat(state), 0.0)
        model(batch(model)).square().mean().backward()
        same(flat(attachment.state_dict()), flat(state), 0.0)
        optimizer.step()
        assert attachment.steps == 4
        assert all("skipped" not in record for record in attachment.history)
        attachment.detach()
