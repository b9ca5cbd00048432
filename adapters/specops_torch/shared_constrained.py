"""One weight under a rule, on which the ranks of a group work together."""

from __future__ import annotations

import re
from typing import Any

import torch

from specops_torch.constrained import Constrained
from specops_torch.shared import SharedLocation


class SharedConstrained(Constrained):
    """A weight whose rule acts by products that all ranks sum, or on the rank that owns it.

    States of rules are the same on all ranks.
    """

    advanced: tuple[dict[str, torch.Tensor], dict[str, Any]] | None = None
    """(new state, figures) of a firing by products, until it is recorded."""
    moved: torch.Tensor | None = None
    """How far its owner moved it last, relative to its norm, if anybody asks."""

    @property
    def location(self) -> SharedLocation:
        """Where it is."""
        assert isinstance(self.parameter, SharedLocation)
        return self.parameter

    @property
    def how(self) -> tuple[Any, ...]:
        """What has to be the same on all ranks, wherever functions and tensors lie there."""
        rule = re.sub(r" at 0x[0-9a-f]+|, device='[^']*'", "", repr(self.rule))
        return rule, self.assignment.every, repr(self.assignment.weight.geometry)

    @property
    def waits(self) -> bool:
        """Whether a firing leaves it alone on every rank, for reasons that need no numbers."""
        return bool(self.location.frozen()) or self.needs_size

    def why_not(self, weight: torch.Tensor) -> str:
        """As ever; what was advanced by products has been looked at whole."""
        if self.advanced is not None:
            return self.location.frozen()
        return super().why_not(weight)

    def act(self, weight: torch.Tensor, step: int, *, certain: bool) -> Any:
        """What products have given, or on its owner what the rule gives."""
        if self.advanced is None:
            return super().act(weight, step, certain=certain)
        (state, figures), self.advanced = self.advanced, None
        return weight, state, self.checked(figures)

    def steps_by_products(self, step: int) -> Any:
        """The computation of a firing that needs no more than products; None where it does."""
        if self.state is None:
            return None
        return self.rule.by_products(self.geometry, self.state, step=step, name=self.name)
