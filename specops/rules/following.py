"""The base of rules whose state holds the leading singular pairs of a norm."""

from __future__ import annotations

from specops import arrays
from specops.errors import StateError
from specops.geometry import Geometry
from specops.rules.base import Scheduled
from specops.tracking import Norm, Tracked, track
from specops.typing import Array, State


class Following(Scheduled):
    """A rule whose state is the leading pairs of its `norm`, which it follows as weights change."""

    norm: Norm

    def tracked(self, geometry: Geometry) -> Tracked:
        """The norm whose leading pairs are the state."""
        return track(geometry, self.norm)

    def needs_input_size(self) -> bool:
        """True for the operator's norm, which depends on the input size."""
        return self.norm == "operator"

    @arrays.entry
    def init(self, weight: Array, geometry: Geometry, name: str) -> State:
        """The leading pairs, from a start that depends on the name alone."""
        return self.tracked(geometry).start(weight, name)

    def _advanced(
        self, weight: Array, geometry: Geometry, state: State, name: str, rounds: int
    ) -> State:
        """The state after so many steps; a new one if the old one is of another input size."""
        follow = self.tracked(geometry)
        try:
            return follow.advance(weight, state, rounds)
        except StateError:
            return follow.start(weight, name)
