"""A layer sees its normalised weight while its forward runs.

The raw parameter stays where it was, under its own name. A pre-hook puts the normalised tensor
into the module's ``__dict__``, where attribute lookup finds it before the parameter, and a hook
that always runs takes it out again.
"""

from __future__ import annotations

from typing import Any
from weakref import WeakSet

from torch import nn

from specops.errors import AdapterError
from specops_torch.normalized import Normalizer


class Before:
    """The pre-hook: shadow the parameter."""

    def __init__(self, normalizer: Normalizer, attribute: str, owner: str) -> None:
        self.normalizer, self.attribute, self.owner = normalizer, attribute, owner

    def __call__(self, module: nn.Module, args: Any, kwargs: Any = None) -> None:
        """Record the input's size where the norm needs it, then put the tensor in place."""
        normalizer = self.normalizer
        if normalizer.state is None and normalizer.recorder is not None and not self.owner:
            normalizer.recorder.before(module, args, kwargs or {})
            normalizer.geometry = normalizer.recorder.geometry(module)
        holder = getattr(module, self.owner) if self.owner else module
        parameter = holder._parameters[self.attribute]
        normalizer.ran = True
        used = normalizer.quickly(parameter)
        if used is None and self.owner:
            used = normalizer(parameter)
        elif used is None:
            x = args[0] if args else (kwargs or {}).get("input")
            used = normalizer(parameter, module, x)
        holder.__dict__[self.attribute] = used


class After:
    """The hook that always runs: the parameter is back."""

    def __init__(self, normalizer: Normalizer, attribute: str, owner: str) -> None:
        self.normalizer, self.attribute, self.owner = normalizer, attribute, owner

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        """Take the tensor away; recurrent layers also keep a list of their weights."""
        holder = getattr(module, self.owner) if self.owner else module
        holder.__dict__.pop(self.attribute, None)
        if isinstance(holder, nn.RNNBase):
            holder._update_flat_weights()


_LIVE: WeakSet[Normalizer] = WeakSet()


def claim(module: nn.Module, attribute: str, owner: str, name: str) -> None:
    """Remove what copying a model left on the copy; refuse a weight that is spoken for."""
    for hooks in (module._forward_pre_hooks, module._forward_hooks):
        for key, hook in list(hooks.items()):
            if not isinstance(hook, Before | After):
                continue
            if (hook.attribute, hook.owner) != (attribute, owner):
                continue
            if hook.normalizer in _LIVE:
                raise AdapterError(
                    f"{name} is under a forward rule already, {hook.normalizer.rule!r}: detach "
                    f"that attachment first"
                )
            del hooks[key]


def is_normalized(module: nn.Module) -> bool:
    """Whether a forward rule acts on a weight of this module."""
    return any(isinstance(hook, Before) for hook in module._forward_pre_hooks.values())


def let_go(normalizer: Normalizer) -> None:
    """Its weight may be claimed by others."""
    _LIVE.discard(normalizer)


def install(
    module: nn.Module, normalizer: Normalizer, attribute: str, owner: str = ""
) -> list[Any]:
    """Hook a module whose forward uses the weight, its own or that of its child `owner`."""
    claim(module, attribute, owner, normalizer.name)
    _LIVE.add(normalizer)
    before, after = Before(normalizer, attribute, owner), After(normalizer, attribute, owner)
    return [
        module.register_forward_pre_hook(before, with_kwargs=True),
        module.register_forward_hook(after, always_call=True),
    ]
