"""`Spectral`: a plan that follows the steps of `fit`."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import keras

from specops.authors import (
    AdapterError,
    BaseAttachment,
    CautionWarning,
    Constrained,
    HookLostWarning,
    Plan,
    Report,
)
from specops_keras.variables import Variable, averaging, locate


class Spectral(BaseAttachment[Constrained[Variable]], keras.callbacks.Callback):
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
        **options: Any,
    ) -> None:
        super().__init__(Plan.of(rule_or_plan, every), geometries, **options)
        keras.callbacks.Callback.__init__(self)
        for _, rule, *_ in self.plan.entries:
            self.check_rule(rule)
        self._optimizer: Any = None
        self._manual = False
        self._moved, self._stale = False, []  # type: bool, list[str]
        self._batches, self._ahead = 0, None  # type: int, int | None

    def check_rule(self, rule: Any) -> None:
        """Raise `AdapterError` unless it acts after the step."""
        if rule is not None and rule.stage != "weights":
            raise AdapterError(
                f"{rule!r} is of stage {rule.stage!r}, but Keras compiles the forward pass and "
                f"the gradient into one function of the model's own variables, which has no place "
                f"for a rule's vectors. Use a rule that acts after the step, such as "
                f"ClipSpectralNorm, or train with specops_torch or specops_jax"
            )
        super().check_rule(rule)

    def bind(self, model: Any, optimizer: Any = None) -> None:
        """Decide about every weight of a built model; without an optimizer `step` just counts."""
        self._optimizer, self._manual = optimizer, optimizer is None
        self._take_on(model)
        self.steps = self._iterations() or 0

    def set_model(self, model: Any) -> None:
        """Called by `fit`."""
        if self._model is not None and self._model is not model:
            raise AdapterError(
                f"this callback is bound to model {self._model.name!r} and cannot follow "
                f"{model.name!r}: make one for each model, or detach() it first"
            )
        self._take_on(model)

    def _take_on(self, model: Any) -> None:
        previous, self._model = self._model, model
        try:
            self.assign()
        except BaseException:
            self._model = previous
            raise

    def parameters(self) -> list[Variable]:
        """Every variable of the model."""
        model = self.model
        if keras.distribution.distribution() is not None:
            raise AdapterError("models under keras.distribution are not supported yet")
        if not model.built or not model.weights:
            raise AdapterError(
                f"model {model.name!r} has no weights yet: call it on data, or model.build(shape), "
                f"before attaching"
            )
        return locate(model)

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
        self.look()
        self._advance(self.steps + 1 if self._manual else self._iterations())

    def look(self) -> None:
        """Bring the variables up to date (JAX)."""
        if self._model is None:
            raise AdapterError("not attached to a model: pass it to fit, or use specops.attach")
        self.model  # noqa: B018

    def report(self, *, measure: bool = True) -> Report:
        """Every weight of the model: constrained by what, or left alone and why.

        Norms are those of now: exact for matrices, a certified upper bound for convolutions.
        """
        done = self._iterations() if self.is_attached else None
        if done is not None and done != self.steps and not self._batches:
            warnings.warn(
                f"the optimizer has made {done} steps, of which this attachment saw "
                f"{self.steps}: pass it to fit(callbacks=[...]), or call its step()",
                HookLostWarning,
                stacklevel=2,
            )
        return super().report(measure=measure)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore `state_dict`; load the model, with its optimizer, first."""
        super().load_state_dict(_of_today(state))
        if not self._manual:
            self.steps = self._iterations() or 0

    def detach(self, *, fold: bool = False) -> None:
        """Let go of the model, whose weights stay as they are: no rule here acts in a forward."""
        if self._moved and self._model is not None:
            self._stale = averaging(self._model)
        super().detach(fold=fold)
        self._model, self._optimizer, self._manual = None, None, False

    def write(self, outcomes: Sequence[Any]) -> None:
        """Write new weights, and remember that there were some."""
        super().write(outcomes)
        self._moved = self._moved or any(o.changes_weight for o in outcomes)

    def caution(self, act: str) -> None:
        """Warn where batch normalisation evaluates with statistics of other weights."""
        if self._stale:
            warnings.warn(
                f"{act}: the moving statistics of {', '.join(self._stale)} are of other weights "
                f"than the rules have left. Before evaluating or exporting, estimate them anew: "
                f"call model(batch, training=True) on some batches",
                CautionWarning,
                stacklevel=4,
            )

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

    def _advance(self, step: int | None) -> None:
        if step is None:
            raise AdapterError("the model has no optimizer to follow: compile it")
        # A counter that went back is another one: an older checkpoint, a new optimizer.
        first = min(self.steps, step - 1) + 1 if step != self.steps else step + 1
        self.steps = step
        due = {c.name: c for s in range(first, step + 1) for c in self.due("weights", s)}
        if due:
            self.look()
            self.fire(list(due.values()), max(step, 1))


def _of_today(state: Mapping[str, Any]) -> dict[str, Any]:
    """A state whose sizes have the name that they had first, "grid", with that of today."""
    weights = dict(state.get("weights", {}))
    for name, saved in weights.items():
        if isinstance(saved, Mapping) and "grid" in saved:
            weights[name] = {"sizes": saved["grid"]} | dict(saved)
    return {**state, "weights": weights}
