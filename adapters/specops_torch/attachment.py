"""`attach`: a plan that acts around every step of a torch optimizer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import nn

from specops.arrays import in_full_precision
from specops.errors import AdapterError, GeometryError, SpecopsError
from specops.geometry import Geometry
from specops.training.assigned import check_saved, check_stage, warn_of
from specops.training.history import History
from specops.training.plan import Assignment, Plan, override_geometries
from specops.training.report import Report, plan_rows
from specops_torch.batch_norms import behind
from specops_torch.constrained import Constrained
from specops_torch.firing import Firing, Record, check_ran, stepped
from specops_torch.liveness import Liveness
from specops_torch.parameters import locate, refuse_sharded, refuse_sharded_model
from specops_torch.penalised import searching, with_penalty
from specops_torch.scales import Scales

NonFinitePolicy = Literal["raise", "skip", "warn"]


class Attachment:
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
        *,
        on_nonfinite: NonFinitePolicy = "raise",
        history: int = 10_000,
        log: Any = None,
    ) -> None:
        if on_nonfinite not in ("raise", "skip", "warn"):
            raise ValueError(
                f'on_nonfinite must be "raise", "skip" or "warn", got {on_nonfinite!r}'
            )
        if optimizer is not None and not hasattr(optimizer, "register_step_post_hook"):
            raise AdapterError(
                f"{type(optimizer).__name__} is no torch optimizer: pass the wrapped one "
                f"(accelerate: .optimizer), or None and call attachment.step() yourself"
            )
        self.plan = plan
        self.steps = 0
        self._firing = Firing(on_nonfinite, self._misfit)
        self._history = History(history)
        if log is not None:
            self._history.tell(log)
        self._model, self._optimizer = model, optimizer
        self._geometries = dict(geometries or {})
        self._constrained: list[Constrained] = []
        self._assignments: list[Assignment] = []
        self._scales = Scales()
        self._held = _held(optimizer)
        try:
            self._assign()
        except BaseException:
            for c in self._constrained:
                c.release()
            self._scales.withdraw(optimizer)
            raise
        self._hooks: list[Any] = []
        if optimizer is not None:
            self._hooks = [
                optimizer.register_step_pre_hook(self._before_step),
                optimizer.register_step_post_hook(self._after_step),
            ]
        self._liveness = Liveness()
        self._liveness.seen(self._constrained)

    def _assign(self) -> None:
        """Decide about every parameter; those constrained before keep their state and sizes."""
        trained = None if self._held is None else list(self._held.values())
        locations = locate(self._model, trained)
        weights = override_geometries(
            [at.weight for at in locations],
            self._geometries,
            aliases={at.weight.name: at.aliases for at in locations},
        )
        assignments = self.plan.assign(weights)
        for assignment in assignments:
            check_stage(assignment.rule, _NEEDS)
        before = {c.name: c for c in self._constrained}
        self._assignments, self._constrained = assignments, []
        for location, weight, assignment in zip(locations, weights, assignments, strict=True):
            if assignment.rule is None:
                continue
            kept = before.pop(weight.name, None)
            if kept is not None and kept.location.module is location.module:
                kept.assignment = assignment
                self._constrained.append(kept)
                continue
            if kept is not None:
                kept.release()
            if weight is location.weight:
                location.watch()
            location.weight = weight
            warn_of(assignment, stacklevel=6)
            constrained = Constrained(location, assignment)
            self._constrained.append(constrained)
            if constrained.stage == "forward":
                try:
                    constrained.read_forward()
                except SpecopsError as error:
                    raise type(error)(f"{weight.name}: {error}") from error
                constrained.schedule(self.steps + 1)
                # Gradients that are there already were not made under the rule.
                stepped([constrained])
        for dropped in before.values():
            if dropped.in_use is not None and self._still_there(dropped):
                # Frozen, or taken out of the optimizer: its layer goes on as it was.
                self._constrained.append(dropped)
            else:
                dropped.release()
        self._scales.give(self._constrained, self._optimizer)
        self._held = _held(self._optimizer)
        self._trained = {key for key, p in (self._held or {}).items() if p.requires_grad}

    def _still_there(self, c: Constrained) -> bool:
        """Whether the model still holds a weight that the plan would have under its rule."""
        held = any(m is c.location.module for m in self._model.modules())
        if not held or c.location.module._parameters.get(c.location.attribute) is None:
            return False
        rows = [a for a in self._assignments if a.weight.name == c.name]
        return bool(rows) and rows[0].reason.startswith(("frozen", "not in this optimizer"))

    def __repr__(self) -> str:
        status = "attached" if self.is_attached else "detached"
        return f"<Attachment: {len(self._constrained)} weights, step {self.steps}, {status}>"

    @property
    def is_attached(self) -> bool:
        """Whether the optimizer's steps still reach this attachment."""
        if not self._hooks:
            return False
        for hook in self._hooks:
            hooks = hook.hooks_dict_ref()
            if hooks is None or hook.id not in hooks:
                return False
        return True

    @property
    def history(self) -> list[Record]:
        """The latest firings, oldest first: step, name and the rule's figures as floats."""
        return self._history.records()

    @property
    def scales(self) -> dict[str, nn.Parameter]:
        """Trainable scales."""
        return dict(self._scales.parameters)

    def log_to(self, listener: Any) -> None:
        """Hand each firing's figures to a callable or a TensorBoard ``SummaryWriter``.

        Figures then leave their device at every firing.
        """
        self._history.tell(listener)

    @torch.no_grad()
    def before_step(self, parameter: nn.Parameter | None = None) -> None:
        """Let rules of stage "gradients" add to the gradients, before an optimizer's step.

        Only for ``attach(None, ...)``: of all parameters, or of one whose optimizer is about to
        step.
        """
        if parameter is None:
            self._add_gradients(self.steps + 1, self._of("gradients", self.steps + 1))
            return
        for c in self._owners(parameter):
            if c.stage == "gradients" and self._fires(c, c.steps + 1):
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
                self._act([c] if self._fires(c, c.steps) else [], c.steps, [c])
            return
        if self._optimizer is None:
            check_ran(self._constrained)
        held = _held(self._optimizer)
        changed = self._is_new(held)
        self.steps += 1
        if changed:
            self._held = held
            self._assign()
        due = [c for c in self._constrained if self._fires(c, self.steps)]
        stepped(self._constrained)
        self._act(due, self.steps, self._constrained)
        self._liveness.seen(self._constrained)

    @torch.no_grad()
    def enforce(self) -> None:
        """Let every rule on weights act now, certified: after the last step, before an export."""
        self._check_alive()
        due = [c for c in self._constrained if c.stage == "weights"]
        records, commit = self._firing.weights(due, max(self.steps, 1), certain=True)
        commit()
        self._record(records)
        self._liveness.seen(self._constrained)

    def weights(self) -> dict[str, torch.Tensor]:
        """The constrained weights as their layers use them, by name.

        Of rules of stage "forward" what they give, differentiable by the raw parameters; of
        others the parameters themselves.
        """
        return {c.name: c.weight() for c in self._constrained}

    def geometries(self) -> dict[str, Geometry]:
        """The map that each of `weights` is, at the sizes that convolutions have seen."""
        return {c.name: c.geometry for c in self._constrained}

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

    def report(self, *, measure: bool = True) -> Report:
        """Every parameter of the model: constrained by what, or left alone and why.

        With `measure`, constrained weights show their operator norm as it is now (of forward
        rules: of the weight in use): exact for matrices and circular convolutions, a certified
        upper bound for zero-padded ones. Where batch normalisation is registered right behind a
        layer, the norm of both together, in evaluation, stands beside it: training can undo
        there what a rule does to the weight.
        """
        self._check_alive()
        current = {c.name: c for c in self._constrained}
        normalized = behind(self._model) if measure else {}
        rows = []
        for row in plan_rows(self._assignments):
            constrained = current.get(row.name)
            if constrained is not None:
                row = replace(row, geometry=constrained.geometry.describe())
                if measure and row.rule:
                    following = normalized.get(id(constrained.location.module), [])
                    row = replace(row, **constrained.norm(following))
            rows.append(row)
        return Report(tuple(rows))

    def state_dict(self) -> dict[str, Any]:
        """Steps, sizes, scales and rule states by parameter name: what a resumed run needs."""
        self._check_alive()
        return {
            "version": 1,
            "steps": self.steps,
            "weights": {c.name: c.state_dict() for c in self._constrained},
            "scales": self._scales.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned; names must be those constrained here.

        Load the model first: vectors of forward rules are checked against its weights.

        Raises
        ------
        AdapterError
            Another version, or other parameter names.
        """
        check_saved(state, [c.name for c in self._constrained])
        for c in self._constrained:
            c.check_state(state["weights"][c.name])
        self._scales.check(state.get("scales", {}))
        self.steps = int(state["steps"])
        for c in self._constrained:
            c.load_state_dict(state["weights"][c.name])
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
        used = []
        for c in self._constrained if fold else []:
            if not c.answering:
                continue
            try:
                used.append((c.location.parameter, c.weight().detach()))
            except SpecopsError as error:
                raise type(error)(f"{c.name}, which nothing was folded for: {error}") from error
        for parameter, weight in used:
            parameter.copy_(weight)
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        for c in self._constrained:
            c.release()
        self._scales.withdraw(self._optimizer)

    def _is_new(self, held: dict[int, nn.Parameter] | None) -> bool:
        """Whether parameters came, left or thawed since they were looked at."""
        if held is None:
            return False
        trained = {key for key, p in held.items() if p.requires_grad}
        new = self._held is None or held.keys() != self._held.keys() or trained - self._trained
        self._trained = trained
        return bool(new)

    def _of(self, stage: str, step: int) -> list[Constrained]:
        return [c for c in self._constrained if c.stage == stage and self._fires(c, step)]

    def _owners(self, parameter: nn.Parameter) -> list[Constrained]:
        return [c for c in self._constrained if c.location.parameter is parameter]

    def _fires(self, c: Constrained, step: int) -> bool:
        if c.stage == "forward":
            # The rule acts in every forward pass, so its vectors never stop.
            return (step - self.plan.start) % c.assignment.every == 0
        return self.plan.fires(step, c.assignment.every)

    @in_full_precision
    def _act(self, due: list[Constrained], step: int, stepped: list[Constrained]) -> None:
        """After a step: weights first, then the vectors of what forward passes will use."""
        self._refuse_sharded(stepped)
        for c in stepped:
            if c.in_use is not None:
                c.in_use.stepped(c.location.parameter)
        try:
            weights = [c for c in due if c.stage == "weights"]
            records, write = self._firing.weights(weights, step, certain=False)
            vectors = [c for c in due if c.stage == "forward"]
            more, advance = self._firing.forward(vectors, step)
            write()
            advance()
        finally:
            for c in stepped:
                c.schedule(step + 1)
            if self._optimizer is not None:
                self._scales.forget_gradients()
        self._record([*records, *more])

    @in_full_precision
    def _add_gradients(
        self, step: int, due: list[Constrained], scale: torch.Tensor | None = None
    ) -> None:
        self._record(self._firing.gradients(due, step, scale))

    def _refuse_sharded(self, constrained: list[Constrained]) -> None:
        for c in constrained:
            refuse_sharded(c.name, c.location.parameter)
            if c.in_use is not None and c.in_use.is_replaced(c.location.parameter):
                refuse_sharded_model(self._model)

    def _record(self, records: list[Record]) -> None:
        for record in records:
            self._history.add(record)

    @torch.compiler.disable
    @torch.no_grad()
    def _before_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> Any:
        held = _held(self._optimizer)
        if self._is_new(held):
            self._held = held
            self._assign()
        check_ran(self._constrained)
        self._refuse_sharded(self._constrained)
        for c in self._constrained:
            # What is written from now to the end of the step is the step.
            if c.in_use is not None and not c.in_use.is_fresh(c.location.parameter):
                c.in_use.forget()
        due = self._of("gradients", self.steps + 1)
        # The first argument is the optimizer.
        closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
        if closure is not None:
            wrapped = searching(closure, self._constrained)
            if due:
                # The closure will erase what is added now.
                records, ready = self._firing.vectors(due, self.steps + 1)
                self._record(records)
                wrapped = with_penalty(wrapped, ready, self.steps + 1)
            if "closure" in kwargs:
                return args, {**kwargs, "closure": wrapped}
            return (args[0], wrapped, *args[2:]), kwargs
        if due and not _overflowed(optimizer):
            # A fused optimizer under GradScaler divides by this in its step.
            scale = getattr(optimizer, "grad_scale", None)
            self._add_gradients(self.steps + 1, due, scale)
        return None

    @torch.compiler.disable
    def _after_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        if not _overflowed(optimizer):
            self.step()

    def _misfit(self, c: Constrained, error: GeometryError) -> None:
        """The geometry, known since the first forward, does not fit: "*" skips."""
        for index, assignment in enumerate(self._assignments):
            if assignment.weight.name == c.name:
                self._assignments[index] = replace(assignment, rule=None, reason=str(error))

    def _check_alive(self) -> None:
        if self._optimizer is not None and self._hooks:
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


_NEEDS = {"weights": "update", "gradients": "penalty", "forward": "apply"}


def _held(optimizer: torch.optim.Optimizer | None) -> dict[int, nn.Parameter] | None:
    """The optimizer's parameters by identity; groups may be added at any time."""
    if optimizer is None:
        return None
    return {id(p): p for group in optimizer.param_groups for p in group["params"]}


def _overflowed(optimizer: torch.optim.Optimizer) -> bool:
    """Whether GradScaler found infinities: a fused optimizer runs its step nevertheless."""
    found = getattr(optimizer, "found_inf", None)
    return found is not None and bool(found)
