"""`Spectral`: a plan that follows the steps of `fit`."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import keras

from specops import Plan
from specops.errors import AdapterError, HookLostWarning
from specops.training.assigned import check_saved
from specops.training.history import History, Record
from specops.training.plan import Assignment, override_geometries
from specops.training.report import Report, measured, plan_rows
from specops_keras.firing import Constrained, fire
from specops_keras.variables import Variable, locate, override

_POLICIES = ("raise", "skip", "warn")


class Spectral(keras.callbacks.Callback):
    """Rules on singular values that act after the optimizer's steps, as a callback of `fit`.

    ``model.fit(x, y, callbacks=[Spectral(ClipSpectralNorm(1.0), every=10)])``. Put it before
    callbacks that save the model. After the last batch of `fit` it acts once more, certified.
    `specops.attach` returns one that is bound already: hand it to `fit`, or call `step` after
    each ``train_on_batch``.

    Parameters
    ----------
    rule_or_plan : rule or Plan
        Of stage "weights". A bare rule acts on every weight it can. Patterns are matched
        against the path of the variable inside the model: "dense/kernel".
    every : int, optional
        Act at every so many steps; default: the plan's own interval.
    geometries : dict of str to Dense or Conv, optional
        Patterns of paths, and the maps they stand for, where the inferred one is missing or
        wrong.
    on_nonfinite : "raise", "skip" or "warn"
        What to do about a weight that holds NaN or infinity.
    history : int
        Records kept.
    log : callable or SummaryWriter, optional
        Told of every record.

    Raises
    ------
    PlanError
        The plan does not fit the model: at binding, so from `fit` before the first step.
    AdapterError
        A rule of another stage than "weights", a model that is not built, or distributed.
    NonFiniteError
        At a firing, with every weight left as it was.

    Notes
    -----
    A step is one of ``optimizer.iterations``: batches that loss scaling skips and batches that
    gradients are accumulated over do not count, and a model that is loaded with its optimizer
    goes on counting. Where several steps run between two callbacks (``steps_per_execution``),
    rules that were due in between act once, after them.
    """

    def __init__(
        self,
        rule_or_plan: Any,
        *,
        every: int | None = None,
        geometries: Mapping[str, Any] | None = None,
        on_nonfinite: str = "raise",
        history: int = 10_000,
        log: Any = None,
    ) -> None:
        super().__init__()
        self._model: Any = None
        if on_nonfinite not in _POLICIES:
            raise ValueError(f"on_nonfinite must be one of {_POLICIES}, got {on_nonfinite!r}")
        self.plan = Plan.of(rule_or_plan, every)
        for _, rule, *_ in self.plan.entries:
            if rule is not None and rule.stage != "weights":
                raise AdapterError(
                    f"{rule!r} is of stage {rule.stage!r}, but Keras compiles the forward pass "
                    f"and the gradient into one function of the model's own variables, which has "
                    f"no place for a rule's vectors. Use a rule that acts after the step, such as "
                    f"ClipSpectralNorm, or train with specops_torch or specops_jax"
                )
        self.steps = 0
        self._geometries, self._on_nonfinite = dict(geometries or {}), on_nonfinite
        self._history = History(history)
        if log is not None:
            self._history.tell(log)
        self._optimizer: Any = None
        self._manual = False
        self._batches, self._ahead = 0, None  # type: int, int | None
        self._assignments: list[Assignment] = []
        self._constrained: list[Constrained] = []

    def bind(self, model: Any, optimizer: Any = None) -> None:
        """Decide about every weight of a built model; without an optimizer `step` just counts."""
        self._optimizer, self._manual = optimizer, optimizer is None
        self._assign(model)
        self.steps = self._iterations() or 0

    def set_model(self, model: Any) -> None:
        """Called by `fit`."""
        if self._model is not None and self._model is not model:
            raise AdapterError(
                f"this callback is bound to model {self._model.name!r} and cannot follow "
                f"{model.name!r}: make one for each model, or detach() it first"
            )
        self._assign(model)

    def _assign(self, model: Any) -> None:
        """Take a model on; those constrained before keep their states and sizes."""
        previous, self._model = self._model, model
        try:
            variables, assignments = self._decide(self.model)
        except BaseException:
            self._model = previous
            raise
        kept = {c.name: c for c in self._constrained}
        for c in self._constrained:
            if c.at.recorder is not None:
                c.at.recorder.unwatch(c.at.layer)
        self._assignments, self._constrained = assignments, []
        for at, a in zip(variables, assignments, strict=True):
            if a.rule is None:
                continue
            before = kept.get(a.weight.name)
            if before is not None and before.at.variable is not at.variable:
                before = None
            self._constrained.append(Constrained(at, a, None if before is None else before.state))
            if at.recorder is not None:
                at.recorder.watch(at.layer)
                if before is not None and before.at.recorder is not None:
                    at.recorder.see(before.at.recorder.grid)

    def _decide(self, model: Any) -> tuple[list[Variable], list[Assignment]]:
        if keras.distribution.distribution() is not None:
            raise AdapterError("models under keras.distribution are not supported yet")
        if not model.built or not model.weights:
            raise AdapterError(
                f"model {model.name!r} has no weights yet: call it on data, or model.build(shape), "
                f"before attaching"
            )
        variables = locate(model)
        weights = override_geometries([v.weight for v in variables], self._geometries)
        return override(variables, weights), self.plan.assign(weights)

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        """Start counting from here: callbacks may have restored a checkpoint."""
        self.steps = self._iterations(fit=True) or 0
        self._look_ahead()

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        """Let the rules act that became due; look at the counter only when some may have."""
        # Not self.model: reading that brings its variables up to date (JAX), which takes time.
        self._batches += getattr(self._model, "steps_per_execution", 1)
        if self._ahead is not None and self._batches >= self._ahead - self.steps:
            self._advance(self._iterations(fit=True))
            self._look_ahead()

    def on_train_end(self, logs: Any = None) -> None:
        """Weights that `fit` leaves behind obey the rules."""
        self.steps, self._batches = self._iterations(fit=True) or self.steps, 0
        stop = self.plan.stop
        if self.plan.start < self.steps and (stop is None or self.steps < stop):
            self.enforce()

    def step(self) -> None:
        """Let the rules act that became due: after each step of a loop other than `fit`.

        With the optimizer that `specops.attach` was given its steps count, without one the
        calls do.
        """
        self._check_bound()
        self._advance(self.steps + 1 if self._manual else self._iterations())

    def enforce(self) -> None:
        """Let every rule act now, certified: after the last step, before an export."""
        self._check_bound()
        self._act(self._constrained, certain=True)

    @property
    def history(self) -> list[Record]:
        """The latest firings, oldest first: step, name and the rule's figures as floats."""
        return self._history.records()

    @property
    def is_attached(self) -> bool:
        """Whether it is bound to a model."""
        return self._model is not None

    @property
    def geometries(self) -> dict[str, Any]:
        """The maps of the constrained weights, by name, at the sizes seen so far."""
        return {c.name: c.at.geometry() for c in self._constrained}

    def report(self, *, measure: bool = True) -> Report:
        """Every weight of the model: constrained by what, or left alone and why.

        Norms are those of now: exact for matrices, a certified upper bound for convolutions.
        """
        self._check_bound()
        done = self._iterations()
        if done is not None and done != self.steps and not self._batches:
            warnings.warn(
                f"the optimizer has made {done} steps, of which this attachment saw "
                f"{self.steps}: pass it to fit(callbacks=[...]), or call its step()",
                HookLostWarning,
                stacklevel=2,
            )
        current, rows = {c.name: c for c in self._constrained}, []
        for row in plan_rows(self._assignments):
            if row.name in current:
                at = current[row.name].at
                row = replace(row, geometry=at.geometry().describe())
                if measure:
                    rule = current[row.name].assignment.rule
                    row = replace(row, **measured(at.read(), at.geometry(), rule))
            rows.append(row)
        return Report(tuple(rows))

    def state_dict(self) -> dict[str, Any]:
        """Steps, sizes and the rules' states as NumPy arrays, by the weights' names."""
        self._check_bound()
        weights = {c.name: c.saved() for c in self._constrained}
        return {"version": 1, "steps": self.steps, "weights": weights}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore `state_dict`; load the model, with its optimizer, first."""
        self._check_bound()
        check_saved(state, [c.name for c in self._constrained])
        for c in self._constrained:
            c.load(state["weights"][c.name])
        self.steps = int(state["steps"]) if self._manual else self._iterations() or 0

    def detach(self) -> None:
        """Let go of the model, whose weights stay as they are."""
        for c in self._constrained:
            if c.at.recorder is not None:
                c.at.recorder.unwatch(c.at.layer)
        self._constrained, self._assignments, self._model = [], [], None
        self._optimizer, self._manual = None, False

    def _check_bound(self) -> None:
        if self._model is None:
            raise AdapterError("not attached to a model: pass it to fit, or use specops.attach")

    def _iterations(self, *, fit: bool = False) -> int | None:
        """Steps of the optimizer so far; None without one."""
        optimizer = self._optimizer
        if fit or (optimizer is None and not self._manual):
            optimizer = getattr(self.model, "optimizer", None)
        if optimizer is None:
            return None
        return int(keras.ops.convert_to_numpy(optimizer.iterations))

    def _look_ahead(self) -> None:
        """Find the next step at which a rule is due; None if none ever is."""
        intervals = {c.assignment.every for c in self._constrained}
        last = max(self.steps, self.plan.start) + max(intervals, default=0)
        ahead = range(self.steps + 1, last + 1)
        fires = self.plan.fires
        self._ahead = next((s for s in ahead if any(fires(s, e) for e in intervals)), None)
        self._batches = 0

    def _due(self, step: int) -> list[Constrained]:
        return [c for c in self._constrained if self.plan.fires(step, c.assignment.every)]

    def _advance(self, step: int | None) -> None:
        if step is None:
            raise AdapterError("the model has no optimizer to follow: compile it")
        # A counter that went back is another one: an older checkpoint, a new optimizer.
        first = min(self.steps, step - 1) + 1 if step != self.steps else step + 1
        self.steps = step
        due = {c.name: c for s in range(first, step + 1) for c in self._due(s)}
        self._act(list(due.values()))

    def _act(self, due: list[Constrained], *, certain: bool = False) -> None:
        """Compute all, then write: an error leaves every weight as it was."""
        if not due:
            return
        self.model  # noqa: B018 - brings the variables up to date (JAX)
        for record in fire(due, max(self.steps, 1), self._on_nonfinite, certain=certain):
            self._history.add(record)
