"""The optimizer whose steps an attachment follows: its hooks, and the parameters it holds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from specops.errors import AdapterError


class Followed:
    """An optimizer, or None where the user calls the steps.

    Raises
    ------
    AdapterError
        Something else.
    """

    def __init__(self, optimizer: torch.optim.Optimizer | None) -> None:
        if optimizer is not None and not hasattr(optimizer, "register_step_post_hook"):
            raise AdapterError(
                f"{type(optimizer).__name__} is no torch optimizer: pass the wrapped one "
                f"(accelerate: .optimizer), or None and call attachment.step() yourself"
            )
        self.optimizer = optimizer
        self._hooks: list[Any] = []
        self.look()

    def look(self) -> None:
        """Remember its parameters by identity; groups may be added at any time."""
        self._held, self._stale = self._holds(), False
        self._trained = _trained(self._held)

    @property
    def parameters(self) -> list[nn.Parameter] | None:
        """Those that it trains; None for all of the model's."""
        return None if self._held is None else list(self._held.values())

    def has_changed(self) -> bool:
        """Whether parameters came, left or thawed since the latest `look`."""
        held = self._holds()
        if held is None or self._held is None:
            return False
        trained = _trained(held)
        changed = held.keys() != self._held.keys() or bool(trained - self._trained)
        self._trained = trained
        if changed:
            self._held, self._stale = held, True
        return self._stale

    def hook(self, before: Callable[..., Any], after: Callable[..., Any]) -> None:
        """Call these around each step."""
        if self.optimizer is not None:
            self._hooks = [
                self.optimizer.register_step_pre_hook(before),
                self.optimizer.register_step_post_hook(after),
            ]

    @property
    def has_hooks(self) -> bool:
        """Whether hooks were given to it, and not taken off again."""
        return bool(self._hooks)

    @property
    def calls_hooks(self) -> bool:
        """Whether it has them still: they are lost where optimizers are copied."""
        held = [(hook.hooks_dict_ref(), hook.id) for hook in self._hooks]
        return bool(held) and all(hooks is not None and key in hooks for hooks, key in held)

    def unhook(self) -> None:
        """Take the hooks off."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def _holds(self) -> dict[int, nn.Parameter] | None:
        if self.optimizer is None:
            return None
        return {id(p): p for group in self.optimizer.param_groups for p in group["params"]}


def overflowed(optimizer: torch.optim.Optimizer) -> bool:
    """Whether GradScaler found infinities: a fused optimizer runs its step nevertheless."""
    found = getattr(optimizer, "found_inf", None)
    return found is not None and bool(found)


def _trained(held: dict[int, nn.Parameter] | None) -> set[int]:
    return {key for key, p in (held or {}).items() if p.requires_grad}
