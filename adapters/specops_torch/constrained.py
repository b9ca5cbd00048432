"""One weight under a rule: where it is, its state, its norm."""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from specops.errors import AdapterError
from specops.geometry import Dense, Geometry
from specops.tracking import are_alike
from specops.training.assigned import Assigned
from specops.training.plan import Assignment
from specops.training.report import measured
from specops_torch.batch_norms import norm_with
from specops_torch.fused import row_blocks
from specops_torch.in_use import InUse
from specops_torch.parameters import Location
from specops_torch.reading import answer_plainly, read_through


@dataclass
class Constrained(Assigned):
    """One weight under a rule."""

    location: Location
    assignment: Assignment
    state: dict[str, torch.Tensor] | None = None
    in_use: InUse | None = None
    """Of a forward rule, which then holds the state."""
    steps: int = 0
    """Of this parameter alone, where its optimizer steps in backward."""
    handles: list[Any] = field(default_factory=list, repr=False)
    _seen: tuple[Any, int] | None = None
    fitting: Geometry | None = None
    """The geometry that was last found to fit the weight."""
    _blocks: tuple[Geometry, int] | None = field(default=None, repr=False)
    answering: list[tuple[nn.Module, str]] = field(default_factory=list, repr=False)
    """Modules that answer with the weight in use, and their names for it."""

    @property
    def geometry(self) -> Geometry:
        """The map at the size that is known by now."""
        geometry = self.location.geometry()
        assert geometry is not None
        return geometry  # type: ignore[no-any-return]

    def read_forward(self) -> None:
        """Let every layer that holds the weight use the one that the rule gives."""
        location = self.location
        self.in_use = InUse(
            self.rule,
            self.name,
            self.geometry,
            location.recorder,
            lenient=self.assignment.lenient,
        )
        # The norm of a convolution's operator waits for the size of its first input.
        geometry, waits = self.geometry, self.rule.needs_input_size()
        if isinstance(geometry, Dense) or geometry.grid is not None or not waits:
            # A weight that is not finite is met at its first step, by the user's policy.
            self.in_use.measure(location.parameter)
        for holder, attribute in self._holders():
            read_through(holder, attribute, self.in_use)
            self.answering.append((holder, attribute))
            if location.recorder is not None and waits:
                self.handles.append(
                    holder.register_forward_pre_hook(FirstSize(self.in_use), with_kwargs=True)
                )

    def blocks(self, geometry: Geometry) -> int:
        """`row_blocks` of the norm that is followed."""
        if self._blocks is None or self._blocks[0] is not geometry:
            self._blocks = geometry, row_blocks(self.rule.tracked(geometry))
        return self._blocks[1]

    def weight(self) -> torch.Tensor:
        """The weight as its layers use it."""
        raw = self.location.parameter
        if self.in_use is None or not self.answering:
            return raw
        used = self.in_use(raw)
        # What is written to a plain tensor is lost, as everywhere in torch.
        return used if used is raw else used.as_subclass(torch.Tensor)

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
        if self.in_use is None or not self.rule.is_scheduled():
            return
        arguments = self.rule.arguments(step, self.name, self.geometry)
        for key, value in arguments.items():
            if key != "step":
                parameter = self.location.parameter
                dtype = torch.float64 if parameter.dtype == torch.float64 else torch.float32
                value = torch.tensor(float(value), dtype=dtype, device=parameter.device)
            self.in_use.overrides[key] = value

    def norm(self, following: Sequence[nn.Module] = ()) -> dict[str, Any]:
        """The norm now, for a report: exact where it can be, else a certified upper bound.

        And that with the batch normalisation which follows, if there is one.
        """
        with torch.no_grad():
            w, geometry = self.weight().detach(), self.geometry
        found = measured(w, geometry, self.rule)
        if following and found["norm_is"] != "not finite":
            found["normalized"] = norm_with(self.location.module, w, geometry, following)
        return found

    def state_dict(self) -> dict[str, Any]:
        """The rule's state and the sizes seen."""
        recorder = self.location.recorder
        state = self.state if self.in_use is None else self.in_use.state
        return {
            "state": None if state is None else _copy(state),
            "sizes": None if recorder is None else recorder.state(),
            "steps": self.steps,
            "drifting": self.in_use is not None and self.in_use.drifting,
        }

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Restore `state_dict`."""
        parameter = self.location.parameter
        state = None if saved["state"] is None else _copy(saved["state"], parameter.device)
        self.steps = int(saved.get("steps", 0))
        if self.location.recorder is not None and saved["sizes"] is not None:
            self.location.recorder.load(saved["sizes"])
        if self.in_use is None:
            self.state = state
        else:
            self.in_use.geometry = self.geometry
            self.in_use.load(state, parameter, drifting=bool(saved.get("drifting", False)))

    def release(self) -> None:
        """Remove every hook."""
        for handle in self.handles:
            handle.remove()
        self.handles.clear()
        for module, attribute in self.answering:
            assert self.in_use is not None
            answer_plainly(module, attribute, self.in_use)
        self.answering.clear()
        self.location.unwatch()

    def check_state(self, saved: Mapping[str, Any]) -> None:
        """Raise if `saved` cannot be this weight's: before anything is written."""
        try:
            state, _ = saved["state"], saved["sizes"]
        except (KeyError, TypeError):
            raise AdapterError(f"{self.name}: the state has no entries state and sizes") from None
        own = None if self.in_use is None else self.in_use.state
        if not own or not state:
            return
        shapes = {key: tuple(x.shape) for key, x in state.items()}
        expected = {key: tuple(x.shape) for key, x in own.items()}
        if not are_alike(shapes, expected):
            raise AdapterError(f"{self.name}: the state has {shapes}, expected {expected}")


class FirstSize:
    """A forward pre-hook: the size of a convolution's first input, before its weight is read."""

    def __init__(self, in_use: InUse) -> None:
        self.in_use = in_use

    def __call__(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        """The hook itself."""
        in_use = self.in_use
        if in_use.state is None and in_use.recorder is not None:
            in_use.recorder.before(module, args, kwargs)
            in_use.geometry = in_use.recorder.geometry(module)


def _copy(
    state: Mapping[str, torch.Tensor], device: torch.device | None = None
) -> dict[str, torch.Tensor]:
    return {
        key: value.clone() if device is None else value.to(device, copy=True)
        for key, value in state.items()
    }
