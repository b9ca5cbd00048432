"""A cap on sharded weights, by two gloo processes: bytes, time of a firing, share of a step."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

from rich.console import Console
from rich.table import Table

RANKS = 2


def run(repeats: int, quick: bool) -> None:
    """Print the tables."""
    import torch

    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(_rank, (folder, repeats, quick), nprocs=RANKS)


def _rank(rank: int, folder: str, repeats: int, quick: bool) -> None:
    import torch
    from torch import distributed as dist

    torch.set_num_threads(1)
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=RANKS)
    _bytes_sent(rank, quick)
    _projections(rank, repeats, quick)
    _steps(rank, repeats, quick)
    dist.destroy_process_group()


def _transformer(quick: bool, *, sharded: bool = True) -> tuple[Any, Any]:
    import torch
    from torch import nn
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import init_device_mesh

    torch.manual_seed(0)
    size, depth = (128, 2) if quick else (512, 6)
    layers = [
        nn.TransformerEncoderLayer(size, 8, 4 * size, dropout=0.0, batch_first=True)
        for _ in range(depth)
    ]
    model = nn.Sequential(*layers)
    if sharded:
        mesh = init_device_mesh("cpu", (RANKS,))
        for layer in model:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
    return model, torch.randn(8, 64, size)


@contextmanager
def _counted() -> Iterator[list[int]]:
    """The bytes that this rank hands to collectives."""
    from torch import distributed as dist

    sent: list[int] = []

    def counting(function: Callable[..., Any], at: int) -> Any:
        def wrapped(*given: Any, **options: Any) -> Any:
            sent.append(given[at].numel() * given[at].element_size())
            return function(*given, **options)

        return wrapped

    with (
        mock.patch.object(dist, "all_reduce", counting(dist.all_reduce, 0)),
        mock.patch.object(dist, "all_to_all_single", counting(dist.all_to_all_single, 1)),
    ):
        yield sent


def _bytes_sent(rank: int, quick: bool) -> None:
    import specops

    model, _ = _transformer(quick)
    size = sum(p.numel() * p.element_size() for p in model.parameters() if p.ndim > 1)
    attachment = specops.attach(None, model, specops.ClipSpectralNorm(50.0))
    table = Table(title=f"bytes that a rank sends in a firing; {size / 1e6:.1f} MB of matrices")
    for header in ("firing", "collectives", "bytes", "of the matrices"):
        table.add_column(header, justify="right")
    for kind in ("the first, certified", "screened", "screened"):
        with _counted() as sent:
            attachment.step()
        table.add_row(kind, str(len(sent)), f"{sum(sent):,}", f"{sum(sent) / size:.2%}")
    if rank == 0:
        Console(width=120).print(table)


def _projections(rank: int, repeats: int, quick: bool) -> None:
    """All layers outside of the ball: by owners, and by every rank for itself."""
    import torch
    from torch import distributed as dist
    from torch.distributed.tensor import distribute_tensor

    import specops

    model, _ = _transformer(quick)
    rule = specops.ClipSpectralNorm(1.0, screen=False)
    attachment = specops.attach(None, model, rule)
    maps = attachment.geometries()
    weights = {name: p for name, p in model.named_parameters() if name in maps}

    @torch.no_grad()
    def gathered() -> None:
        for name, p in weights.items():
            new, _, _ = rule.enforce(p.full_tensor(), maps[name], {})
            part = distribute_tensor(new, p.device_mesh, p.placements, src_data_rank=None)
            p.to_local().copy_(part.to_local())

    parts = [p.to_local().detach() for p in weights.values()]
    _in_turn(rank, "projecting all shards", repeats, parts, gathered, attachment.enforce)

    (alone, _), (together, _) = (_transformer(quick, sharded=False) for _ in range(2))
    everywhere = specops.attach(None, alone, rule).enforce
    owned = specops.attach(None, together, rule, replicas=dist.group.WORLD).enforce
    models = (alone, together)
    parts = [p.detach() for m in models for name, p in m.named_parameters() if name in maps]
    _in_turn(rank, "projecting all replicas", repeats, parts, everywhere, owned)


def _in_turn(
    rank: int,
    title: str,
    repeats: int,
    parts: list[Any],
    everywhere: Callable[[], None],
    owned: Callable[[], None],
) -> None:
    """Time both from the same weights."""
    from torch import distributed as dist

    kept = [part.clone() for part in parts]
    times: dict[str, list[float]] = {"everywhere": [], "owned": []}
    for _ in range(max(2, repeats // 2)):
        for name, act in (("everywhere", everywhere), ("owned", owned)):
            for part, values in zip(parts, kept, strict=True):
                part.copy_(values)
            dist.barrier()
            began = time.perf_counter()
            act()
            dist.barrier()
            times[name].append(time.perf_counter() - began)
    if rank == 0:
        a, b = (statistics.median(t) for t in times.values())
        print(f"{title}: everywhere {a:.2f} s, owned {b:.2f} s: {b / a:.2f}×")


def _steps(rank: int, repeats: int, quick: bool) -> None:
    """A step with the cap, which holds already, and one without, in turn."""
    import torch
    from torch import distributed as dist

    import specops

    runs = []
    for capped in (False, True):
        model, x = _transformer(quick)
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-5)
        if capped:
            specops.attach(optimizer, model, specops.ClipSpectralNorm(50.0))
        runs.append((model, optimizer, x))
    times: list[list[float]] = [[], []]
    for round_ in range(2 + (3 if quick else 4 * repeats)):
        for kept, (model, optimizer, x) in zip(times, runs, strict=True):
            dist.barrier()
            began = time.perf_counter()
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()
            dist.barrier()
            if round_ > 1:
                kept.append(time.perf_counter() - began)
    if rank == 0:
        ratios = [b / a - 1.0 for a, b in zip(*times, strict=True)]
        print(
            f"step: plain {statistics.median(times[0]) * 1e3:.0f} ms, capped "
            f"{statistics.median(times[1]) * 1e3:.0f} ms; median {statistics.median(ratios):+.1%}"
        )
