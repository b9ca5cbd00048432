"""Weights that all ranks of a group hold alike, as under DistributedDataParallel."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import distributed as dist

from specops.errors import AdapterError
from specops_torch.collectives import about, objects
from specops_torch.pieces import Layout, Piece
from specops_torch.shared import SharedLocation


class ReplicatedLocation(SharedLocation):
    """A parameter of which every rank holds a copy."""


def settle_replicas(locations: Sequence[Any], group: Any) -> None:
    """Learn that all ranks have those that are new; all ranks call it alike.

    Raises
    ------
    AdapterError
        On all ranks, if they have others, or other values.
    """
    new = [x for x in locations if isinstance(x, ReplicatedLocation) and x.layout is None]
    if not new:
        return
    mine = [(x.weight.name, tuple(x.parameter.shape), _digest(x.parameter)) for x in new]
    with about([name for name, _, _ in mine]):
        everybody = objects(mine, group)
    for theirs in everybody:
        if theirs != everybody[0]:
            listed = {entry[0] for entry in set(theirs) ^ set(everybody[0])} or {"their order"}
            raise AdapterError(
                f"ranks hold no replicas, {', '.join(sorted(listed)[:5])} differ: attach after "
                f"DistributedDataParallel has made them alike, or leave out replicas="
            )
    device = new[0].parameter.device
    for x in new:
        piece = Piece(tuple(((0, size),) for size in x.parameter.shape))
        pieces = (piece,) * dist.get_world_size(group)
        x.learn(Layout(group, dist.get_rank(group), device, pieces))


def _digest(parameter: torch.Tensor) -> bytes:
    raw = parameter.detach().contiguous().reshape(-1).view(torch.uint8).cpu().numpy()
    return hashlib.blake2b(raw, digest_size=16).digest()
