"""One array under a rule: its state, the array in use, its norm."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from specops import arrays
from specops.errors import AdapterError, NonFiniteError
from specops.training.assigned import Assigned
from specops.training.plan import Assignment
from specops.training.report import measured
from specops.typing import Array, State
from specops_cupy.device import on_device_of

_SAME = 1e-3
"""Relative change of a norm, seen along the same vectors, that no rounding explains."""


@dataclass
class Constrained(Assigned):
    """One array under a rule."""

    assignment: Assignment
    array: Array
    state: State | None = None
    drifting: bool = False
    """Of a forward rule: whether steps have changed the array since its vectors advanced."""

    def start(self) -> State:
        """The rule's state for the array as it is."""
        state: State = self.rule.init(self.array, self.geometry, self.name)
        return state

    def prepare(self) -> None:
        """Let a forward rule find its vectors; an array that is not finite waits for a step."""
        with contextlib.suppress(NonFiniteError), on_device_of(self.array):
            self.state = self.start()
            self.drifting = False

    def used(self, step: int) -> Array:
        """What a forward pass before this step uses; the array itself where it is not finite."""
        with on_device_of(self.array):
            if self.state is None or self._is_written_to():
                self.state = None
                self.prepare()
            if self.state is None:
                return self.array
            return self.rule.apply(self.array, self.geometry, self.state, step=step, name=self.name)

    def _is_written_to(self) -> bool:
        """Whether the norm along the vectors is not what it was: a checkpoint, an average."""
        follow = self.rule.tracked(self.geometry)
        if self.drifting or follow is None:
            return False
        assert self.state is not None
        xp = arrays.namespace(self.array)
        norms = follow.norms(arrays.to_compute(xp, self.array), self.state)
        # A norm that is not finite is for the next step to report.
        changed = [
            xp.any(xp.abs(now - then) > _SAME * xp.abs(then))
            for now, then in zip(norms, follow.measured(self.state), strict=True)
        ]
        return any(bool(flag) for flag in changed)

    def norm(self, step: int) -> dict[str, Any]:
        """The norm now, for a report: exact where it can be, else a certified upper bound."""
        w = self.used(step) if self.stage == "forward" else self.array
        with on_device_of(w):
            return measured(w, self.geometry, self.rule)

    def state_dict(self) -> dict[str, Any]:
        """Copies of the rule's state, on the array's device."""
        with on_device_of(self.array):
            state = None if self.state is None else copy.deepcopy(self.state)
        return {"state": state, "drifting": self.drifting}

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Restore `state_dict`, whose arrays may be on the host."""
        state = saved["state"]
        with on_device_of(self.array):
            self.state = state and {k: self._onto(v) for k, v in state.items()}
        self.drifting = bool(saved.get("drifting", False))

    def check_state(self, saved: Mapping[str, Any]) -> None:
        """Raise if `saved` cannot be this array's: before anything is changed."""
        try:
            state = saved["state"]
            shapes = {key: tuple(x.shape) for key, x in state.items()} if state else {}
        except (KeyError, TypeError, AttributeError):
            raise AdapterError(
                f"{self.name}: the state is no dict of arrays under the entry 'state'"
            ) from None
        if self.stage != "forward" or not self.state or not state:
            return
        expected = {key: tuple(x.shape) for key, x in self.state.items()}
        if shapes != expected:
            raise AdapterError(f"{self.name}: the state has {shapes}, expected {expected}")

    def _onto(self, value: Array) -> Array:
        same = type(value) is type(self.array)
        if same and arrays.device_of(value) == arrays.device_of(self.array):
            return copy.deepcopy(value)
        complex_ = arrays.is_complex(value)
        return arrays.constant(arrays.to_numpy(value), self.array, complex=complex_)
