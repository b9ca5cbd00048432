"""Cases for four ranks on a mesh of two axes."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import init_device_mesh

import specops
from specops import ClipSpectralNorm, Dense, SpectralNormalization, SpectralNormPenalty
from tests.torch_adapter.distributed.models import (
    chain,
    compare,
    dense,
    fsdp,
    in_columns,
)


def hybrid(_: Path) -> None:
    """Sharded over two ranks, and that twice."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))

    def shard(model: nn.Module) -> nn.Module:
        return fsdp(model, mesh)

    for rule in (
        ClipSpectralNorm(1.0),
        ClipSpectralNorm(8.0),
        SpectralNormPenalty(0.05, norm="reshaped"),
    ):
        compare(dense, shard, rule, 1e-6)
    compare(dense, shard, SpectralNormalization(norm="reshaped"), 1e-5)


def two_axes(_: Path) -> None:
    """Tensor parallel, then fully_shard: strided shards, uneven ones."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    kinds = set()

    def shard(model: nn.Module) -> nn.Module:
        in_columns(model, mesh["tensor"])
        fully_shard(model, mesh=mesh["data"])
        kinds.update(type(p).__name__ for w in model.parameters() for p in w.placements)
        return model

    blocks = {"0.weight": Dense(splits=(3, 1, 2), repeats=2)}
    for rule in (
        ClipSpectralNorm(1.0),
        ClipSpectralNorm(30.0),
        SpectralNormPenalty(0.01, norm="reshaped"),
    ):
        compare(chain, shard, rule, 1e-6, geometries=blocks)
    assert "_StridedShard" in kinds


def a_part_of_the_world(_: Path) -> None:
    """Two pairs of ranks, each with a model of its own."""
    mesh = init_device_mesh("cpu", (2, 1, 2), mesh_dim_names=("stage", "copy", "shard"))
    for part in (mesh["shard"], mesh["copy", "shard"]):
        model = fsdp(dense(), part)
        with torch.no_grad():
            for p in model.parameters():
                p.mul_(1.0 + dist.get_rank() // 2)
        attachment = specops.attach(None, model, ClipSpectralNorm(1.0))
        attachment.step()
        assert all(row.norm is None or row.norm <= 1.0 + 1e-6 for row in attachment.report().rows)


RANKS = 4
CASES = (hybrid, two_axes, a_part_of_the_world)
