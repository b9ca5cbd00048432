"""Trainable scales: one parameter per layer or per rule, in a group of its own."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any
from weakref import WeakSet

import torch
from torch import distributed as dist
from torch import nn

from specops.errors import AdapterError
from specops.training.cautions import caution
from specops_torch.collectives import added, is_distributed
from specops_torch.constrained import Constrained
from specops_torch.optimizer_hooks import maximized
from specops_torch.replicated import replicas_of
from specops_torch.sharded_constrained import ShardedConstrained

_GROUP = "specops scales"
_held: WeakSet[Scales] = WeakSet()
"""The scales of attachments whose parameters an optimizer holds."""


class Scales:
    """The trainable scales γ of an attachment, by layer; "shared" if the rule has one for all.

    Parameters
    ----------
    model : torch.nn.Module
    replicas : torch.distributed.ProcessGroup, optional
        The group of ranks that hold the same weights.
    """

    def __init__(self, model: nn.Module, replicas: Any = None) -> None:
        self._model, self._replicas = model, replicas
        self.parameters: dict[str, nn.Parameter] = {}
        self._given: list[nn.Parameter] = []
        """All that an optimizer was given, also of layers that were removed since."""
        self._rules: list[Any] = []
        self._group: Any = None
        """The process group whose ranks see different batches."""
        self._averaged: bool | None = False
        """Whether gradients were averaged since the last step; None once a warning said not."""

    def give(self, constrained: Sequence[Constrained], optimizer: Any) -> None:
        """Make missing scales, and hand them to the layers and to the optimizer."""
        self._group = replicas_of(self._model, self._replicas)
        new: list[nn.Parameter] = []
        users: dict[str, list[Constrained]] = {}
        trained = [(c, scale) for c in constrained if (scale := _trained_by(c)) is not None]
        self._rename({c.name: c for c, scale in trained if not scale.shared})
        for c, scale in trained:
            key = self._shared(c.rule) if scale.shared else c.name
            if key not in self.parameters:
                self.parameters[key] = _new_scale(scale.initial, c.location.parameter)
                new.append(self.parameters[key])
            assert c.in_use is not None
            c.in_use.overrides["scale"] = self.parameters[key]
            users.setdefault(key, []).append(c)
        for key in self.parameters.keys() - users.keys():
            self.parameters.pop(key).grad = None
        self._given += new
        for sharing in users.values():
            for c in sharing:
                assert c.in_use is not None
                if isinstance(c, ShardedConstrained) and c.location.layout is not None:
                    self._group = c.location.layout.group
                c.in_use.sharing = [o.location.parameter for o in sharing]
        if new:
            self._hand_to_optimizer(new, users, optimizer)

    def _hand_to_optimizer(
        self, new: list[nn.Parameter], users: Mapping[str, list[Constrained]], optimizer: Any
    ) -> None:
        """Add new parameters to the optimizer, in a group per direction of its steps."""
        if self._group is None and is_distributed():
            caution(
                f"{len(new)} trainable scales are no parameters of the model, so that ranks train "
                f"different functions unless their gradients are averaged: attach to the model "
                f"that DistributedDataParallel has wrapped, or name the group of ranks in replicas="
            )
        if isinstance(optimizer, torch.optim.LBFGS):
            raise AdapterError(
                "LBFGS has one parameter group and takes no trainable scales: give them to "
                "another optimizer, attach(None, ...), or use a fixed scale"
            )
        if optimizer is None:
            return
        if any("initial_lr" in group for group in optimizer.param_groups):
            caution(
                "the optimizer has a learning rate scheduler, which knows nothing of the group of "
                "trained scales that it gets now: the scheduler's next step raises an error of "
                "zip(), or leaves their rate alone. Attach before making the scheduler"
            )
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
        """Keep each parameter with its layer if layers have changed their names."""
        held = {name: c.in_use.overrides.get("scale") for name, c in layers.items() if c.in_use}
        moved = {name: scale for name, scale in held.items() if scale is not None}
        own = {id(scale) for scale in moved.values()}
        left = {key: p for key, p in self.parameters.items() if id(p) not in own}
        self.parameters = left | moved

    def averaging(self, closure: Callable[[], Any]) -> Callable[[], Any]:
        """The closure, averaging before it returns: the optimizer then uses the gradients."""

        def wrapped() -> Any:
            loss = closure()
            self.average()
            return loss

        return wrapped if self._group is not None and self.parameters else closure

    @torch.no_grad()
    def average(self) -> None:
        """Average gradients over the ranks, as `fully_shard` and DDP do for layers: a rank on which
        the layer did not run counts with a gradient of zero."""
        scales = list(self.parameters.values())
        if self._group is None or not scales:
            return
        used = torch.tensor([float(p.grad is not None) for p in scales])
        own = [torch.zeros_like(p) if p.grad is None else p.grad for p in scales]
        *totals, users = added([*own, used], self._group, scales[0].device)
        ranks = dist.get_world_size(self._group)
        self._averaged = True
        for p, total, n in zip(scales, totals, users.tolist(), strict=True):
            if n:
                p.grad = total / ranks

    def check_averaged(self) -> None:
        """After a step: warn once if `average` was not called before it."""
        if self._group is not None and self.parameters and self._averaged is False:
            caution(
                "trainable scales were stepped by the gradients of this rank alone: call "
                "attachment.before_step() before each step, which averages them over the ranks"
            )
            self._averaged = None
        elif self._averaged:
            self._averaged = False

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
        """The values of the scales."""
        return {key: p.detach().clone() for key, p in self.parameters.items()}

    @torch.no_grad()
    def load_state_dict(self, saved: dict[str, torch.Tensor]) -> None:
        """Restore `state_dict`."""
        for key, value in saved.items():
            self.parameters[key].copy_(torch.as_tensor(value))

    def check(self, saved: dict[str, torch.Tensor]) -> None:
        """Raise if saved values are those of other scales."""
        if set(saved) != set(self.parameters):
            raise AdapterError(
                f"the state has scales {sorted(saved)}, expected {sorted(self.parameters)}"
            )
        shapes = {key: tuple(torch.as_tensor(value).shape) for key, value in saved.items()}
        wrong = [f"{key} of shape {shape}" for key, shape in shapes.items() if shape]
        if wrong:
            raise AdapterError(f"scales are numbers, and the state has {', '.join(wrong)}")

    def forget_gradients(self) -> None:
        """After a step: ``model.zero_grad()`` does not know these parameters."""
        for p in self.parameters.values():
            p.grad = None


def _new_scale(initial: float, weight: torch.Tensor) -> nn.Parameter:
    dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
    return nn.Parameter(torch.full((), initial, dtype=dtype, device=weight.device))


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
