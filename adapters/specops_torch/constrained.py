"""One weight under a rule: where it is, its state, its norm."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from specops.assigned import Assigned
from specops.errors import AdapterError, NonFiniteError
from specops.geometry import Dense, Geometry
from specops.geometry.arguments import check_bound
from specops.normalizations import check_ratio
from specops.plan import Assignment
from specops.report import measured_norm
from specops.rules.base import at
from specops_torch.batch_norms import norm_with
from specops_torch.hooks import install, let_go
from specops_torch.normalized import Normalizer
from specops_torch.parameters import Location


@dataclass
class Constrained(Assigned):
    """One weight under a rule."""

    location: Location
    assignment: Assignment
    state: dict[str, torch.Tensor] | None = None
    normalizer: Normalizer | None = None
    """Of a forward rule, which then holds the state."""
    steps: int = 0
    """Of this parameter alone, where its optimizer steps in backward."""
    handles: list[Any] = field(default_factory=list, repr=False)
    _seen: tuple[Any, int] | None = None
    fitting: Geometry | None = None
    """The geometry that was last found to fit the weight."""
    followed: Any = field(default=None, repr=False)
    """What `batches.followed` found last."""
    on_host: Any = field(default=None, repr=False)
    """The `HostMatrix` of a small weight on the CPU, once its vectors were advanced there."""

    @property
    def geometry(self) -> Geometry:
        """The map at the size that is known by now."""
        geometry = self.location.geometry()
        assert geometry is not None
        return geometry  # type: ignore[no-any-return]

    def hook_forward(self) -> None:
        """Let every layer that holds the weight use the normalised one."""
        location = self.location
        self.normalizer = Normalizer(
            self.rule,
            self.name,
            self.geometry,
            location.recorder,
            lenient=self.assignment.lenient,
        )
        # The norm of a convolution's operator waits for the size of its first input.
        geometry = self.geometry
        sized = isinstance(geometry, Dense) or geometry.grid is not None
        if sized or getattr(self.rule, "norm", "") != "operator":
            # A weight that is not finite is met at its first step, by the user's policy.
            with contextlib.suppress(NonFiniteError):
                self.normalizer.prepare(location.parameter)
        for module, owner in location.parents:
            self.handles += install(module, self.normalizer, location.attribute, owner)
        for holder, attribute in self._holders():
            self.handles += install(holder, self.normalizer, attribute)

    def _holders(self) -> list[tuple[nn.Module, str]]:
        parameter = self.location.parameter
        modules = {id(m): m for m in (self.location.module, *self.location.others)}
        return [
            (module, attribute)
            for module in modules.values()
            for attribute, own in module._parameters.items()
            if own is parameter
        ]

    def see(self, gradient: torch.Tensor | None) -> None:
        """Remember which gradient the latest step had."""
        self._seen = None if gradient is None else (weakref.ref(gradient), gradient._version)

    def has_seen(self, gradient: torch.Tensor) -> bool:
        """Whether that is this one, as it is; a new one may stand at the old one's address."""
        return (
            self._seen is not None
            and self._seen[0]() is gradient
            and self._seen[1] == gradient._version
        )

    def schedule(self, step: int) -> None:
        """Bring schedules to the step that comes next, as tensors: no recompilation."""
        if self.normalizer is None:
            return
        self.normalizer.step = step
        for key in ("scale", "ratio"):
            schedule = getattr(self.rule, key, None)
            if not callable(schedule):
                continue
            value = at(schedule, step, self.name, self.geometry)
            if key == "ratio":
                check_ratio(value)
            else:
                check_bound(value, key)
            parameter = self.location.parameter
            dtype = torch.float64 if parameter.dtype == torch.float64 else torch.float32
            self.normalizer.overrides[key] = torch.tensor(
                float(value), dtype=dtype, device=parameter.device
            )

    def norm(self, following: Sequence[nn.Module] = ()) -> dict[str, Any]:
        """The norm now, for a report: exact where it can be, else a certified upper bound.

        And that with the batch normalisation which follows, if there is one.
        """
        w, geometry = self.location.parameter.detach(), self.geometry
        if self.normalizer is not None and self.handles:
            with torch.no_grad():
                w = self.normalizer(w)
        found = measured_norm(w, geometry)
        if following and found["norm_is"] != "not finite":
            found["normalized"] = norm_with(self.location.module, w, geometry, following)
        return found

    def state_dict(self) -> dict[str, Any]:
        """The rule's state and the sizes seen."""
        recorder = self.location.recorder
        state = self.state if self.normalizer is None else self.normalizer.state
        return {
            "state": None if state is None else _copy(state),
            "sizes": None if recorder is None else recorder.state(),
            "steps": self.steps,
            "drifting": self.normalizer is not None and self.normalizer.drifting,
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
            self.normalizer.state = state
            self.normalizer.drifting = bool(saved.get("drifting", False))

    def release(self) -> None:
        """Remove every hook."""
        for handle in self.handles:
            handle.remove()
        self.handles.clear()
        if self.normalizer is not None:
            let_go(self.normalizer)
        self.location.unwatch()

    def check_state(self, saved: Mapping[str, Any]) -> None:
        """Raise if `saved` cannot be this weight's: before anything is written."""
        try:
            state, _ = saved["state"], saved["sizes"]
        except (KeyError, TypeError):
            raise AdapterError(f"{self.name}: the state has no entries state and sizes") from None
        own = self.state if self.normalizer is None else self.normalizer.state
        if self.normalizer is None or not own or not state:
            return
        shapes = {key: tuple(x.shape) for key, x in state.items()}
        expected = {key: tuple(x.shape) for key, x in own.items()}
        sized = {"v"}  # vectors of a convolution's operator, of the input's size
        if set(shapes) != set(expected) or any(
            shapes[key] != expected[key] for key in shapes if key not in sized
        ):
            raise AdapterError(f"{self.name}: the state has {shapes}, expected {expected}")


def _copy(
    state: Mapping[str, torch.Tensor], device: torch.device | None = None
) -> dict[str, torch.Tensor]:
    return {
        key: value.clone() if device is None else value.to(device, copy=True)
        for key, value in state.items()
    }
