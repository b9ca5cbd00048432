"""A plan that acts around every step of a torch optimizer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from specops.arrays import in_full_precision
from specops.geometry import Geometry
from specops.training.assigned import check_stage
from specops.training.attachment import BaseAttachment, without_gradient
from specops.training.outcome import Outcome
from specops.training.plan import Assignment, Plan
from specops_torch.batch_norms import behind
from specops_torch.constrained import Constrained
from specops_torch.firing import about_to_step, add_terms, check_ran, stepped, with_gradient
from specops_torch.liveness import Liveness
from specops_torch.location import FROZEN, OUTSIDE, Location
from specops_torch.optimizer_hooks import Followed, overflowed
from specops_torch.parameters import locate
from specops_torch.penalised import refuse_parts, searching, with_penalty
from specops_torch.scales import Scales
from specops_torch.sharded import ShardedLocation, reshard
from specops_torch.sharded_constrained import ShardedConstrained, constrained_at, settle_all
from specops_torch.sharded_firing import ShardedFiring, measured
from specops_torch.shared_constrained import SharedConstrained
from specops_torch.stale_statistics import Statistics, relative_change

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
        self._replicas = options.pop("replicas", None)
        super().__init__(plan, geometries, **options)
        self._model, self._followed = model, Followed(optimizer, model)
        self._scales = Scales(model, self._replicas)
        self._liveness, self._statistics = Liveness(), Statistics(model)
        self._firing = ShardedFiring(self._firing.on_nonfinite, self._statistics.are_kept)
        self._groups: dict[Any, Any] = {}
        try:
            self.assign()
            self._followed.hook(self._before_step, self._after_step)
            self._forward_rules_began()
            self._liveness.seen(self._constrained)
        except BaseException:
            self.detach()
            raise

    # The plan

    def parameters(self) -> list[Location]:
        """Every parameter of the model."""
        return locate(self._model, self._followed.parameters, shared=self._replicas is not None)

    def constrain(self, parameter: Location, assignment: Assignment) -> Constrained:
        """The object that keeps a weight on which a rule is to act, and the rule's state."""
        return constrained_at(parameter, assignment)

    def check_rule(self, rule: Any) -> None:
        """Raise `AdapterError` if the rule lacks the method that its stage needs here."""
        check_stage(rule, _NEEDS)

    def assign(self) -> None:
        """Decide about every parameter; those constrained before keep their state and sizes."""
        self._followed.layers.check(self._constrained)
        super().assign()
        settle_all(self._constrained, self._groups, self._replicas)
        for c in self._constrained:
            c.schedule(self.steps + 1)
        self._scales.give(self._constrained, self._followed.optimizer)
        self._followed.look(self._assignments)

    def goes_on(self, c: Constrained, decided: Assignment) -> bool:
        """True for a forward rule's weight that was frozen, or left the optimizer."""
        goes_on = c.in_use is not None and decided.reason.startswith((FROZEN, OUTSIDE))
        if goes_on:
            c.let_go()
        return goes_on

    def under_rules(self) -> Sequence[Constrained]:
        """The weights under a rule; none once hooks are lost, or detached."""
        lost = self._followed.has_hooks and not self._followed.calls_hooks
        return () if lost else super().under_rules()

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
        """Let rules of stage "gradients" add to the gradients, before an optimizer's step; with
        several ranks, average the gradients of trainable scales.

        Only for ``attach(None, ...)``: for all parameters, or for one that is about to be stepped.
        """
        self.check_attached()
        about_to_step(self._constrained if parameter is None else self._owners(parameter))
        if parameter is None:
            self._scales.average()
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
            One whose own optimizer has just stepped it, in backward; the step counts for it alone.
        """
        self.check_attached()
        if parameter is not None:
            for c in self._owners(parameter):
                c.steps += 1
                self.steps = max(self.steps, c.steps)
                c.refuse_sharded(self._model)
                acts = c.stage != "gradients" and self.fires(c, c.steps)
                self._act([c] if acts else [], c.steps, [c])
            return
        if self._followed.optimizer is None:
            check_ran(self._constrained)
            self._scales.check_averaged()
            for c in self._constrained:
                c.refuse_sharded(self._model)
        self.steps += 1
        if self._followed.has_changed():
            self.assign()
        due = [*self.due("weights", self.steps), *self.due("forward", self.steps)]
        stepped(self._constrained)
        self._act(due, self.steps, self._constrained)
        self._liveness.seen(self._constrained)

    @torch.no_grad()
    def enforce(self) -> None:
        """Let every rule on weights act now, certified: after the last step, before an export.

        Warns
        -----
        CautionWarning
            Batch normalisation keeps running statistics of other weights, of this call or of
            firings that few batches have followed: before evaluating, estimate them anew by
            ``torch.optim.swa_utils.update_bn(loader, model)``.
        """
        super().enforce()
        self._liveness.seen(self._constrained)
        self.caution("enforce()")

    def write(self, outcomes: Sequence[Outcome[Constrained]]) -> None:
        """Write new weights, keep the states of rules, and note how much weights changed."""
        changed = [o for o in outcomes if o.changes_weight and o.array is not None]
        if changed:
            self._changed((o.constrained, o.weight, o.array) for o in changed)
        super().write(outcomes)
        sharded = (o.constrained.location for o in changed)
        if any(isinstance(x, ShardedLocation) and x.is_stale for x in sharded):
            reshard(self._model)

    def _fold(self) -> None:
        super()._fold()
        if any(isinstance(c, ShardedConstrained) for c in self._constrained):
            reshard(self._model)

    def caution(self, act: str) -> None:
        """Warn if batch normalisation would evaluate with statistics of earlier weights."""
        self._statistics.caution(act)

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
        its memory, and for any write but `load_state_dict` before compiled code runs again, which
        does not look whether a weight was written to. All else is noticed at the next use.
        """
        for c in self._constrained:
            if isinstance(c, ShardedConstrained) and c.in_use is not None:
                c.in_use.forget()
            elif c.in_use is not None:
                c.in_use.measure(c.location.parameter)

    def measured(self, constrained: Sequence[Constrained]) -> dict[str, dict[str, Any]]:
        """What a report says about weights, alone and with the batch normalisation behind them."""
        normalized = behind(self._model, {c.location.module for c in constrained})
        stale = set(self._statistics.stale().values()) if normalized else set()

        def measure(c: Constrained) -> dict[str, Any]:
            following = normalized.get(c.location.module, {})
            return {**c.norm(following.values()), "stale": not stale.isdisjoint(following)}

        return measured(constrained, measure)

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
            self.check_attached()
            self._fold()
        self._followed.unhook()
        for c in self._constrained:
            c.release()
        self._scales.withdraw(self._followed.optimizer)
        self._attached = False

    def _forward_rules_began(self) -> None:
        """Note that layers now use other weights than those that batch statistics are of."""
        known = [(c, x) for c in self._constrained if (x := c.in_use) is not None and x.state]
        with torch.no_grad():
            self._changed((c, c.location.read(), c.used()) for c, _ in known)
        for _, in_use in known:
            in_use.ran = False

    def _changed(self, moves: Iterable[tuple[Constrained, torch.Tensor, torch.Tensor]]) -> None:
        if not self._statistics.are_kept():
            return
        changes: dict[nn.Module, torch.Tensor] = {}
        for c, before, after in moves:
            known = c.moved if isinstance(c, SharedConstrained) else None
            change = relative_change(before, after) if known is None else known
            module = c.location.module
            changes[module] = torch.maximum(change, changes.get(module, change))
        self._statistics.changed(changes)

    def _owners(self, parameter: nn.Parameter) -> list[Constrained]:
        return [c for c in self._constrained if c.location.parameter is parameter]

    @in_full_precision
    def _act(self, due: list[Constrained], step: int, stepped: list[Constrained]) -> None:
        """Fire after a step: rules on weights first, then the vectors of forward rules."""
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
        add_terms(outcomes, scale, self._followed.maximized())
        self._record(without_gradient(c, step) for c in due if c.location.parameter.grad is None)
        self._record(o.record for o in outcomes)

    @torch.no_grad()
    def _before_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> Any:
        if self._followed.has_changed():
            self.assign()
        check_ran(self._constrained)
        self._scales.average()
        for c in self._constrained:
            c.refuse_sharded(self._model)
        about_to_step(self._constrained)
        due = self.due("gradients", self.steps + 1)
        # The first argument is the optimizer.
        closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
        if closure is not None:
            refuse_parts(due)
            wrapped = self._scales.averaging(searching(closure, self._constrained))
            if due:
                # The closure erases what would be added now: it adds the terms itself.
                outcomes = self._firing.compute(due, self.steps + 1)
                up = self._followed.maximized()
                wrapped = with_penalty(wrapped, outcomes, self.steps + 1, up)
                self._record(o.record for o in outcomes)
            if "closure" in kwargs:
                return args, {**kwargs, "closure": wrapped}
            return (args[0], wrapped, *args[2:]), kwargs
        if due and not overflowed(optimizer):
            # A fused optimizer under GradScaler divides gradients by this scale in its step.
            scale = getattr(optimizer, "grad_scale", None)
            self._add_gradients(self.steps + 1, due, scale)
        return None

    def _after_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        if not overflowed(optimizer):
            self.step()

    def look(self) -> None:
        """Warn if weights move, but no step is seen."""
        super().look()
        if self._followed.has_hooks:
            self._liveness.check(self._constrained, self.steps, hooked=self.is_attached)
