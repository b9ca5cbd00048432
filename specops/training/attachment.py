"""`BaseAttachment`: all of an attachment except listing, reading and writing a model's weights."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, MutableMapping, Sequence
from dataclasses import replace
from typing import Any, Generic, TypeVar, cast

from specops import arrays
from specops.errors import AdapterError, SpecopsError
from specops.geometry import Geometry
from specops.rules.base import Stage, check_stages
from specops.training.assigned import check_saved, check_stage, inactive
from specops.training.assigning import assigned
from specops.training.constrained import Constrained
from specops.training.declared import declared
from specops.training.firing import Firing, NonFinitePolicy, write
from specops.training.history import History, Record
from specops.training.outcome import Outcome
from specops.training.parameter import Parameter
from specops.training.plan import Assignment, Plan
from specops.training.report import Report, geometry_text, plan_rows
from specops.typing import Array

C = TypeVar("C", bound=Constrained[Any])
_NEEDS = {"weights": "update", "gradients": "update", "forward": "apply"}


class BaseAttachment(ABC, Generic[C]):
    """A plan at work on a model; see `specops.training.protocol.Attachment` for its public side.

    An adapter writes `parameters`, calls `assign` when the model is at hand, and lets something
    call `step` after each step of the optimizer. If it claims more `stages`, it also lets
    something call `before_step` with the gradients, and its layers use what `weights` gives. In
    `detach` it removes its hooks from the framework: a detached attachment raises in `step`.

    Parameters
    ----------
    plan : Plan
        Which rules act on which weights, and when.
    geometries : dict of str to Dense or Conv, optional
        Maps that the user declares, by patterns of names.
    on_nonfinite : "raise", "skip" or "warn"
        What to do about a weight that holds NaN or infinity.
    history : int
        How many records to keep.
    log : callable or SummaryWriter, optional
        Receives every record, as with `log_to`.
    """

    stages: tuple[Stage, ...] = ("weights",)
    """The stages whose rules it runs; other rules are refused."""

    def __init__(
        self,
        plan: Plan,
        geometries: Mapping[str, Geometry] | None = None,
        *,
        on_nonfinite: NonFinitePolicy = "raise",
        history: int = 10_000,
        log: Any = None,
    ) -> None:
        self.plan, self.steps = plan, 0
        self._firing: Firing[C] = Firing(on_nonfinite)
        self._history = History(history)
        if log is not None:
            self._history.tell(log)
        self._geometries = declared(geometries)
        self._assignments: list[Assignment] = []
        self._constrained: list[C] = []
        self._attached = False

    # Methods that an adapter writes or overrides

    @abstractmethod
    def parameters(self) -> Sequence[Parameter]:
        """Every parameter of the model as it is now."""

    def constrain(self, parameter: Any, assignment: Assignment) -> C:
        """The object that keeps a weight on which a rule is to act, and the rule's state."""
        return cast(C, Constrained(parameter, assignment))

    def check_rule(self, rule: Any) -> None:
        """Raise `AdapterError` if the adapter cannot run such a rule; None passes."""
        check_stage(rule, {stage: _NEEDS[stage] for stage in check_stages(self.stages)})
        if rule is not None and rule.stage == "forward" and rule.trained_scale() is not None:
            raise AdapterError(
                f"{rule!r}: arrays have no automatic differentiation to train a scale with; give a "
                f"number or a schedule"
            )

    def goes_on(self, c: C, decided: Assignment) -> bool:
        """Whether a weight that no rule acts on any more stays as the rule left it."""
        return False

    def look(self) -> None:
        """Called before weights are looked at: an adapter may list them anew."""
        self.check_attached()

    def check_attached(self) -> None:
        """Raise `AdapterError` before the first `assign`, and once detached."""
        if not self._attached:
            raise inactive(was_assigned=bool(self._assignments))

    def caution(self, act: str) -> None:
        """Called after `project`: an adapter warns of what still depends on the old weights."""

    # The plan

    def assign(self) -> None:
        """Decide about every parameter; those constrained before keep their states and sizes."""
        self._assignments, self._constrained = assigned(
            self, self._geometries, self._constrained, again=self._attached
        )
        self._attached = True

    # Steps

    def step(self) -> None:
        """Count one step of the optimizer and let the rules that are due act.

        All new weights are computed before the first is written, so an error leaves every
        weight as it was.

        Raises
        ------
        NonFiniteError
            A weight holds NaN or infinity, and the policy is to raise.
        AdapterError
            The attachment is detached, or a weight cannot be written to.
        """
        self.look()
        self.steps += 1
        for c in self._constrained:
            c.drifting = c.stage == "forward"
        self.fire([*self.due("weights", self.steps), *self.due("forward", self.steps)], self.steps)
        for c in self._constrained:
            c.note_norms()

    def before_step(self, gradients: MutableMapping[str, Any]) -> None:
        """Let rules of stage "gradients" add to gradients, before the optimizer's step.

        Parameters
        ----------
        gradients : dict of arrays
            Gradients under the weights' names, whose entries this method replaces. A weight
            that has no gradient is left out.

        Raises
        ------
        NonFiniteError
            As in `step`.
        """
        self.look()
        self._penalise(gradients)

    def enforce(self) -> None:
        """Let every rule on weights act now, certified: after the last step, before an export."""
        self.look()
        due = [c for c in self._constrained if c.stage == "weights"]
        self.fire(due, max(self.steps, 1), certain=True)

    def fires(self, c: C, step: int) -> bool:
        """Whether a rule acts at a step."""
        if c.stage == "forward":
            # The rule acts in every forward pass, so its vectors never stop.
            return (step - self.plan.start) % c.assignment.every == 0
        return self.plan.fires(step, c.assignment.every)

    def due(self, stage: Stage, step: int) -> list[C]:
        """The weights on which rules of a stage act at a step."""
        return [c for c in self._constrained if c.stage == stage and self.fires(c, step)]

    def fire(self, due: Sequence[C], step: int, *, certain: bool = False) -> None:
        """Let rules act: all are computed, then all is written."""
        outcomes = self._firing.compute(due, step, certain=certain)
        self.write(outcomes)
        self._record(o.record for o in outcomes)

    def write(self, outcomes: Sequence[Outcome[C]]) -> None:
        """Write new weights and keep the states of rules."""
        write(outcomes)

    def add(self, gradient: Any, term: Array) -> Any:
        """The sum of a gradient and a rule's term."""
        return gradient + arrays.namespace(term).astype(term, gradient.dtype)

    def _penalise(self, gradients: MutableMapping[str, Any]) -> None:
        step = self.steps + 1
        due = self.due("gradients", step)
        outcomes = self._firing.compute([c for c in due if c.name in gradients], step)
        self._record(without_gradient(c, step) for c in due if c.name not in gradients)
        for o in outcomes:
            if o.array is not None:
                with o.constrained.parameter.context():
                    gradients[o.constrained.name] = self.add(gradients[o.constrained.name], o.array)
            o.constrained.keep(o)
        self._record(o.record for o in outcomes)

    def _record(self, records: Iterable[Record]) -> None:
        for record in records:
            self._history.add(record)

    # Information for the user

    def __repr__(self) -> str:
        by_itself = "attached" if self.is_attached else "to be stepped by hand"
        status = by_itself if self._attached else "detached"
        weights = f"{len(self._constrained)} weights"
        return f"<{type(self).__name__}: {weights}, step {self.steps}, {status}>"

    @property
    def is_attached(self) -> bool:
        """Whether it acts: `detach` was not called yet."""
        return self._attached

    @property
    def history(self) -> list[Record]:
        """The latest firings, oldest first: step, name and the rule's figures as floats."""
        return self._history.records()

    def log_to(self, listener: Any) -> None:
        """Hand each firing's figures to a callable or a TensorBoard ``SummaryWriter``.

        Figures then leave their device at every firing.
        """
        self._history.tell(listener)

    def weights(self) -> dict[str, Any]:
        """The constrained weights as their layers use them, by name.

        Of rules of stage "forward" what they give, of others the weights themselves.
        """
        self.look()
        return {c.name: c.used(self.steps + 1) for c in self._constrained}

    def geometries(self) -> dict[str, Geometry]:
        """The map that each of `weights` is, at the sizes that convolutions have seen."""
        return {c.name: c.geometry for c in self._constrained}

    def report(self, *, measure: bool = True) -> Report:
        """Every parameter of the model: constrained by what, or left alone and why.

        With `measure`, constrained weights show their operator norm as it is now (of forward
        rules: of the weight in use): exact for matrices, small layers and circular convolutions
        whose stride divides their grid, a certified upper bound for others. Adapters that let go
        of the model in `detach` measure nothing after it.
        """
        if self._attached or not self._assignments:
            self.look()
        misfits = {c.name: c.misfit for c in self._constrained if c.misfit}
        assignments = [
            replace(a, rule=None, reason=misfits[a.weight.name]) if a.weight.name in misfits else a
            for a in self._assignments
        ]
        acting = {a.weight.name for a in assignments if a.rule is not None}
        found = self.measured([c for c in self._constrained if c.name in acting and measure])
        for c in self._constrained:
            text = geometry_text(c.geometry, c.assignment.weight.remark)
            found.setdefault(c.name, {}).update(geometry=text, idle=c.idle)
        for a in assignments:
            if a.rule is not None and self._is_waiting(a):
                found.setdefault(a.weight.name, {})["waits"] = self.plan.start + a.every
        rows = [replace(row, **found.get(row.name, {})) for row in plan_rows(assignments)]
        return Report(tuple(rows))

    def _is_waiting(self, a: Assignment) -> bool:
        """Whether training has begun, but has not reached the first step at which the rule acts."""
        assert a.rule is not None
        return a.rule.stage != "forward" and 0 < self.steps < self.plan.start + a.every

    def under_rules(self) -> Sequence[C]:
        """The weights under a rule; none once detached."""
        return tuple(self._constrained) if self._attached else ()

    def measured(self, constrained: Sequence[C]) -> dict[str, dict[str, Any]]:
        """What a report's rows say about weights under rules, by name."""
        return {c.name: c.measured(self.steps + 1) for c in constrained}

    # Saving, loading and detaching

    def state_dict(self) -> dict[str, Any]:
        """Steps, sizes and rule states by parameter name: what a resumed run needs."""
        self.look()
        weights = {c.name: c.state_dict() for c in self._constrained}
        return {"version": 1, "steps": self.steps, "weights": weights}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned; names must be those constrained here.

        Load the model first: vectors of forward rules are checked against its weights.

        Raises
        ------
        AdapterError
            The state is of another version, of other names, or of vectors of other shapes.
            Nothing is changed then.
        StateError
            Its vectors hold NaN. Nothing is changed then either.
        """
        self.look()
        self.check_state(state)
        self._load(state)

    def check_state(self, state: Mapping[str, Any]) -> None:
        """Raise if a saved state cannot be this attachment's: before anything is changed."""
        self.check_attached()
        check_saved(state, [c.name for c in self._constrained], self._assignments)
        for c in self._constrained:
            c.check_state(state["weights"][c.name])

    def _load(self, state: Mapping[str, Any]) -> None:
        self.steps = int(state["steps"])
        for c in self._constrained:
            c.load_state_dict(state["weights"][c.name])

    def detach(self, *, fold: bool = False) -> None:
        """Stop acting and let go of the model.

        Parameters
        ----------
        fold : bool
            Write the weights that forward rules compute for the layers into the model, which
            then gives the same outputs without specops. Otherwise all weights stay as they are.
        """
        if fold:
            self.look()
            self._fold()
        for c in self._constrained:
            c.release()
        self._constrained, self._attached = [], False

    def _fold(self) -> None:
        used = []
        for c in (c for c in self._constrained if c.stage == "forward"):
            c.parameter.check_writable()
            try:
                used.append((c, c.used(self.steps + 1)))
            except SpecopsError as error:
                reason = str(error).removeprefix(f"{c.name}: ")
                raise type(error)(f"{c.name} (no weight was folded): {reason}") from error
        for c, weight in used:
            with c.parameter.context():
                c.parameter.write(weight)


def without_gradient(c: Constrained[Any], step: int) -> Record:
    """The record of a weight that has no gradient, because the loss does not depend on it."""
    return {"step": step, "name": c.name, "skipped": "no gradient"}
