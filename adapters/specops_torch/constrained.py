"""One weight under a rule: where it is, its state, its norm."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from specops.geometry import Dense, Geometry
from specops.plan import Assignment
from specops.rules.base import at
from specops.spectra import spectral_norm, spectral_norm_bounds
from specops_torch.normalized import Normalizer, install
from specops_torch.parameters import Location


@dataclass
class Constrained:
    """One weight under a rule."""

    location: Location
    assignment: Assignment
    state: dict[str, torch.Tensor] | None = None
    normalizer: Normalizer | None = None
    """Of a forward rule, which then holds the state."""
    steps: int = 0
    """Of this parameter alone, where its optimizer steps in backward."""
    handles: list[Any] = field(default_factory=list, repr=False)
    fitting: Geometry | None = None
    """The geometry that was last found to fit the weight."""

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
        """The map at the size that is known by now."""
        geometry = self.location.geometry()
        assert geometry is not None
        return geometry  # type: ignore[no-any-return]

    def hook_forward(self) -> None:
        """Let every layer that holds the weight use the normalised one."""
        location = self.location
        self.normalizer = Normalizer(self.rule, self.name, self.geometry, location.recorder)
        # The norm of a convolution's operator waits for the size of its first input.
        geometry = self.geometry
        sized = isinstance(geometry, Dense) or geometry.grid is not None
        if sized or getattr(self.rule, "norm", "") != "operator":
            self.normalizer.prepare(location.parameter)
        if location.parent is not None:
            module, owner = location.parent
            self.handles += install(module, self.normalizer, location.attribute, owner)
            return
        for holder, attribute in self._holders():
            self.handles += install(holder, self.normalizer, attribute)

    def _holders(self) -> list[tuple[nn.Module, str]]:
        found = {id(m): m for m in (self.location.module, *self.location.others)}
        return [(m, self._attribute_in(m)) for m in found.values()]

    def _attribute_in(self, module: nn.Module) -> str:
        parameter = self.location.parameter
        for attribute, own in module._parameters.items():
            if own is parameter:
                return attribute  # type: ignore[no-any-return]
        return self.location.attribute

    def schedule(self, step: int) -> None:
        """Bring a scheduled scale to the step that comes next, as a tensor: no recompilation."""
        if self.normalizer is None:
            return
        self.normalizer.step = step
        scale = getattr(self.rule, "scale", None)
        if callable(scale):
            value = at(scale, step, self.name, self.geometry)
            parameter = self.location.parameter
            self.normalizer.scale = torch.tensor(float(value), device=parameter.device)

    def norm(self) -> dict[str, Any]:
        """The norm now, for a report: exact where it can be, else a certified upper bound."""
        w, geometry = self.location.parameter.detach(), self.geometry
        if self.normalizer is not None and self.normalizer.state is not None:
            with torch.no_grad():
                w = self.normalizer(w)
        if not bool(torch.isfinite(w).all()):
            return {"norm": float("nan"), "norm_is": "not finite"}
        exact = isinstance(geometry, Dense) or geometry.has_exact_spectrum(tuple(w.shape))
        norms = spectral_norm(w, geometry) if exact else spectral_norm_bounds(w, geometry).upper
        largest = max(float(n.max()) for n in (norms if isinstance(norms, tuple) else (norms,)))
        return {"norm": largest, "norm_is": "exact" if exact else "upper bound"}

    def state_dict(self) -> dict[str, Any]:
        """The rule's state and the sizes seen."""
        recorder = self.location.recorder
        state = self.state if self.normalizer is None else self.normalizer.state
        return {
            "state": None if state is None else _copy(state),
            "sizes": None if recorder is None else recorder.state(),
            "steps": self.steps,
        }

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Restore `state_dict`."""
        parameter = self.location.parameter
        state = None if saved["state"] is None else _copy(saved["state"], parameter.device)
        self.steps = int(saved.get("steps", 0))
        if self.location.recorder is not None and saved["sizes"] is not None:
            self.location.recorder.load(saved["sizes"])
        if self.normalizer is None:
            self.state = state
        else:
            self.normalizer.geometry = self.geometry
            self.normalizer.load(state, parameter)

    def release(self) -> None:
        """Remove every hook."""
        for handle in self.handles:
            handle.remove()
        self.handles.clear()
        self.location.unwatch()


def _copy(
    state: Mapping[str, torch.Tensor], device: torch.device | None = None
) -> dict[str, torch.Tensor]:
    return {
        key: value.clone() if device is None else value.to(device, copy=True)
        for key, value in state.items()
    }
