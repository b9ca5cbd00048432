"""`attach`: a plan that acts around every step of a torch optimizer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from specops.arrays import in_full_precision
from specops.geometry import Geometry
from specops.training.assigned import check_stage
from specops.training.attachment import BaseAttachment, without_gradient
from specops.training.firing import NonFinitePolicy
from specops.training.history import Record
from specops.training.plan import Assignment, Plan
from specops_torch.batch_norms import behind
from specops_torch.constrained import Constrained
from specops_torch.firing import add_terms, check_ran, stepped, with_gradient
from specops_torch.liveness import Liveness
from specops_torch.optimizer_hooks import Followed, overflowed
from specops_torch.parameters import Location, locate
from specops_torch.penalised import searching, with_penalty
from specops_torch.scales import Scales

_NEEDS = {"weights": "update", "gradients": "penalty", "forward": "apply"}


class Attachment(BaseAttachment[Constrained]):
    """A plan at work on a model. Made by `attach`; see there.

    Attributes
    ----------
    steps : int
        Successful optimizer steps since attaching (or since the state that was loaded).
    scales : dict of str to torch.nn.Parameter
        Trainable scales, by layer or, where shared, by rule.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer | None,
        model: nn.Module,
        plan: Plan,
        geometries: Mapping[str, Geometry] | None = None,
        **options: Any,
    ) -> None:
        super().__init__(plan, geometries, **options)
        self._model, self._followed = model, Followed(optimizer)
        self._scales, self._liveness = Scales(), Liveness()
        try:
            self.assign()
        except BaseException:
            for c in self._constrained:
                c.release()
            self._scales.withdraw(optimizer)
            raise
        self._followed.hook(self._before_step, self._after_step)
        self._liveness.seen(self._constrained)

    # The plan

    def parameters(self) -> list[Location]:
        """Every parameter of the model."""
        return locate(self._model, self._followed.parameters)

    def constrain(self, parameter: Location, assignment: Assignment) -> Constrained:
        """What is kept of a weight that a rule is to act on."""
        return Constrained(parameter, assignment)

    def check_rule(self, rule: Any) -> None:
        """Raise `AdapterError` if the rule has not what its stage needs here."""
        check_stage(rule, _NEEDS)

    def assign(self) -> None:
        """Decide about every parameter; those constrained before keep their state and sizes."""
        super().assign()
        for c in self._constrained:
            c.schedule(self.steps + 1)
        self._scales.give(self._constrained, self._followed.optimizer)
        self._followed.look()

    def drop(self, c: Constrained) -> None:
        """A layer whose weight was frozen, or taken out of the optimizer, goes on as it was."""
        reasons = [a.reason for a in self._assignments if a.weight.name == c.name]
        goes_on = c.in_use is not None and c.location.is_held_by(self._model)
        if goes_on and reasons and reasons[0].startswith(("frozen", "not in this optimizer")):
            self._constrained.append(c)
        else:
            c.release()

    @property
    def is_attached(self) -> bool:
        """Whether the optimizer's steps still reach this attachment."""
        return self._followed.calls_hooks

    @property
    def scales(self) -> dict[str, nn.Parameter]:
        """Trainable scales."""
        return dict(self._scales.parameters)

    @torch.no_grad()
    def before_step(self, parameter: nn.Parameter | None = None) -> None:
        """Let rules of stage "gradients" add to the gradients, before an optimizer's step.

        Only for ``attach(None, ...)``: of all parameters, or of one whose optimizer is about to
        step.
        """
        if parameter is None:
            self._add_gradients(self.steps + 1, self.due("gradients", self.steps + 1))
            return
        for c in self._owners(parameter):
            if c.stage == "gradients" and self.fires(c, c.steps + 1):
                self._add_gradients(c.steps + 1, [c])

    @torch.no_grad()
    def step(self, parameter: nn.Parameter | None = None) -> None:
        """Count one optimizer step and let the rules that are due act.

        Only for ``attach(None, ...)``; with an optimizer this runs by itself. All new weights
        are computed before the first is written, so an error leaves every weight as it was.

        Parameters
        ----------
        parameter : torch.nn.Parameter, optional
            The one that its own optimizer has just stepped, during the backward pass; each is
            counted for itself. None: all of them.
        """
        if parameter is not None:
            for c in self._owners(parameter):
                c.steps += 1
                self.steps = max(self.steps, c.steps)
                acts = c.stage != "gradients" and self.fires(c, c.steps)
                self._act([c] if acts else [], c.steps, [c])
            return
        if self._followed.optimizer is None:
            check_ran(self._constrained)
        changed = self._followed.has_changed()
        self.steps += 1
        if changed:
            self.assign()
        due = [*self.due("weights", self.steps), *self.due("forward", self.steps)]
        stepped(self._constrained)
        self._act(due, self.steps, self._constrained)
        self._liveness.seen(self._constrained)

    @torch.no_grad()
    def enforce(self) -> None:
        """Let every rule on weights act now, certified: after the last step, before an export."""
        super().enforce()
        self._liveness.seen(self._constrained)

    def weights(self) -> dict[str, torch.Tensor]:
        """The constrained weights as their layers use them, by name.

        Of rules of stage "forward" what they give, differentiable by the raw parameters; of
        others the parameters themselves.
        """
        return {c.name: c.used() for c in self._constrained}

    @torch.no_grad()
    def refresh(self) -> None:
        """Measure the weights of forward rules anew.

        For writes that torch does not count, through ``parameter.data`` or an array that shares
        its memory, and for any write before compiled code runs again: `torch.compile` does not
        look whether a weight was written to. Everything else is noticed at the next use.
        """
        for c in self._constrained:
            if c.in_use is not None:
                c.in_use.measure(c.location.parameter)

    def measured(self, constrained: Sequence[Constrained]) -> dict[str, dict[str, Any]]:
        """What a report says of weights, and of them with the batch normalisation behind them."""
        normalized = behind(self._model) if constrained else {}
        return {c.name: c.norm(normalized.get(id(c.location.module), [])) for c in constrained}

    def state_dict(self) -> dict[str, Any]:
        """Steps, sizes, scales and rule states by parameter name: what a resumed run needs."""
        return super().state_dict() | {"scales": self._scales.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned; see `BaseAttachment.load_state_dict`."""
        self.check_state(state)
        self._scales.check(state.get("scales", {}))
        self._load(state)
        for c in self._constrained:
            c.schedule(self.steps + 1)
        self._scales.load_state_dict(state.get("scales", {}))
        self._liveness.seen(self._constrained)

    @torch.no_grad()
    def detach(self, *, fold: bool = False) -> None:
        """Stop acting and remove every hook, and trainable scales from the optimizer.

        Parameters
        ----------
        fold : bool
            Write the weights that forward rules let their layers use into the parameters: the
            plain model then computes the same. Otherwise all weights stay as they are.
        """
        if fold:
            self._fold()
        self._followed.unhook()
        for c in self._constrained:
            c.release()
        self._scales.withdraw(self._followed.optimizer)
        self._attached = False

    def _owners(self, parameter: nn.Parameter) -> list[Constrained]:
        return [c for c in self._constrained if c.location.parameter is parameter]

    @in_full_precision
    def _act(self, due: list[Constrained], step: int, stepped: list[Constrained]) -> None:
        """After a step: weights first, then the vectors of what forward passes will use."""
        for c in stepped:
            c.refuse_sharded(self._model)
        for c in stepped:
            if c.in_use is not None:
                c.in_use.stepped(c.location.parameter)
        try:
            self.fire(due, step)
        finally:
            for c in stepped:
                c.schedule(step + 1)
            if self._followed.optimizer is not None:
                self._scales.forget_gradients()

    @in_full_precision
    def _add_gradients(
        self, step: int, due: list[Constrained], scale: torch.Tensor | None = None
    ) -> None:
        outcomes = self._firing.compute(with_gradient(due), step)
        add_terms(outcomes, scale)
        self._record(without_gradient(c, step) for c in due if c.location.parameter.grad is None)
        self._record(o.record for o in outcomes)

    @torch.compiler.disable
    @torch.no_grad()
    def _before_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> Any:
        if self._followed.has_changed():
            self.assign()
        check_ran(self._constrained)
        for c in self._constrained:
            c.refuse_sharded(self._model)
            # What is written from now to the end of the step is the step.
            if c.in_use is not None and not c.in_use.is_fresh(c.location.parameter):
                c.in_use.forget()
        due = self.due("gradients", self.steps + 1)
        # The first argument is the optimizer.
        closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
        if closure is not None:
            wrapped = searching(closure, self._constrained)
            if due:
                # The closure will erase what is added now.
                outcomes = self._firing.compute(due, self.steps + 1)
                wrapped = with_penalty(wrapped, outcomes, self.steps + 1)
                self._record(o.record for o in outcomes)
            if "closure" in kwargs:
                return args, {**kwargs, "closure": wrapped}
            return (args[0], wrapped, *args[2:]), kwargs
        if due and not overflowed(optimizer):
            # A fused optimizer under GradScaler divides by this in its step.
            scale = getattr(optimizer, "grad_scale", None)
            self._add_gradients(self.steps + 1, due, scale)
        return None

    @torch.compiler.disable
    def _after_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        if not overflowed(optimizer):
            self.step()

    def look(self) -> None:
        """Warn if weights move, but no step is seen."""
        if self._followed.has_hooks:
            self._liveness.check(self._constrained, self.steps)


def attach(
    optimizer: torch.optim.Optimizer | None,
    model: nn.Module,
    rule_or_plan: Any,
    *,
    every: int | None = None,
    geometries: Mapping[str, Geometry] | None = None,
    on_nonfinite: NonFinitePolicy = "raise",
    history: int = 10_000,
    log: Callable[[Record], Any] | Any = None,
) -> Attachment:
    """Make a rule, or a plan, act on a torch model around the optimizer's steps.

    Rules of stage "weights" act after a step, those of stage "gradients" before it. Under rules of
    stage "forward" layers answer their attribute with the weight in use, computed whenever it is
    read, while parameters and state_dict stay the plain model's.

    Parameters
    ----------
    optimizer : torch.optim.Optimizer or None
        Its step hooks run the rules; None: call ``attachment.step()`` yourself after each
        step, and ``attachment.before_step()`` before it for rules of stage "gradients".
    model : torch.nn.Module
        The layers tell which map a weight is. Convolutions are watched for the largest input
        they see; one that did not run yet is constrained for every size.
    rule_or_plan, every, geometries
        As `specops.attach`.
    on_nonfinite : "raise", "skip" or "warn"
        What to do about a weight that holds NaN or infinity. It is left as it was in any case;
        "raise" leaves all others as they were, too.
    history : int
        Records kept.
    log : callable or SummaryWriter, optional
        As `Attachment.log_to`.

    Returns
    -------
    Attachment
        Which holds the only state: neither the model nor the optimizer gets buffers, and
        pickling or copying an optimizer drops its hooks (torch's own behaviour), so attach
        again after loading and hand over ``state_dict()``.

    Raises
    ------
    PlanError, AdapterError, UnsupportedArrayError
        A plan that does not fit, sharded parameters, lazy or meta parameters.

    Notes
    -----
    Parameters without gradients, of other optimizers, with fewer than two axes or tied to an
    earlier one are left alone and listed in the report; freezing a layer or adding a parameter
    group later is noticed at the next step. Project before averaging (EMA).

    Under a forward rule the layer's class becomes a subclass of itself in which the attribute is a
    property; what is written to the attribute reaches the parameter. Writes to a parameter are
    noticed by the version that torch counts: those through ``parameter.data`` or a NumPy view, and
    any before compiled code runs again, need `Attachment.refresh`. A write from outside in every
    step costs a decomposition of the weight each time. ``model.get_parameter(name)`` refuses what
    is no parameter: take it from ``named_parameters()``.
    """
    return Attachment(
        optimizer,
        model,
        Plan.of(rule_or_plan, every),
        geometries,
        on_nonfinite=on_nonfinite,
        history=history,
        log=log,
    )
