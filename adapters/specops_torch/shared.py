"""A weight that the ranks of a group share: which part of it each rank holds."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from specops_torch.location import Location
from specops_torch.pieces import Layout


@dataclass
class SharedLocation(Location):
    """A parameter of which every rank holds a part, or a copy.

    `read` gives the `whole` parameter if it has been gathered, else what this rank holds.
    """

    layout: Layout | None = None
    whole: torch.Tensor | None = field(default=None, repr=False)
    capacity: int = 4096
    """Bytes reserved for what its owner sends to all ranks besides its entries."""

    @property
    def known(self) -> Layout:
        """Which part each rank holds."""
        assert self.layout is not None
        return self.layout

    @property
    def local(self) -> torch.Tensor:
        """What this rank holds, sharing its memory."""
        return self.parameter.detach()

    def read(self) -> torch.Tensor:
        """The whole parameter if it has been gathered, else what this rank holds."""
        return self.local if self.whole is None else self.whole

    def learn(self, layout: Layout) -> None:
        """Remember which part each rank holds."""
        self.layout = layout
        self.capacity += 16 * sum(self.parameter.shape)
