"""One weight under a rule: the rule's state, the weight in use, its norm."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Generic, TypeVar

import array_api_compat as compat

from specops import arrays
from specops.errors import AdapterError, NonFiniteError, StateError
from specops.geometry import Geometry
from specops.tracking import are_alike, is_measured, norms_along, saw_zeros
from specops.training.assigned import Assigned
from specops.training.outcome import Outcome
from specops.training.parameter import Parameter
from specops.training.plan import Assignment
from specops.training.report import measured
from specops.typing import Array, State

P = TypeVar("P", bound=Parameter)
UNSEEN = "its layer has seen no input yet"
"""Why a rule that needs the size of an input leaves a weight alone."""


class Constrained(Assigned, Generic[P]):
    """One weight under a rule.

    Attributes
    ----------
    parameter : Parameter
        The weight as the adapter reads and writes it.
    state : dict of arrays or None
        The rule's state; None before its first firing.
    drifting : bool
        For a forward rule: whether steps have changed the weight since its vectors advanced.
        What anybody else has written shows in the norms along them, noted after the latest step.
    told : bool
        Whether the user was told that the rule waits for the size of an input.
    misfit : str
        Why the latest firing skipped this weight, which only a lenient pattern allows: its map
        does not fit, or the rule has no method for that map. Empty if the rule acted.
    """

    def __init__(self, parameter: P, assignment: Assignment) -> None:
        self.parameter, self.assignment = parameter, assignment
        self.state: State | None = None
        self.drifting, self.told, self.misfit = False, False, ""
        self._norms: Sequence[Array] | None = None

    @property
    def geometry(self) -> Geometry:
        """The map at the size that is known by now."""
        return self.parameter.geometry()

    @property
    def has_size(self) -> bool:
        """Whether the operator is one matrix, and not one for each size of an input."""
        return self.geometry.has_size

    @property
    def needs_size(self) -> bool:
        """Whether the rule follows an operator whose size is not known yet."""
        return self.rule.needs_input_size() and not self.has_size

    @property
    def idle(self) -> str:
        """Why the rule leaves the weight alone at present; empty if it does not."""
        reason = "" if self.stage == "forward" else self.parameter.frozen()
        return reason or (UNSEEN if self.needs_size else "")

    def is_of(self, parameter: P, assignment: Assignment) -> bool:
        """Whether a parameter, from a new listing of the model, is still this weight."""
        old, new = self.assignment.weight, assignment.weight
        if (new.shape, new.dtype) != (old.shape, old.dtype):
            return False
        return new.geometry == old.geometry or parameter.learns_size

    def resume(self, parameter: P, assignment: Assignment) -> None:
        """Go on with a parameter of a new listing, which `is_of` has accepted."""
        self.parameter.unwatch()
        parameter.watch()
        parameter.see(self.parameter.sizes())
        self.parameter, self.assignment = parameter, assignment

    def rename(self, name: str) -> None:
        """Go by another name, after layers were inserted or taken out."""
        weight = replace(self.assignment.weight, name=name)
        self.assignment = replace(self.assignment, weight=weight)

    def release(self) -> None:
        """Leave nothing behind on the model."""
        self.parameter.unwatch()

    # Firing

    def why_not(self, weight: Array) -> str:
        """A reason to leave the weight alone this time, or ""; raises if it is not finite."""
        reason = self.parameter.frozen()
        if not reason and self.needs_size:
            reason = UNSEEN
        if not reason and not bool(arrays.all_finite(arrays.namespace(weight), weight)):
            raise NonFiniteError("it holds NaN or infinity")
        return reason

    def start(self, weight: Array) -> State:
        """The rule's state for the weight as it is."""
        return self.rule.init(weight, self.geometry, self.name)

    def act(
        self, weight: Array, step: int, *, certain: bool
    ) -> tuple[Array, State, dict[str, Any]]:
        """What the rule gives: (array, new state, figures); certified with `certain`."""
        state = self.start(weight) if self.state is None or self._saw_zeros() else self.state
        act = self.weight_rule.enforce if certain else self.rule.update
        return act(weight, self.geometry, state, step=step, name=self.name)

    def keep(self, outcome: Outcome[Any]) -> None:
        """Store the result of a firing: the rule's state and, from a rule on weights, the array."""
        if outcome.array is None:
            return
        if outcome.changes_weight:
            with self.parameter.context():
                self.parameter.write(outcome.array)
        self.state, self.drifting = outcome.state, False

    # The weight in use

    def note_norms(self) -> None:
        """After a step: note the norms along vectors that have not advanced on the weight."""
        follow = self.rule.tracked(self.geometry) if self.drifting and self.state else None
        self._norms = None
        if follow is not None:
            assert self.state is not None
            with self.parameter.context():
                self._norms = norms_along(follow, self.parameter.read(), self.state)

    def prepare(self) -> None:
        """Let a forward rule find its vectors; one that is not finite is tried at a later step."""
        if self.needs_size:
            return
        with contextlib.suppress(NonFiniteError), self.parameter.context():
            self.state = self.start(self.parameter.read())
            self.drifting = False

    def used(self, step: int) -> Array:
        """What a forward pass before this step uses; the weight itself where it is not finite."""
        w = self.parameter.read()
        if self.stage != "forward":
            return w
        with self.parameter.context():
            if self.state is None or self._is_written_to(w):
                self.state = None
                self.prepare()
            if self.state is None:
                return w
            rule = self.forward_rule
            return rule.apply(w, self.geometry, self.state, step=step, name=self.name)

    def _is_written_to(self, w: Array) -> bool:
        """Whether the norm along the vectors has changed: by a loaded checkpoint, by averaging."""
        follow = self.rule.tracked(self.geometry)
        if follow is None or (self.drifting and (self._norms is None or self._saw_zeros())):
            return self._saw_zeros()
        assert self.state is not None
        # If the norm is not finite, the next step reports it.
        before = self._norms if self.drifting else None
        return not is_measured(follow, w, self.state, before=before)

    def _saw_zeros(self) -> bool:
        """Whether a forward rule's vectors come from a weight of zeros, such as a new head's."""
        if self.stage != "forward" or not self.state:
            return False
        follow = self.rule.tracked(self.geometry)
        return follow is not None and saw_zeros(follow, self.state)

    def measured(self, step: int) -> dict[str, Any]:
        """Its norm now, for a report: exact where it can be, else a certified upper bound."""
        w = self.used(step)
        with self.parameter.context():
            return measured(w, self.geometry, self.rule)

    # Checkpoints

    def state_dict(self) -> dict[str, Any]:
        """Copies of the rule's state, and the sizes seen; no vectors of an earlier weight."""
        state = self.state
        with self.parameter.context():
            if self.stage == "forward" and state and self._is_written_to(self.parameter.read()):
                state = None
            kept = None if state is None else {k: self.parameter.saved(x) for k, x in state.items()}
        return {"state": kept, "sizes": self.parameter.sizes(), "drifting": self.drifting}

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Restore `state_dict`, whose arrays may have been moved to the host since."""
        state = saved["state"]
        self.parameter.see(saved.get("sizes"))
        with self.parameter.context():
            self.state = state and {k: self.parameter.restored(x) for k, x in state.items()}
        self.drifting = bool(saved.get("drifting", False))
        self.note_norms()

    def check_state(self, saved: Mapping[str, Any]) -> None:
        """Raise if `saved` cannot be this weight's: before anything is changed."""
        try:
            state = saved["state"]
            found = {key: tuple(x.shape) for key, x in state.items()} if state else {}
        except (KeyError, TypeError, AttributeError):
            raise AdapterError(
                f"{self.name}: the state is no dict of arrays under the entry 'state'"
            ) from None
        wrong = [key for key, x in (state or {}).items() if _holds_nan(x)]
        if wrong:
            raise StateError(
                f"{self.name}: the state holds NaN in {', '.join(map(repr, wrong))}: it was saved "
                f"from a diverged run, or damaged since. Go on without it, or load another"
            )
        sizes, known = saved.get("sizes"), self.parameter.sizes()
        fields = [list(x) if isinstance(x, dict) else type(x) for x in (sizes, known)]
        if sizes is not None and known is not None and fields[0] != fields[1]:
            raise AdapterError(f"{self.name}: the state's sizes are damaged: {sizes!r}")
        if found:
            self._check_shapes(found)

    def _check_shapes(self, found: dict[str, tuple[int, ...]]) -> None:
        follow = self.rule.tracked(self.geometry)
        expected: Any = sorted(follow.kept) if follow is not None else []
        fits = all(key in found for key in expected)
        if fits and self.stage == "forward" and self.state:
            expected = {key: tuple(x.shape) for key, x in self.state.items()}
            fits = are_alike(found, expected)
        if not fits:
            raise AdapterError(
                f"{self.name}: the state has {found}, expected {expected}: it was saved under "
                f"another rule, or of another weight. A rule that is new in a run starts without a "
                f"state: leave load_state_dict out"
            )


def _holds_nan(x: Array) -> bool:
    # Not `isnan`: states may hold integers and booleans.
    return bool(compat.array_namespace(x).any(x != x))
