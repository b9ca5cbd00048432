"""A bound on every step of a transformer that several processes hold in parts (FSDP2).

    torchrun --nproc-per-node 2 examples/train_distributed.py --quick

Trains on lines of sums that it makes, or on ``--data FILE``, letter by letter; gloo on the CPU,
nccl where there are GPUs. The weights are sharded by `fully_shard`; the rule bounds the norms of
the logical matrices, and costs what the last line says.
"""

from __future__ import annotations

import argparse
import os
import time
from typing import Any

import letters
import numpy as np
import torch
from torch import distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import init_device_mesh

import specops


class Transformer(nn.Module):
    """Predicts the next letter."""

    def __init__(self, count: int, size: int, layers: int, length: int) -> None:
        super().__init__()
        self.letters = nn.Embedding(count, size)
        self.places = nn.Parameter(torch.randn(length, size) * 0.02)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(
                size, 4, 4 * size, dropout=0.0, batch_first=True, norm_first=True
            )
            for _ in range(layers)
        )
        self.norm = nn.LayerNorm(size)
        self.head = nn.Linear(size, count)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(batch, length) letters to (batch, length, letters) logits."""
        h = self.letters(x) + self.places[: x.shape[1]]
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1], device=x.device)
        for layer in self.layers:
            h = layer(h, src_mask=mask, is_causal=True)
        result: torch.Tensor = self.head(self.norm(h))
        return result


class Clock:
    """How long the rule takes: hooks before and after its own."""

    def __init__(self) -> None:
        self.seconds, self._began = 0.0, 0.0

    def begin(self, *_: Any) -> None:
        """Registered before attaching."""
        self._began = time.perf_counter()

    def end(self, *_: Any) -> None:
        """Registered after it."""
        self.seconds += time.perf_counter() - self._began


def train(options: argparse.Namespace, device: torch.device) -> tuple[nn.Module, Any, list[float]]:
    """(the model, what constrains it, its loss by step); and say what it cost."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)
    text = letters.load(options.data)
    model = Transformer(len(text.names), options.size, options.layers, options.length).to(device)
    mesh = init_device_mesh(device.type, (ranks,))
    for layer in model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)

    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    clock, losses = Clock(), []
    optimizer.register_step_post_hook(clock.begin)
    attachment = specops.attach(optimizer, model, specops.ClipSpectralNorm(options.max_norm))
    optimizer.register_step_post_hook(clock.end)

    rng = np.random.default_rng(rank)
    began = time.perf_counter()
    for step in range(options.steps):
        chosen = torch.as_tensor(text.batch(options, rng), device=device)
        optimizer.zero_grad()
        logits = model(chosen[:, :-1])
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), chosen[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        if step == options.steps // 5:
            began, clock.seconds = time.perf_counter(), 0.0  # weights have come inside
    total = time.perf_counter() - began
    attachment.enforce()
    report = attachment.report()  # every rank measures its share
    if rank == 0:
        report.show()
        print(
            f"{ranks} ranks, {options.steps} steps, loss {losses[0]:.2f} to {losses[-1]:.2f}; "
            f"rule {clock.seconds:.2f} s of {total:.1f} s, {clock.seconds / total:.1%}"
        )
    return model, attachment, losses


def parsed(arguments: list[str] | None = None) -> argparse.Namespace:
    """Options."""
    return letters.parsed(letters.parser(__doc__), arguments)


def main(arguments: list[str] | None = None) -> tuple[nn.Module, Any, list[float]]:
    """Join the other processes, or be the only one, and train."""
    options = parsed(arguments)
    on_gpu = torch.cuda.is_available()
    device = torch.device("cpu")
    if on_gpu:
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    # Without torchrun there is one process, which meets nobody.
    alone: dict[str, Any] = {"store": dist.HashStore(), "rank": 0, "world_size": 1}
    dist.init_process_group("nccl" if on_gpu else "gloo", **({} if "RANK" in os.environ else alone))
    try:
        return train(options, device)
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
