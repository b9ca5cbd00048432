"""Every parameter of a torch model: where it is held, and what a plan may do with it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from specops.errors import AdapterError
from specops.geometry import Dense
from specops.training.parameter import Parameter
from specops.training.weight import Weight
from specops_torch.geometry import CONVOLUTIONS, role_of
from specops_torch.own_forward import added_to
from specops_torch.role import Role
from specops_torch.sizes import SizeRecorder

_WRAPPERS = {
    "DistributedDataParallel": "module",
    "DataParallel": "module",
    "OptimizedModule": "_orig_mod",
}
_FROZEN = "frozen (requires_grad=False)"


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
    """Their names for it."""
    handles: list[Any] = field(default_factory=list, repr=False)

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
        """Every module that holds the tensor, and its name for it."""
        parameter = self.parameter
        modules = {id(m): m for m in (self.module, *self.others)}
        return [
            (module, attribute)
            for module in modules.values()
            for attribute, own in module._parameters.items()
            if own is parameter
        ]

    def is_held_by(self, model: nn.Module) -> bool:
        """Whether the model still has the module, and that a parameter of the name."""
        held = any(m is self.module for m in model.modules())
        return held and self.module._parameters.get(self.attribute) is not None

    def read(self) -> torch.Tensor:
        """Its values."""
        return self.parameter.detach()

    def write(self, value: torch.Tensor) -> None:
        """In place."""
        with torch.no_grad():
            self.parameter.copy_(value)

    def identity(self) -> int | None:
        """Of the tensor object, which modules share where weights are tied."""
        found = self.module._parameters.get(self.attribute)
        return None if found is None else id(found)

    def frozen(self) -> str:
        """A layer may be frozen after attaching."""
        return "" if self.parameter.requires_grad else _FROZEN

    @property
    def learns_size(self) -> bool:  # type: ignore[override]
        """Whether it is a convolution whose geometry was not declared."""
        return isinstance(self.module, CONVOLUTIONS) and not self.declared

    def watch(self) -> None:
        """Record the sizes that a convolution sees until `unwatch`: inputs may grow."""
        if self.learns_size and self.recorder is None:
            self.recorder = SizeRecorder(self.module.padding_mode == "circular")
            for module in {id(m): m for m in (self.module, *self.others)}.values():
                hook = module.register_forward_hook(self.recorder, with_kwargs=True)
                self.handles.append(hook)

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
        """What the recorder knows."""
        return None if self.recorder is None else self.recorder.state()

    def see(self, sizes: Any) -> None:
        """Take over what a recorder knew."""
        if self.recorder is not None and sizes is not None:
            self.recorder.load(sizes)

    def saved(self, value: torch.Tensor) -> torch.Tensor:
        """A copy where it is."""
        return value.clone()

    def restored(self, value: torch.Tensor) -> torch.Tensor:
        """A copy on the parameter's device."""
        return value.to(self.parameter.device, copy=True)


def locate(model: nn.Module, trained: Iterable[nn.Parameter] | None) -> list[Location]:
    """Describe every parameter of `model`, each name once and each tensor's first name first.

    `trained` are the optimizer's parameters; None stands for all.
    """
    refuse_sharded_model(model)
    held = None if trained is None else {id(p) for p in trained}
    wrappers = _wrapped_paths(model)
    first: dict[int, Location] = {}
    result = []
    modules = dict(model.named_modules(remove_duplicate=False))
    adapted = added_to(modules)
    for path, module in modules.items():
        for attribute, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            name = _plain_name(f"{path}.{attribute}" if path else attribute, wrappers)
            weight = _describe(name, module, attribute, parameter, held, adapted.get(path, ""))
            location = Location(weight, module, attribute)
            earlier = first.get(id(parameter))
            if earlier is None:
                first[id(parameter)] = location
            else:
                first[id(parameter)] = _tie(earlier, location)
            result.append(location)
    return result


def _wrapped_paths(model: nn.Module) -> set[str]:
    """Paths of modules that only stand inside a wrapper (DDP, torch.compile)."""
    return {
        f"{path}.{_WRAPPERS[type(module).__name__]}".removeprefix(".")
        for path, module in model.named_modules(remove_duplicate=False)
        if type(module).__name__ in _WRAPPERS
    }


def _plain_name(name: str, wrapped: set[str]) -> str:
    """A parameter's path as it is without wrappers."""
    parts = name.split(".")
    kept = [p for i, p in enumerate(parts) if ".".join(parts[: i + 1]) not in wrapped]
    return ".".join(kept)


