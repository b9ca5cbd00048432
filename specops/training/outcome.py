"""What a rule gave for one weight, before anything is written."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Generic, TypeVar

from specops.training.assigned import Assigned
from specops.training.history import Record
from specops.typing import Array, State

C = TypeVar("C", bound=Assigned)


@dataclass(slots=True)
class Outcome(Generic[C]):
    """What a rule gave for one weight; nothing of it has been written yet."""

    constrained: C
    weight: Array
    """As the rule was given it."""
    array: Array | None
    """The new weight, or the term of a gradient; None where the rule was skipped."""
    state: State | None
    record: Record

    @property
    def changes_weight(self) -> bool:
        """Whether there is something to write."""
        if self.array is None or self.array is self.weight:
            return False
        return self.constrained.stage == "weights"
