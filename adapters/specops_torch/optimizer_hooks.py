"""The optimizer whose steps an attachment follows: its hooks, and what it trains."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from specops.errors import AdapterError
from specops.training.plan import Assignment
from specops_torch.layers import Layers


class Followed:
    """An optimizer, or None where the user calls the steps.

    Raises
    ------
    AdapterError
        The object is not a torch optimizer.
    """

    def __init__(self, optimizer: torch.optim.Optimizer | None, model: nn.Module) -> None:
        try:
            if optimizer is not None:
                # Wrappers may inherit the method without the attributes that it needs.
                optimizer.register_step_post_hook(_nothing).remove()
        except AttributeError:
            raise AdapterError(
                f"{type(optimizer).__name__} is no torch optimizer that takes hooks: pass the "
                f"wrapped one (accelerate: .optimizer; PostLocalSGDOptimizer: .optim), or None and "
                f"call attachment.step() yourself"
            ) from None
        self.optimizer, self.layers = optimizer, Layers(model)
        self._hooks: list[Any] = []
        self.look()

    def look(self, assignments: Iterable[Assignment] = ()) -> None:
        """Remember its parameters by identity; groups may be added at any time."""
        self.layers.look()
        self.layers.warn_of_replaced(assignments)
        self._held, self._stale = self._holds(), False

    @property
    def parameters(self) -> list[nn.Parameter] | None:
        """The parameters that it trains; None for all parameters of the model."""
        return None if self._held is None else list(self._held.values())

    def has_changed(self) -> bool:
        """Whether parameters or layers came, went or were unfrozen since the latest `look`."""
        held = self._holds()
        others = held is not None and held.keys() != (self._held or {}).keys()
        if self.layers.have_changed() or others:
            self._held, self._stale = held, True
        return self._stale

    def hook(self, before: Callable[..., Any], after: Callable[..., Any]) -> None:
        """Call these around each step."""
        if self.optimizer is not None:
            self._hooks = [
                self.optimizer.register_step_pre_hook(self._outermost(before)),
                self.optimizer.register_step_post_hook(self._outermost(after)),
            ]

    def _outermost(self, act: Callable[..., Any]) -> Callable[..., Any]:
        """A hook that ignores steps within a step (``super().step()`` in a subclass), and steps
        that only make an optimizer's state."""
        kinds = type(self.optimizer).__mro__
        nests = sum("step" in vars(kind) for kind in kinds) > 2  # one of them is `Optimizer`'s

        def once(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> Any:
            if (nests and self._is_within_step()) or _makes_state(optimizer, kwargs):
                return None
            return act(optimizer, args, kwargs)

        disabled: Callable[..., Any] = torch.compiler.disable(once)
        return disabled

    def _is_within_step(self) -> bool:
        # torch wraps the `step` of each class, and every wrapper calls the hooks. Counting their
        # calls would go wrong after a step that raised, because then the post-hook is not called.
        kind: Any = type(self.optimizer)
        code = getattr(kind.step, "__code__", None)
        frame, found = inspect.currentframe(), 0
        while frame is not None:
            if frame.f_code is code and frame.f_locals.get("self") is self.optimizer:
                found += 1
            frame = frame.f_back
        return found > 1

    @property
    def has_hooks(self) -> bool:
        """Whether hooks were registered, and not removed by `unhook`."""
        return bool(self._hooks)

    @property
    def calls_hooks(self) -> bool:
        """Whether the optimizer still has the hooks: copies of an optimizer lose them."""
        held = [(hook.hooks_dict_ref(), hook.id) for hook in self._hooks]
        return bool(held) and all(hooks is not None and key in hooks for hooks, key in held)

    def maximized(self) -> set[int]:
        """The ids of parameters whose steps go up the gradient."""
        return set() if self.optimizer is None else maximized(self.optimizer)

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


def _nothing(*_: Any) -> None:
    """A hook that does nothing."""


def _makes_state(optimizer: torch.optim.Optimizer, kwargs: Any) -> bool:
    """Whether this is the step of rate 0 by which `torch.distributed.checkpoint` makes a state.

    It is recognised by its arguments. Its gradients are zeros, but those of a real step may be
    zeros on one rank, too.
    """
    if "closure" not in kwargs or kwargs["closure"] is not None:
        return False
    rates = [group.get("lr") for group in optimizer.param_groups]
    return all(rate is not None and float(rate) == 0.0 for rate in rates)


def maximized(optimizer: torch.optim.Optimizer) -> set[int]:
    """The ids of parameters whose steps go up the gradient."""
    groups = optimizer.param_groups
    return {id(p) for group in groups if group.get("maximize") for p in group["params"]}
