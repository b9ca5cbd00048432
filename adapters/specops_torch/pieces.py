"""Which entries of a weight each rank holds."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import distributed as dist

from specops.errors import AdapterError
from specops_torch.collectives import about, objects

Runs = tuple[tuple[int, int], ...]
"""Indices along one axis, in the order in which they are held: (first, one past the last) ..."""


@dataclass(frozen=True)
class Piece:
    """The entries of a tensor that one rank holds: those at the given indices of each axis."""

    axes: tuple[Runs, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the rank's own tensor."""
        return tuple(sum(stop - start for start, stop in runs) for runs in self.axes)

    @property
    def is_empty(self) -> bool:
        """Whether the rank holds nothing."""
        return math.prod(self.shape) == 0

    def take(self, whole: torch.Tensor) -> torch.Tensor:
        """The entries, as the rank holds them."""
        own = whole.new_empty(self.shape)
        for there, here in self._boxes():
            own[here] = whole[there]
        return own

    def put(self, whole: torch.Tensor, own: torch.Tensor) -> None:
        """Write a rank's entries to their places in the whole tensor."""
        for there, here in self._boxes():
            whole[there] = own[here]

    def indices(self, axis: int) -> torch.Tensor:
        """The indices along one axis."""
        ranges = [torch.arange(start, stop) for start, stop in self.axes[axis]]
        return torch.cat(ranges) if ranges else torch.empty(0, dtype=torch.int64)

    def _boxes(self) -> Iterator[tuple[tuple[slice, ...], tuple[slice, ...]]]:
        """(slices in the whole tensor, slices in the rank's own) of each contiguous block."""
        placed = []
        for runs in self.axes:
            ends = list(itertools.accumulate(stop - start for start, stop in runs))
            sizes = [stop - start for start, stop in runs]
            own = [slice(end - size, end) for end, size in zip(ends, sizes, strict=True)]
            placed.append(list(zip((slice(*run) for run in runs), own, strict=True)))
        for box in itertools.product(*placed):
            yield tuple(there for there, _ in box), tuple(here for _, here in box)


@dataclass(frozen=True)
class Layout:
    """The pieces of a weight by rank of a process group, replicas included."""

    group: Any
    rank: int
    device: torch.device
    """The device on which data are sent."""
    pieces: tuple[Piece, ...]

    @property
    def own(self) -> Piece:
        """What this rank holds."""
        return self.pieces[self.rank]

    @property
    def speaks(self) -> bool:
        """Whether this rank's part counts in sums: of several replicas only the first does."""
        return not self.own.is_empty and self.pieces.index(self.own) == self.rank

    def sources(self, owner: int) -> list[int]:
        """Ranks that together hold every entry once, with the owner itself among them."""
        holders: dict[Piece, list[int]] = {}
        for rank, piece in enumerate(self.pieces):
            if not piece.is_empty:
                holders.setdefault(piece, []).append(rank)
        own = holders.get(self.pieces[owner], [owner])
        place = own.index(owner)
        return sorted(ranks[place % len(ranks)] for ranks in holders.values())


def is_sharded(parameter: Any) -> bool:
    """Whether a parameter is a DTensor."""
    return type(parameter) is not torch.nn.Parameter and hasattr(parameter, "device_mesh")


def piece_of(parameter: Any) -> Piece:
    """What this rank holds of a DTensor, as torch itself distributes the indices of each axis."""
    try:
        from torch.distributed.tensor import Replicate, distribute_tensor
    except ImportError as error:
        raise AdapterError("sharded parameters need torch 2.7 or later") from error
    shape, placements, axes = tuple(parameter.shape), parameter.placements, []
    for axis, size in enumerate(shape):
        here = [p if getattr(p, "dim", None) == axis else Replicate() for p in placements]
        along = [size if a == axis else 1 for a in range(len(shape))]
        indices = torch.arange(size, device=parameter.device_mesh.device_type).view(along)
        held = distribute_tensor(indices, parameter.device_mesh, here, src_data_rank=None)
        axes.append(_runs(held.to_local().flatten().tolist()))
    piece = Piece(tuple(axes))
    if not piece.is_empty and piece.shape != tuple(parameter.to_local().shape):
        raise AdapterError(
            f"its placements {placements} on {parameter.device_mesh} are of a kind whose parts are "
            f"not known: this rank holds {tuple(parameter.to_local().shape)} of {shape}"
        )
    return piece


def layouts(parameters: Sequence[tuple[str, Any, Any]], groups: dict[Any, Any]) -> list[Layout]:
    """The layouts of DTensors; every rank of their meshes has to call this at the same time.

    Each parameter comes as (name, tensor, what else must be the same on all ranks).

    Raises
    ------
    AdapterError
        The ranks ask for different parameters; it is raised on all of them.
    """
    by_mesh: dict[tuple[int, ...], list[int]] = {}
    for i, (_, p, _) in enumerate(parameters):
        by_mesh.setdefault(_ranks(p.device_mesh), []).append(i)
    found: dict[int, Layout] = {}
    for ranks, members in by_mesh.items():
        mesh = parameters[members[0]][1].device_mesh
        if ranks not in groups:
            groups[ranks] = _group(mesh, ranks)
        group, mine = groups[ranks], []
        for i in members:
            name, p, how = parameters[i]
            mine.append((name, (tuple(p.shape), how), piece_of(p)))
        with about([name for name, _, _ in mine]):
            everybody = objects(mine, group)
        listed = [[(name, what) for name, what, _ in theirs] for theirs in everybody]
        if any(entries != listed[0] for entries in listed):
            different = [a[0] for a in listed[0] if any(a not in entries for entries in listed)]
            raise AdapterError(
                f"ranks constrain different weights, by different rules or in different order: "
                f"{different[:5]}; attach the same plan to the same model on every rank"
            )
        device = _device(mesh)
        for at, i in enumerate(members):
            pieces = tuple(theirs[at][2] for theirs in everybody)
            found[i] = Layout(group, dist.get_rank(group), device, pieces)
    return [found[i] for i in range(len(parameters))]


def _runs(indices: list[int]) -> Runs:
    runs: list[list[int]] = []
    for i in indices:
        if runs and runs[-1][1] == i:
            runs[-1][1] = i + 1
        else:
            runs.append([i, i + 1])
    return tuple((start, stop) for start, stop in runs)


def _ranks(mesh: Any) -> tuple[int, ...]:
    return tuple(sorted(mesh.mesh.flatten().tolist()))


def _group(mesh: Any, ranks: tuple[int, ...]) -> Any:
    """The processes of a mesh."""
    if len(ranks) == dist.get_world_size():
        return dist.group.WORLD
    if mesh.ndim == 1:
        return mesh.get_group()
    return dist.new_group(list(ranks), use_local_synchronization=True)


def _device(mesh: Any) -> torch.device:
    kind = mesh.device_type
    if kind == "cpu":
        return torch.device(kind)
    return torch.device(kind, getattr(torch, kind).current_device())
