"""One weight under a rule: where it is, its state, its norm."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from specops.geometry import Dense, Geometry
from specops.plan import Assignment
from specops.spectra import spectral_norm, spectral_norm_bounds
from specops_torch.parameters import Location


@dataclass
class Constrained:
    """One weight under a rule."""

    location: Location
    assignment: Assignment
    state: dict[str, torch.Tensor] | None = None

    @property
    def name(self) -> str:
        """The parameter's path."""
        return self.assignment.weight.name

    @property
    def geometry(self) -> Geometry:
        """The map at the size that is known by now."""
        geometry = self.location.geometry()
        assert geometry is not None
        return geometry  # type: ignore[no-any-return]

    def norm(self) -> dict[str, Any]:
        """The norm now, for a report: exact where it can be, else a certified upper bound."""
        w, geometry = self.location.parameter.detach(), self.geometry
        if not bool(torch.isfinite(w).all()):
            return {"norm": float("nan"), "norm_is": "not finite"}
        exact = isinstance(geometry, Dense) or geometry.has_exact_spectrum(tuple(w.shape))
        norms = spectral_norm(w, geometry) if exact else spectral_norm_bounds(w, geometry).upper
        largest = max(float(n.max()) for n in (norms if isinstance(norms, tuple) else (norms,)))
        return {"norm": largest, "norm_is": "exact" if exact else "upper bound"}

    def state_dict(self) -> dict[str, Any]:
        """The rule's state and the sizes seen."""
        recorder = self.location.recorder
        return {
            "state": None if self.state is None else _copy(self.state),
            "sizes": None if recorder is None else recorder.state(),
        }

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Restore `state_dict`."""
        self.state = None if saved["state"] is None else _copy(saved["state"])
        if self.location.recorder is not None and saved["sizes"] is not None:
            self.location.recorder.load(saved["sizes"])


def _copy(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {key: value.clone() for key, value in state.items()}
