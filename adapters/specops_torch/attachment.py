"""`attach`: a plan that acts after every step of a torch optimizer."""

from __future__ import annotations

import warnings
from collections import deque
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import nn

from specops.errors import (
    AdapterError,
    GeometryError,
    NonFiniteError,
    NonFiniteWarning,
    SpecopsError,
)
from specops.geometry import Conv, Geometry
from specops.plan import Assignment, Plan, override_geometries
from specops.report import Report, plan_rows
from specops_torch.constrained import Constrained
from specops_torch.parameters import locate

NonFinitePolicy = Literal["raise", "skip", "warn"]


class Attachment:
    """A plan at work on a model. Made by `attach`; see there.

    Attributes
    ----------
    steps : int
        Successful optimizer steps since attaching (or since the state that was loaded).
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
        self.on_nonfinite = on_nonfinite
        self._history: deque[dict[str, Any]] = deque(maxlen=history)
        self._model, self._optimizer = model, optimizer
        self._geometries = dict(geometries or {})
        self._constrained: list[Constrained] = []
        self._assignments: list[Assignment] = []
        self._held = _held(optimizer)
        self._assign()
        self._hook = None
        if optimizer is not None:
            self._hook = optimizer.register_step_post_hook(self._after_step)

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
            if assignment.rule is not None and assignment.rule.stage != "weights":
                raise AdapterError(
                    f"{assignment.rule!r} acts in stage {assignment.rule.stage!r}; this adapter "
                    f'only runs rules of stage "weights"'
                )
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
            if weight is location.weight:
                location.watch()
            location.weight = weight
            self._constrained.append(Constrained(location, assignment))
        for dropped in before.values():
            dropped.location.unwatch()

    def __repr__(self) -> str:
        status = "attached" if self.is_attached else "detached"
        return f"<Attachment: {len(self._constrained)} weights, step {self.steps}, {status}>"

    @property
    def is_attached(self) -> bool:
        """Whether the optimizer's steps still reach this attachment."""
        if self._hook is None:
            return False
        hooks = self._hook.hooks_dict_ref()
        return hooks is not None and self._hook.id in hooks

    @property
    def history(self) -> list[dict[str, Any]]:
        """The latest firings, oldest first: step, name and the rule's figures as floats."""
        return [{key: _plain(value) for key, value in r.items()} for r in self._history]

    @torch.no_grad()
    def step(self) -> None:
        """Count one optimizer step and let the rules that are due act.

        Only for ``attach(None, ...)``; with an optimizer this runs by itself. All new weights
        are computed before the first is written, so an error leaves every weight as it was.
        """
        self.steps += 1
        held = _held(self._optimizer)
        if held is not None and self._held is not None and held.keys() != self._held.keys():
            self._held = held
            self._assign()
        self._fire(
            [c for c in self._constrained if self.plan.fires(self.steps, c.assignment.every)]
        )

    @torch.no_grad()
    def enforce(self) -> None:
        """Let every rule act now, whatever the step: after the last one, before an export."""
        self._fire(self._constrained)

    def report(self, *, measure: bool = True) -> Report:
        """Every parameter of the model: constrained by what, or left alone and why.

        With `measure`, constrained weights show their operator norm as it is now: exact for
        matrices and circular convolutions, a certified upper bound for zero-padded ones.
        """
        current = {c.name: c for c in self._constrained}
        rows = []
        for row in plan_rows(self._assignments):
            constrained = current.get(row.name)
            if constrained is not None:
                row = replace(row, geometry=constrained.geometry.describe())
                if measure and row.rule:
                    row = replace(row, **constrained.norm())
            rows.append(row)
        return Report(tuple(rows))

    def state_dict(self) -> dict[str, Any]:
        """Steps, sizes and rule states by parameter name: what a resumed run needs."""
        return {
            "version": 1,
            "steps": self.steps,
            "weights": {c.name: c.state_dict() for c in self._constrained},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned; names must be those constrained here.

        Raises
        ------
        AdapterError
            Another version, or other parameter names.
        """
        if state.get("version") != 1:
            raise AdapterError(f"unknown version {state.get('version')!r} of the state")
        names = {c.name for c in self._constrained}
        if names != set(state["weights"]):
            raise AdapterError(
                f"the state is of other parameters: missing "
                f"{sorted(names - set(state['weights']))}, unexpected "
                f"{sorted(set(state['weights']) - names)}"
            )
        self.steps = int(state["steps"])
        for c in self._constrained:
            c.load_state_dict(state["weights"][c.name])

    def detach(self) -> None:
        """Stop acting and remove every hook; the weights stay as they are."""
        if self._hook is not None:
            self._hook.remove()
        for constrained in self._constrained:
            constrained.location.unwatch()

    def _after_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        # A fused optimizer under GradScaler runs its step, and this hook, on overflow as well.
        found_inf = getattr(optimizer, "found_inf", None)
        if found_inf is not None and bool(found_inf):
            return
        self.step()

    def _fire(self, due: list[Constrained]) -> None:
        written = []
        for c in due:
            old = c.location.parameter.detach()
            record: dict[str, Any] = {"step": self.steps, "name": c.name}
            new, state = old, c.state
            reason = self._why_not(c, old)
            if reason:
                record["skipped"] = reason
            else:
                new, state, figures = self._update(c, old)
                record.update(figures)
            written.append((c, old, new, state, record))
        for c, old, new, state, record in written:
            if new is not old:
                c.location.parameter.copy_(new)
            c.state = state
            self._history.append(record)

    def _why_not(self, c: Constrained, weight: torch.Tensor) -> str:
        """A reason to leave a weight alone this time, or an error."""
        if not c.location.parameter.requires_grad:
            return "frozen (requires_grad=False)"
        if bool(torch.isfinite(weight).all()):
            return self._misfit(c, weight)
        message = (
            f"{c.name} holds NaN or infinity at step {self.steps} (shape {tuple(weight.shape)}): "
            f"look for a diverged step or an overflow in half precision"
        )
        if self.on_nonfinite == "raise":
            raise NonFiniteError(
                f'{message}. No weight was changed; attach(..., on_nonfinite="warn") goes on '
                f"without this weight"
            )
        if self.on_nonfinite == "warn":
            warnings.warn(f"{message}; it was left as it is", NonFiniteWarning, stacklevel=2)
        return "not finite"

    def _misfit(self, c: Constrained, weight: torch.Tensor) -> str:
        """Why the geometry, known since the first forward, does not fit: "*" skips."""
        geometry = c.geometry
        try:
            if isinstance(geometry, Conv):
                geometry.sizes(tuple(weight.shape))
            else:
                geometry.check(tuple(weight.shape))
        except GeometryError as error:
            if not c.assignment.lenient:
                raise type(error)(f"{c.name} at step {self.steps}: {error}") from error
            for index, assignment in enumerate(self._assignments):
                if assignment.weight.name == c.name:
                    self._assignments[index] = replace(assignment, rule=None, reason=str(error))
            return str(error)
        return ""

    def _update(
        self, c: Constrained, weight: torch.Tensor
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor], dict[str, Any]]:
        rule, geometry = c.assignment.rule, c.geometry
        assert rule is not None
        try:
            state = rule.init(weight, geometry, c.name) if c.state is None else c.state
            return rule.update(weight, geometry, state, step=self.steps, name=c.name)
        except SpecopsError as error:
            raise type(error)(f"{c.name} at step {self.steps}: {error}") from error
        except Exception as error:
            error.add_note(f"while {rule!r} acted on {c.name} at step {self.steps}")
            raise


def attach(
    optimizer: torch.optim.Optimizer | None,
    model: nn.Module,
    rule_or_plan: Any,
    *,
    every: int | None = None,
    geometries: Mapping[str, Geometry] | None = None,
    on_nonfinite: NonFinitePolicy = "raise",
    history: int = 10_000,
) -> Attachment:
    """Make a rule, or a plan, act on a torch model's weights after the optimizer's steps.

    Parameters
    ----------
    optimizer : torch.optim.Optimizer or None
        Its step post-hook runs the rules; None: call ``attachment.step()`` yourself.
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
    """
    return Attachment(
        optimizer,
        model,
        Plan.of(rule_or_plan, every),
        geometries,
        on_nonfinite=on_nonfinite,
        history=history,
    )


def _held(optimizer: torch.optim.Optimizer | None) -> dict[int, nn.Parameter] | None:
    """The optimizer's parameters by identity; groups may be added at any time."""
    if optimizer is None:
        return None
    return {id(p): p for group in optimizer.param_groups for p in group["params"]}


def _plain(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.tolist()
    if isinstance(value, tuple):
        return [_plain(v) for v in value]
    return value
