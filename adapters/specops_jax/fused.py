"""Fused layers: the blocks that a layer alone does not know, by what stands around it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from specops.geometry import Dense
from specops.geometry.fused import Surroundings, fused
from specops_jax.layers import Role


def taken_apart(roles: Mapping[str, Role]) -> dict[str, Role]:
    """The roles, with blocks for the matrices of layers that hold several maps."""
    return {name: _split(name, role, roles) for name, role in roles.items()}


def _split(name: str, role: Role, roles: Mapping[str, Role]) -> Role:
    geometry, shape = role.geometry, role.shape
    if not isinstance(geometry, Dense) or len(shape) != 2 or geometry.splits is not None:
        return role
    (_, outputs, _), (block, layer, last) = geometry.axes(2), _parts(name)
    if len(outputs) != 1:
        return role

    def beside(other: str) -> tuple[int, ...]:
        within = block
        while other.startswith("../"):
            other, within = other.removeprefix("../"), within.rpartition("/")[0]
        other = other.replace(".", "/")
        found = roles.get(f"{within}/{other}/{last}".lstrip("/"))
        return () if found is None else found.shape

    found = fused(layer, shape, -outputs[0], Surroundings(beside=beside))
    if found is None:
        return role
    return replace(role, geometry=found.geometry, remark=found.doubt)


def _parts(name: str) -> tuple[str, str, str]:
    """(block, layer, the array's own name)."""
    rest, _, last = name.rpartition("/")
    block, _, layer = rest.rpartition("/")
    return block, layer, last
