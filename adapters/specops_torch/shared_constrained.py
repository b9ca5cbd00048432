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
    """Its relative change when its owner last fired, if that is asked for."""

    @property
    def location(self) -> SharedLocation:
        """Where the weight is."""
        assert isinstance(self.parameter, SharedLocation)
        return self.parameter

    @property
    def signature(self) -> tuple[Any, ...]:
        """What has to be the same on all ranks, without addresses and devices."""
        rule = re.sub(r" at 0x[0-9a-f]+|, device='[^']*'", "", repr(self.rule))
        return rule, self.assignment.every, repr(self.assignment.weight.geometry)

    @property
    def waits(self) -> bool:
        """Whether a firing leaves it alone on every rank, whatever its values are."""
        return bool(self.location.frozen()) or self.needs_size

    def why_not(self, weight: torch.Tensor) -> str:
        """As before; a weight that was advanced by products is known to be finite."""
        if self.advanced is not None:
            return self.location.frozen()
        return super().why_not(weight)

    def act(self, weight: torch.Tensor, step: int, *, certain: bool) -> Any:
        """The result of a firing by products, or else, on its owner, that of the rule."""
        if self.advanced is None:
            return super().act(weight, step, certain=certain)
        (state, figures), self.advanced = self.advanced, None
        return weight, state, self.checked(figures)

    def steps_by_products(self, step: int) -> Any:
        """The generator of a firing by products; None if the firing needs the whole weight."""
        if self.state is None:
            return None
        return self.rule.by_products(self.geometry, self.state, step=step, name=self.name)
