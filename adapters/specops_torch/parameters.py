"""Every parameter of a torch model: where it is held, and what a plan may do with it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from torch import nn
from torch.nn.parameter import is_lazy

from specops.geometry import Dense
from specops.training.role import Role
from specops.training.weight import Weight
from specops_torch.location import FROZEN, OUTSIDE, Location
from specops_torch.own_forward import added_to
from specops_torch.pieces import is_sharded
from specops_torch.replicated import ReplicatedLocation
from specops_torch.sharded import ShardedLocation, is_fully_sharded, reshard
from specops_torch.surroundings import WRAPPERS, role_within
from specops_torch.unrecognised import refuse_unrecognised


def locate(
    model: nn.Module, trained: Iterable[nn.Parameter] | None, *, shared: bool = False
) -> list[Location]:
    """Describe every parameter of `model`, each name once and each tensor's first name first.

    `trained` are the optimizer's parameters; None stands for all. With `shared`, ranks divide the
    work on parameters that all of them hold.
    """
    refuse_unrecognised(model)
    together = _fully_sharded(model)
    trained_ids = None if trained is None else {id(p) for p in trained}
    wrappers = _wrapped_paths(model)
    first: dict[int, Location] = {}
    result = []
    modules = dict(model.named_modules(remove_duplicate=False))
    adapted = added_to(modules)
    for path, module in modules.items():
        for attribute, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            name = _plain_name(f"{path}.{attribute}" if path else attribute, wrappers)
            role = Role()
            if not is_lazy(parameter):
                found = role_within(modules, path, attribute, tuple(parameter.shape))
                role = _role(name, found, adapted.get(path, ""))
            weight = _describe(name, parameter, role, why_untouched(parameter, trained_ids))
            if is_sharded(parameter):
                location: Location = ShardedLocation(weight, module, attribute, held=parameter)
                location.is_brought_together = id(module) in together  # type: ignore[attr-defined]
            else:
                kind = ReplicatedLocation if shared else Location
                location = kind(weight, module, attribute)
            earlier = first.get(id(parameter))
            if earlier is None:
                first[id(parameter)] = location
            else:
                first[id(parameter)] = _tie(earlier, location)
            result.append(location)
    return result


def _fully_sharded(model: nn.Module) -> set[int]:
    """The modules whose parameters `fully_shard` gathers for forward passes."""
    roots = [module for module in model.modules() if is_fully_sharded(module)]
    if roots:
        reshard(model)
    return {id(module) for root in roots for module in root.modules()}


def _wrapped_paths(model: nn.Module) -> set[str]:
    """Paths of the modules inside a wrapper (DDP, torch.compile, checkpointing)."""
    return {
        f"{path}.{WRAPPERS[kind.__name__]}".removeprefix(".")
        for path, module in model.named_modules(remove_duplicate=False)
        for kind in type(module).__mro__  # `fully_shard` makes subclasses
        if kind.__name__ in WRAPPERS
    }


def _plain_name(name: str, wrapped: set[str]) -> str:
    """A parameter's path as it would be without wrappers."""
    parts = name.split(".")
    kept = [p for i, p in enumerate(parts) if ".".join(parts[: i + 1]) not in wrapped]
    return ".".join(kept)


def _role(name: str, role: Role, adapted: str) -> Role:
    """The role, unless the parameter is not the layer's weight or not its whole map."""
    role = _parametrised(name) or role
    return Role(obstacle=adapted, opt_in=role.opt_in) if adapted and role.geometry else role


def _describe(name: str, parameter: nn.Parameter, role: Role, skipped: str) -> Weight:
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
    return Weight.of(
        name,
        tuple(parameter.shape),
        dtype,
        role.geometry,
        skipped=skipped,
        obstacle=role.obstacle,
        opt_in=role.opt_in,
        unusable=unusable,
        remark=role.remark,
    )


def why_untouched(parameter: nn.Parameter, held: set[int] | None) -> str:
    """Why a matrix of the model is not this attachment's to change; empty if it is."""
    if not parameter.requires_grad:
        return FROZEN
    if held is not None and id(parameter) not in held:
        return OUTSIDE
    return ""


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
    """Choose which of two names a tied tensor goes by, and skip the other.

    The name under which it is a plain map is preferred to that of an embedding.
    """
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