def _describe(
    name: str,
    module: nn.Module,
    attribute: str,
    parameter: nn.Parameter,
    held: set[int] | None,
    adapted: str,
) -> Weight:
    dtype = str(parameter.dtype).removeprefix("torch.")
    if is_lazy(parameter):
        return Weight(
            name,
            (),
            dtype,
            Dense(),
            unusable="is a lazy parameter without a shape: run one forward pass before attaching",
        )
    unusable = ""
    if parameter.is_meta:
        unusable = (
            "is on the meta device and holds no values: materialise the model (to_empty and "
            "initialise, or load a checkpoint) before attaching"
        )
    role = _parametrised(name) or _fused(name, role_of(module, attribute), parameter)
    if adapted and role.geometry is not None:
        role = Role(obstacle=adapted, opt_in=role.opt_in)
    return Weight.of(
        name,
        tuple(parameter.shape),
        dtype,
        role.geometry,
        skipped=why_untouched(parameter, held),
        obstacle=role.obstacle,
        opt_in=role.opt_in,
        unusable=unusable,
    )


def why_untouched(parameter: nn.Parameter, held: set[int] | None) -> str:
    """Why a matrix of the model is not this attachment's to change; empty if it is."""
    if not parameter.requires_grad:
        return _FROZEN
    if held is not None and id(parameter) not in held:
        return "not in this optimizer"
    return ""


def _fused(name: str, role: Role, parameter: nn.Parameter) -> Role:
    """Of GPT-2's c_attn the two or three square maps side by side, as it uses them."""
    if role.geometry != Dense(out_axes=(-1,)) or name.split(".")[-2:-1] != ["c_attn"]:
        return role
    inputs, outputs = parameter.shape
    if outputs % inputs:
        return role
    return Role(Dense(out_axes=(-1,), splits=(inputs,) * (outputs // inputs)))


def _parametrised(name: str) -> Role | None:
    head, found, tail = name.rpartition("parametrizations.")
    if not found:
        return None
    target = head + tail.partition(".")[0]
    return Role(
        obstacle=f"{target} is under a torch parametrization, so this tensor is not the layer's "
        f"weight: remove it with torch.nn.utils.parametrize.remove_parametrizations"
    )


def _tie(earlier: Location, location: Location) -> Location:
    """Let one name speak for a tensor, a plain map before an embedding; skip the other."""
    a, b = earlier.weight, location.weight
    if a.skipped or b.skipped:
        return earlier
    swap = _is_plain_map(b) and not _is_plain_map(a)
    preferred, other = (location, earlier) if swap else (earlier, location)
    if a.geometry is not None and b.geometry is not None and a.geometry != b.geometry:
        preferred.weight = replace(
            preferred.weight,
            geometry=None,
            obstacle=f"{a.name} and {b.name} are the same tensor but different maps "
            f"({a.geometry.describe()}; {b.geometry.describe()}): give one in geometries=",
        )
    other.weight = replace(other.weight, geometry=None, skipped=f"tied to {preferred.weight.name}")
    preferred.others += [other.module, *other.others]
    preferred.aliases += [other.weight.name, *other.aliases]
    return preferred


def _is_plain_map(weight: Weight) -> bool:
    return weight.geometry is not None and not weight.opt_in


def refuse_sharded_model(model: nn.Module) -> None:
    """Raise if parameters are, or between forward passes will be, parts of matrices only."""
    for path, module in model.named_modules():
        if any(kind.__name__ == "FSDPModule" for kind in type(module).__mro__):
            name = next((n for n, _ in module.named_parameters(prefix=path)), path)
            raise AdapterError(
                f"{name} is sharded (fully_shard). Sharded parameters are not supported yet; "
                f"detach before fully_shard"
            )
        if type(module).__name__ == "FullyShardedDataParallel":
            raise AdapterError(
                f"{path or 'the model'} is wrapped in FSDP1, which hides the shapes of its "
                f"parameters: attach before wrapping is no help, use fully_shard or DDP"
            )
    for name, parameter in model.named_parameters():
        refuse_sharded(name, parameter)


def refuse_sharded(name: str, parameter: nn.Parameter) -> None:
    """Raise if a parameter is a part of a matrix only."""
    if type(parameter) is not nn.Parameter and hasattr(parameter, "device_mesh"):
        raise AdapterError(
            f"{name} is sharded (DTensor): its local part is not the matrix. Sharded parameters "
            f"are not supported yet; detach before fully_shard"
        )
