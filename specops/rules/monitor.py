"""`Monitor`: measure and change nothing."""

from __future__ import annotations

from dataclasses import dataclass

from specops import arrays
from specops.geometry import Geometry
from specops.rules.base import Figures, Scheduled, figure
from specops.rules.stages import WeightRule
from specops.spectra import spectral_norm, spectral_norm_bounds, stable_rank
from specops.typing import Array, State


@dataclass(frozen=True)
class Monitor(Scheduled, WeightRule):
    """Measure and change nothing.

    Its figures are ``spectral_norm`` and ``stable_rank``, or for a convolution without input size
    ``norm_upper``, a bound for every size.
    """

    def init(self, weight: Array, geometry: Geometry, name: str) -> State:
        """No state."""
        return {}

    @arrays.entry
    def update(
        self, weight: Array, geometry: Geometry, state: State, *, step: int = 1, name: str = ""
    ) -> tuple[Array, State, Figures]:
        """Measure."""
        if not geometry.has_size:
            return weight, state, {"norm_upper": spectral_norm_bounds(weight, geometry).upper}
        figures = {
            "spectral_norm": spectral_norm(weight, geometry),
            "stable_rank": stable_rank(weight, geometry),
        }
        blocks = {k: x if isinstance(x, tuple) else (x,) for k, x in figures.items()}
        return weight, state, {k: figure(x) for k, x in blocks.items()}
