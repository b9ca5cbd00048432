"""A parameter of a torch model: where it is held, how it is read and written."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from specops.errors import AdapterError
from specops.geometry import Conv
from specops.training.parameter import Parameter
from specops.training.weight import Weight
from specops_torch.geometry import CONVOLUTIONS
from specops_torch.sizes import DeclaredSize, SizeRecorder

FROZEN = "frozen (requires_grad=False)"
OUTSIDE = "not in this optimizer"


@dataclass
class Location(Parameter):
    """A parameter as a module's attribute, so that replaced tensors are found again."""

    weight: Weight
    module: nn.Module
    attribute: str
    recorder: SizeRecorder | None = None
    others: list[nn.Module] = field(default_factory=list, repr=False)
    """Modules that hold the same tensor."""
    aliases: list[str] = field(default_factory=list, repr=False)
    """The names of the same tensor in those modules."""
    handles: list[Any] = field(default_factory=list, repr=False)

    @property
    def place(self) -> tuple[nn.Module, str]:
        """The module and attribute: names change when layers are inserted or taken out."""
        return self.module, self.attribute

    @property
    def parameter(self) -> nn.Parameter:
        """The parameter as it is now."""
        found = self.module._parameters.get(self.attribute)
        if found is None:
            raise AdapterError(
                f"{self.weight.name} is no parameter any more: it was reparametrised or removed "
                f"after attaching. Detach, and attach again"
            )
        return found

    def holders(self) -> list[tuple[nn.Module, str]]:
        """Every module that holds the tensor, and the attribute in which it does."""
        parameter = self.parameter
        modules = {id(m): m for m in (self.module, *self.others)}
        return [
            (module, attribute)
            for module in modules.values()
            for attribute, own in module._parameters.items()
            if own is parameter
        ]

    def read(self) -> torch.Tensor:
        """The values of the parameter."""
        return self.parameter.detach()

    def write(self, value: torch.Tensor) -> None:
        """Write the value in place."""
        with torch.no_grad():
            self.parameter.copy_(value)

    def identity(self) -> int | None:
        """The id of the tensor object, which modules share if weights are tied."""
        found = self.module._parameters.get(self.attribute)
        return None if found is None else id(found)

    def frozen(self) -> str:
        """Why nothing may act on it now: layers may be frozen after attaching."""
        return "" if self.parameter.requires_grad else FROZEN

    @property
    def learns_size(self) -> bool:  # type: ignore[override]
        """Whether it is a convolution whose geometry was not declared."""
        return isinstance(self.module, CONVOLUTIONS) and not self.declared

    def watch(self) -> None:
        """Record the sizes that a convolution sees until `unwatch`: inputs may grow."""
        if self.learns_size and self.recorder is None:
            self.recorder = SizeRecorder(self.module.padding_mode == "circular")
            self._hook(self.recorder)
        declared = self.weight.geometry if self.declared and not self.handles else None
        if isinstance(self.module, CONVOLUTIONS) and isinstance(declared, Conv):
            self._hook(DeclaredSize(self.weight.name, declared))

    def share(self, others: list[nn.Module], aliases: list[str]) -> None:
        """Take over which other modules hold the tensor, as a new listing found them."""
        self.aliases = aliases
        if set(others) == set(self.others):
            return
        self.others = others
        if self.handles and self.recorder is not None:
            self.unwatch()
            self._hook(self.recorder)

    def _hook(self, hook: Any) -> None:
        for module in {id(m): m for m in (self.module, *self.others)}.values():
            self.handles.append(module.register_forward_hook(hook, with_kwargs=True))

    def unwatch(self) -> None:
        """Remove the hooks."""
        for handle in self.handles:
            handle.remove()
        self.handles.clear()

    def geometry(self) -> Any:
        """The geometry now: at the recorded size where there is one."""
        if self.recorder is None:
            return self.weight.geometry
        return self.recorder.geometry(self.module)

    def sizes(self) -> Any:
        """The sizes that the recorder has learnt, for a checkpoint."""
        return None if self.recorder is None else self.recorder.state()

    def see(self, sizes: Any) -> None:
        """Take over the sizes of a checkpoint."""
        if self.recorder is not None and sizes is not None:
            self.recorder.load(sizes)

    def see_also(self, sizes: Any) -> None:
        """Add the sizes that a recorder of the same layer has seen on another rank."""
        if self.recorder is not None and sizes is not None:
            self.recorder.merge(sizes)

    def saved(self, value: torch.Tensor) -> torch.Tensor:
        """A copy where it is."""
        return value.clone()

    def restored(self, value: Any) -> torch.Tensor:
        """A copy on the parameter's device, of a NumPy array too."""
        return torch.as_tensor(value).to(self.parameter.device, copy=True)
