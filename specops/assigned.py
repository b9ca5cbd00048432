"""What adapters keep of one weight under a rule has these parts in common."""

from __future__ import annotations

from typing import Any

from specops.geometry import Geometry
from specops.plan import Assignment


class Assigned:
    """The parts of an `assignment` whose rule acts; a base of the adapters' own classes."""

    assignment: Assignment

    @property
    def name(self) -> str:
        """The parameter's path."""
        return self.assignment.weight.name

    @property
    def rule(self) -> Any:
        """The rule that acts on it."""
        return self.assignment.rule

    @property
    def stage(self) -> str:
        """When the rule acts."""
        stage: str = self.rule.stage
        return stage

    @property
    def geometry(self) -> Geometry:
        """The map that it stands for."""
        geometry = self.assignment.weight.geometry
        assert geometry is not None
        return geometry
