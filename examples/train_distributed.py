"""A bound on every step of a transformer that several processes hold in parts (FSDP2).

    torchrun --nproc-per-node 2 examples/train_distributed.py --quick

Trains on lines of sums that it makes, or on ``--data FILE``, letter by letter; gloo on the CPU,
nccl where there are GPUs. The weights are sharded by `fully_shard`; the rule bounds the norms of
the logical matrices, and costs what the last line says.
"""

from __future__ import annotations

import argparse
import os
import random
import time
from pathlib import Path
from typing import Any

import torch
from torch import distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import init_device_mesh

import specops


class Transformer(nn.Module):
    """Predicts the next letter."""

    def __init__(self, letters: int, size: int, layers: int, length: int) -> None:
        super().__init__()
        self.letters = nn.Embedding(letters, size)
        self.places = nn.Parameter(torch.randn(length, size) * 0.02)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(
                size, 4, 4 * size, dropout=0.0, batch_first=True, norm_first=True
            )
            for _ in range(layers)
        )
        self.norm = nn.LayerNorm(size)
        self.head = nn.Linear(size, letters)

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


def text(options: argparse.Namespace) -> str:
    """What to learn."""
    if options.data:
        return Path(options.data).read_text(encoding="utf-8")
    numbers = random.Random(0)
    pairs = [(numbers.randrange(100), numbers.randrange(100)) for _ in range(20_000)]
    return "".join(f"{a}+{b}={a + b}\n" for a, b in pairs)


def train(options: argparse.Namespace, device: torch.device) -> tuple[nn.Module, Any, list[float]]:
    """(the model, what constrains it, its loss by step); and say what it cost."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)
    content = text(options)
    letters = sorted(set(content))
    numbers = torch.tensor([letters.index(letter) for letter in content])
    model = Transformer(len(letters), options.size, options.layers, options.length).to(device)
    mesh = init_device_mesh(device.type, (ranks,))
    for layer in model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)

    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    clock, losses = Clock(), []
    optimizer.register_step_post_hook(clock.begin)
    attachment = specops.attach(optimizer, model, specops.ClipSpectralNorm(options.max_norm))
    optimizer.register_step_post_hook(clock.end)

    generator = torch.Generator().manual_seed(rank)
    began = time.perf_counter()
    for step in range(options.steps):
        starts = torch.randint(
            len(numbers) - options.length - 1, (options.batch, 1), generator=generator
        )
        chosen = numbers[starts + torch.arange(options.length + 1)].to(device)
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
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", metavar="FILE", help="a text to learn instead")
    parser.add_argument("--max-norm", type=float, default=4.0)
    parser.add_argument("--size", type=int, default=128)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--batch", type=int, default=16, help="sequences of each rank")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--quick", action="store_true", help="one layer, ten steps")
    options = parser.parse_args(arguments)
    if options.quick:
        options.size, options.layers, options.length, options.steps = 32, 1, 16, 10
    return options


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
