"""The maps of fused layers, whose blocks only the neighbours of a layer tell."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from specops.geometry import Dense
from specops.geometry.fused import Surroundings, fused, fused_stack
from specops.training.role import Role


def taken_apart(roles: Mapping[str, Role]) -> dict[str, Role]:
    """The roles, with blocks for the matrices of layers that hold several maps."""
    return {name: _split(name, role, roles) for name, role in roles.items()}


def _split(name: str, role: Role, roles: Mapping[str, Role]) -> Role:
    geometry, shape = role.geometry, role.shape
    if not isinstance(geometry, Dense) or geometry.splits is not None:
        return role
    (batch, outputs, inputs), (block, layer, last) = geometry.axes(len(shape)), _parts(name)
    if len(outputs) != 1 or len(inputs) != 1 or batch not in ((), (0,)):
        return role

    def beside(other: str) -> tuple[int, ...]:
        within = block
        while other.startswith("../"):
            other, within = other.removeprefix("../"), within.rpartition("/")[0]
        other = other.replace(".", "/")
        found = roles.get(f"{within}/{other}/{last}".lstrip("/"))
        return () if found is None else found.shape

    out = -1 if outputs[0] == len(shape) - 1 else outputs[0]
    find = fused_stack if batch else fused
    found = find(layer, shape, out, Surroundings(beside=beside))
    if found is None:
        return role
    return replace(role, geometry=found.geometry, remark=found.doubt)


def _parts(name: str) -> tuple[str, str, str]:
    """(block, layer, the array's own name)."""
    rest, _, last = name.rpartition("/")
    block, _, layer = rest.rpartition("/")
    return block, layer, last
