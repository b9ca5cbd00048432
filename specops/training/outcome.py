"""`Outcome`: the result of a rule for one weight, before anything is written."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Generic, TypeVar

from specops.training.assigned import Assigned
from specops.training.history import Record
from specops.typing import Array, State

C = TypeVar("C", bound=Assigned)


@dataclass(slots=True)
class Outcome(Generic[C]):
    """The result of a rule for one weight; nothing of it has been written yet."""

    constrained: C
    weight: Array
    """The weight that the rule was given."""
    array: Array | None
    """The new weight, or the term to add to a gradient; None if the rule was skipped."""
    state: State | None
    record: Record

    @property
    def changes_weight(self) -> bool:
        """Whether there is something to write."""
        if self.array is None or self.array is self.weight:
            return False
        return self.constrained.stage == "weights"
