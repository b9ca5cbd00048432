"""A weight of which every rank holds a part, read and written as one logical matrix."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from specops.errors import AdapterError
from specops_torch.collectives import about, objects
from specops_torch.pieces import is_sharded, layouts
from specops_torch.shared import SharedLocation


@dataclass
class ShardedLocation(SharedLocation):
    """A DTensor parameter.

    Its shape, geometry and blocks are those of the logical weight. `read` gives that weight if it
    has been gathered, else this rank's part; `write` takes either.
    """

    held: Any = None
    is_brought_together: bool = False
    """Whether `fully_shard` gathers it for forward passes."""

    @property
    def parameter(self) -> nn.Parameter:
        """The parameter that the optimizer has. Between forward passes layers may hold the gathered
        one instead, as `fully_shard` leaves it after an evaluation."""
        found = self.module._parameters.get(self.attribute)
        if is_sharded(found):
            self.held = found
        elif found is None:
            return super().parameter
        return self.held

    @property
    def local(self) -> torch.Tensor:
        """This rank's part, sharing its memory."""
        with torch.no_grad():
            part: torch.Tensor = self.parameter.to_local()
        return part

    @property
    def is_stale(self) -> bool:
        """Whether its layer holds a gathered copy, from before the latest write."""
        return not is_sharded(self.module._parameters.get(self.attribute))

    def gathered(self) -> torch.Tensor:
        """The logical weight, differentiable, by a collective of its own."""
        whole: torch.Tensor = self.parameter.full_tensor()
        return whole

    def write(self, value: torch.Tensor) -> None:
        """Write in place: this rank's part, also if a whole weight is given."""
        own = self.known.own
        if value.shape == self.parameter.shape:
            value = own.take(value)
        with torch.no_grad():
            self.local.copy_(value.reshape(self.local.shape))

    def identity(self) -> int | None:
        """The id of the parameter that the optimizer has."""
        return id(self.parameter)

    def holders(self) -> list[tuple[nn.Module, str]]:
        """Every module that holds the tensor, and its name for it."""
        found = super().holders()
        return found or [(self.module, self.attribute)]


def settle(constrained: Sequence[Any], groups: dict[Any, Any]) -> None:
    """Learn which part of each new weight every rank holds; all ranks have to call this.

    Raises
    ------
    AdapterError
        The ranks have different weights, rules or intervals; it is raised on all of them.
    """
    here = [c for c in constrained if isinstance(c.location, ShardedLocation)]
    new = [c for c in here if c.location.layout is None]
    if not new:
        return
    for c in new:
        placements = c.location.held.placements
        if any(p.is_partial() for p in placements):
            raise AdapterError(
                f"{c.name} is a partial sum (placements {placements}): redistribute it to Shard or "
                f"Replicate first"
            )
    found = layouts([(c.name, c.location.parameter, c.signature) for c in new], groups)
    for c, layout in zip(new, found, strict=True):
        c.location.learn(layout)


def agree_on_sizes(locations: Sequence[SharedLocation]) -> None:
    """Tell every rank the largest input that any rank has seen; all ranks have to call this.

    The operator of a weight must be the same on all ranks, but their batches may differ in size.
    """
    by_group: dict[int, list[ShardedLocation]] = {}
    for x in locations:
        if isinstance(x, ShardedLocation) and x.recorder is not None:
            by_group.setdefault(id(x.known.group), []).append(x)
    for members in by_group.values():
        with about([x.weight.name for x in members]):
            everybody = objects([x.sizes() for x in members], members[0].known.group)
        for theirs in everybody:
            for x, sizes in zip(members, theirs, strict=True):
                x.see_also(sizes)


def reshard(model: nn.Module) -> None:
    """Free the weights that `fully_shard` has gathered: the next forward pass gathers them anew."""
    for module in model.modules():
        if is_fully_sharded(module):
            module.reshard()


def is_fully_sharded(module: nn.Module) -> bool:
    """Whether `fully_shard` was called on it."""
    return any(kind.__name__ == "FSDPModule" for kind in type(module).__mro__)
