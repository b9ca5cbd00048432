"""Trainable scales: one parameter per layer or per rule, in a group of its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any
from weakref import WeakSet

import torch
from torch import nn

from specops.errors import AdapterError
from specops.training.cautions import caution
from specops_torch.collectives import added, is_distributed
from specops_torch.constrained import Constrained
from specops_torch.optimizer_hooks import maximized
from specops_torch.pieces import Layout
from specops_torch.sharded_constrained import ShardedConstrained

_GROUP = "specops scales"
_held: WeakSet[Scales] = WeakSet()
"""Those whose parameters an optimizer has."""


class Scales:
    """The parameters γ of an attachment, by the name of their layer; "shared" for a rule's one."""

    def __init__(self) -> None:
        self.parameters: dict[str, nn.Parameter] = {}
        self._given: list[nn.Parameter] = []
        """Also those of layers that were taken out since, which an optimizer keeps."""
        self._rules: list[Any] = []
        self._layout: Layout | None = None
        """Of sharded layers, whose ranks meet different batches."""

    def give(self, constrained: Sequence[Constrained], optimizer: Any) -> None:
        """Make what is missing, hand it to the layers and to the optimizer."""
        new: list[nn.Parameter] = []
        users: dict[str, list[Any]] = {}
        trained = [(c, scale) for c in constrained if (scale := _trained_by(c)) is not None]
        self._rename({c.name: c for c, scale in trained if not scale.shared})
        for c, scale in trained:
            key = self._shared(c.rule) if scale.shared else c.name
            if key not in self.parameters:
                weight = c.location.parameter
                dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
                value = torch.full((), scale.initial, dtype=dtype, device=weight.device)
                self.parameters[key] = nn.Parameter(value)
                new.append(self.parameters[key])
            assert c.in_use is not None
            c.in_use.overrides["scale"] = self.parameters[key]
            users.setdefault(key, []).append(c)
        for key in self.parameters.keys() - users.keys():
            self.parameters.pop(key).grad = None
        self._given += new
        for sharing in users.values():
            for c in sharing:
                if isinstance(c, ShardedConstrained):
                    self._layout = c.location.layout
                c.in_use.sharing = [o.location.parameter for o in sharing]
        if new and self._layout is None and is_distributed():
            caution(
                f"{len(new)} trainable scales are no parameters of the model, so that DDP does not "
                f"average their gradients: all-reduce those of attachment.scales before each step, "
                f"or ranks train different functions; or use a fixed scale"
            )
        if new and isinstance(optimizer, torch.optim.LBFGS):
            raise AdapterError(
                "LBFGS has one parameter group and takes no trainable scales: give them to "
                "another optimizer, attach(None, ...), or use a fixed scale"
            )
        if new and optimizer is not None:
            _held.add(self)
            _drop_copies(optimizer)
            up = maximized(optimizer)
            rising = {
                id(self.parameters[key])
                for key, sharing in users.items()
                if any(id(c.location.parameter) in up for c in sharing)
            }
            for climbs in (False, True):
                _add_group(optimizer, [p for p in new if (id(p) in rising) == climbs], climbs)

    def _rename(self, layers: dict[str, Constrained]) -> None:
        """Let parameters stay with their layers where these have other names than before."""
        held = {name: c.in_use.overrides.get("scale") for name, c in layers.items() if c.in_use}
        moved = {name: scale for name, scale in held.items() if scale is not None}
        own = {id(scale) for scale in moved.values()}
        left = {key: p for key, p in self.parameters.items() if id(p) not in own}
        self.parameters = left | moved

    def averaging(self, closure: Callable[[], Any]) -> Callable[[], Any]:
        """The closure, whose gradients an optimizer uses as soon as it returns."""

        def wrapped() -> Any:
            loss = closure()
            self.average()
            return loss

        return wrapped if self._layout is not None and self.parameters else closure

    @torch.no_grad()
    def average(self) -> None:
        """Gradients over the ranks, as `fully_shard` does those of layers."""
        given = [p.grad for p in self.parameters.values() if p.grad is not None]
        if self._layout is None or not given:
            return
        ranks = len(self._layout.pieces)
        for own, total in zip(
            given, added(given, self._layout.group, self._layout.device), strict=True
        ):
            own.copy_(total / ranks)

    def _shared(self, rule: Any) -> str:
        if rule not in self._rules:
            self._rules.append(rule)
        count = self._rules.index(rule)
        return f"shared {count + 1}" if count else "shared"

    def withdraw(self, optimizer: Any) -> None:
        """Take the group out of the optimizer again."""
        _held.discard(self)
        if optimizer is None or not self._given:
            return
        own = {id(p) for p in self._given}
        groups = optimizer.param_groups
        groups[:] = [g for g in groups if not any(id(p) in own for p in g["params"])]
        for p in self._given:
            optimizer.state.pop(p, None)

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Their values."""
        return {key: p.detach().clone() for key, p in self.parameters.items()}

    @torch.no_grad()
    def load_state_dict(self, saved: dict[str, torch.Tensor]) -> None:
        """Restore `state_dict`."""
        for key, value in saved.items():
            self.parameters[key].copy_(torch.as_tensor(value))

    def check(self, saved: dict[str, torch.Tensor]) -> None:
        """Raise if these are the values of other scales."""
        if set(saved) != set(self.parameters):
            raise AdapterError(
                f"the state has scales {sorted(saved)}, expected {sorted(self.parameters)}"
            )

    def forget_gradients(self) -> None:
        """After a step: ``model.zero_grad()`` does not know these parameters."""
        for p in self.parameters.values():
            p.grad = None


def _trained_by(c: Constrained) -> Any:
    return None if c.in_use is None else c.forward_rule.trained_scale()


def _add_group(optimizer: Any, new: list[nn.Parameter], climbs: bool) -> None:
    if not new:
        return
    group: dict[str, Any] = {"params": new, "name": _GROUP}
    if "maximize" in optimizer.defaults:
        group["maximize"] = climbs
    if "weight_decay" in optimizer.defaults:
        group["weight_decay"] = 0.0
    named = any("param_names" in g for g in optimizer.param_groups)
    if named:
        own = [g for g in optimizer.param_groups if g.get("name") == _GROUP]
        start = sum(len(g["params"]) for g in own)
        group["params"] = [(f"{_GROUP}.{i}", p) for i, p in enumerate(new, start)]
    optimizer.add_param_group(group)


def _drop_copies(optimizer: Any) -> None:
    """A copied optimizer holds copies of the scales of the attachments it was copied with."""
    live = {id(p) for scales in _held for p in scales._given}
    kept = []
    for group in optimizer.param_groups:
        if group.get("name") != _GROUP or not live.isdisjoint(map(id, group["params"])):
            kept.append(group)
            continue
        for p in group["params"]:
            optimizer.state.pop(p, None)
    optimizer.param_groups[:] = kept
