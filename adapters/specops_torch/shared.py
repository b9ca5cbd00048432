"""A weight that concerns the ranks of a group together: who holds what of it."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from specops_torch.location import Location
from specops_torch.pieces import Layout


@dataclass
class SharedLocation(Location):
    """A parameter of which every rank holds a part, or the same.

    `read` gives the whole where it has been brought together (`whole`), else what this rank holds.
    """

    layout: Layout | None = None
    whole: torch.Tensor | None = field(default=None, repr=False)
    capacity: int = 4096
    """Bytes that are expected of what an owner tells of it, beside its entries."""

    @property
    def known(self) -> Layout:
        """Who holds what."""
        assert self.layout is not None
        return self.layout

    @property
    def local(self) -> torch.Tensor:
        """What this rank holds, sharing its memory."""
        return self.parameter.detach()

    def read(self) -> torch.Tensor:
        """The whole where it is at hand, else what this rank holds."""
        return self.local if self.whole is None else self.whole

    def learn(self, layout: Layout) -> None:
        """Remember who holds what."""
        self.layout = layout
        self.capacity += 16 * sum(self.parameter.shape)
