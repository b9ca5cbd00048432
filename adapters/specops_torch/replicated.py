"""Weights of which all ranks of a group hold a copy, as under DistributedDataParallel."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from specops.errors import AdapterError
from specops_torch.collectives import about, objects
from specops_torch.pieces import Layout, Piece
from specops_torch.shared import SharedLocation


class ReplicatedLocation(SharedLocation):
    """A parameter of which every rank holds a copy."""


def replicas_of(model: nn.Module, named: Any) -> Any:
    """The group whose ranks hold copies: the named one, or that of DistributedDataParallel
    around the model or a part of it; None if there is neither."""
    wrapped = (m for m in model.modules() if isinstance(m, DistributedDataParallel))
    return named or next((m.process_group for m in wrapped), None)


def settle_replicas(constrained: Sequence[Any], group: Any) -> None:
    """Check that all ranks hold new weights under equal rules; all ranks have to call this.

    Raises
    ------
    AdapterError
        The ranks have different weights, values, rules or intervals (raised on all of them), or
        there is no process group.
    """
    if group is None:
        return
    if not (dist.is_available() and isinstance(group, dist.ProcessGroup)):
        raise AdapterError(
            f"replicas must be a process group, such as torch.distributed.group.WORLD once "
            f"init_process_group has run, got {group!r}"
        )
    here = [c for c in constrained if isinstance(c.location, ReplicatedLocation)]
    new = [c for c in here if c.location.layout is None]
    mine = []
    for c in new:
        held = c.location.parameter
        mine.append((c.name, tuple(held.shape), _digest(held), c.signature))
    with about([c.name for c in new] or ["no weight"]):
        everybody = objects(mine, group)
    _check_alike(everybody)
    for c in new:
        held = c.location.parameter
        piece = Piece(tuple(((0, size),) for size in held.shape))
        pieces = (piece,) * dist.get_world_size(group)
        c.location.learn(Layout(group, dist.get_rank(group), held.device, pieces))


def check_sizes(constrained: Sequence[Any]) -> None:
    """Raise on all ranks if layers have seen inputs of other sizes on some of them."""
    learning = [c for c in constrained if isinstance(c.location, ReplicatedLocation)]
    learning = [c for c in learning if c.location.learns_size]
    if not learning:
        return
    with about([c.name for c in learning]):
        mine = [(c.name, c.location.sizes()) for c in learning]
        everybody = objects(mine, learning[0].location.layout.group)
    for entries in zip(*everybody, strict=True):
        if any(entry != entries[0] for entry in entries):
            raise AdapterError(
                f"{entries[0][0]} has seen inputs of other sizes on other ranks "
                f"({', '.join(str(sizes) for _, sizes in entries)}), so that ranks would constrain "
                f"other maps: name its size in geometries="
            )


def _check_alike(everybody: Sequence[Any]) -> None:
    for theirs in everybody:
        if theirs != everybody[0]:
            listed = {entry[0] for entry in set(theirs) ^ set(everybody[0])} or {"their order"}
            raise AdapterError(
                f"ranks hold no replicas under equal rules, {', '.join(sorted(listed)[:5])} "
                f"differ: attach the same plan after DistributedDataParallel has made them equal, "
                f"or leave out replicas="
            )


def _digest(parameter: torch.Tensor) -> bytes:
    raw = parameter.detach().contiguous().reshape(-1).view(torch.uint8).cpu().numpy()
    return hashlib.blake2b(raw, digest_size=16).digest()
