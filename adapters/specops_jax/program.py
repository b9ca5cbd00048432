"""`Program`: which rule acts on which array of a pytree, by names, shapes and geometries."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import jax.numpy as jnp

from specops.errors import AdapterError, PlanError
from specops.geometry import Geometry
from specops.training.assigned import Assigned
from specops.training.declared import declared, override_geometries
from specops.training.plan import Assignment, Plan
from specops.training.weight import Weight, is_named
from specops_jax.modules import Geometries, inspect_leaves
from specops_jax.paths import masked_names, named_leaves

_NONE_KNOWN = (
    "no geometry is known for it: pass geometries={name or pattern: Dense(...) or Conv(...)}, or "
    "what specops_jax.geometries_of(module, inputs) returns"
)

_STACKED = (
    "its module has it of shape {}, and here it is {}: map over models that are stacked, jax.vmap "
    "of init and of the training step, and give enforce and report one of them, "
    "jax.tree.map(lambda x: x[0], params)"
)


@dataclass(frozen=True)
class Item(Assigned):
    """One array under a rule."""

    index: int
    """The index of its leaf in the tree."""
    assignment: Assignment

    @property
    def is_key(self) -> bool:
        """Whether the rule can be a dict's key: not if it holds arrays, traced or not."""
        try:
            hash(self.rule)
        except TypeError:
            return False
        return True


@dataclass(frozen=True)
class Program:
    """A plan, applied to one tree of parameters. Holds no arrays."""

    plan: Plan
    assignments: tuple[Assignment, ...]
    items: tuple[Item, ...]
    on_host: bool = True
    """Whether compiled firings may be left to the host."""

    def of(self, *stages: str) -> tuple[Item, ...]:
        """The arrays under rules of these stages."""
        return tuple(item for item in self.items if item.rule.stage in stages)

    def only(self, *stages: str) -> Program:
        """The program without rules of other stages."""
        return replace(self, items=self.of(*stages))


def program(
    params: Any, plan: Any, geometries: Mapping[str, Geometry] | None = None
) -> tuple[Program, list[Any], Any]:
    """(what the plan does, the leaves, the tree's structure)."""
    leaves, structure = named_leaves(params)
    if not leaves:
        raise AdapterError("the parameters hold no array")
    _refuse_collisions([name for name, _ in leaves])
    found, given = inspect_leaves(params), declared(geometries)
    names = {name for name, _ in leaves}
    if isinstance(geometries, Geometries):
        # Not all that `geometries_of` has found in the module needs to be in these parameters.
        found = found | geometries
        given = {key: given[key] for key in given if key in geometries.given}
    given = {key: given[key] for key in given if not _only_masked(key, names, params)}
    matrices = {name for name, leaf in leaves if getattr(leaf, "ndim", 0) > 1}
    for pattern in given:
        meant = {name for name in matrices if is_named(name, pattern)}
        if meant <= found.skipped.keys():  # a pattern for vectors alone is meant for them
            for name in meant:
                del found.skipped[name]
    described = [_describe(name, leaf, found) for name, leaf in leaves]
    plan = Plan.of(plan)
    assignments = plan.assign(override_geometries(described, given))
    items = tuple(Item(i, a) for i, a in enumerate(assignments) if a.rule is not None)
    return Program(plan, tuple(assignments), items), [leaf for _, leaf in leaves], structure


def _only_masked(pattern: str, names: set[str], params: Any) -> bool:
    """Whether a pattern matches arrays that optax has masked, and no others."""
    if any(is_named(name, pattern) for name in names):
        return False
    masked = masked_names(params)  # may be names of whole branches
    return any(is_named(name, pattern) or pattern.startswith(f"{name}/") for name in masked)


def _refuse_collisions(names: list[str]) -> None:
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise PlanError(
            f"two arrays of the parameters are both called {', '.join(map(repr, twice))}: their "
            f"keys joined by '/' must differ. Rename one"
        )


def _describe(name: str, leaf: Any, found: Geometries) -> Weight:
    if not hasattr(leaf, "shape") or not hasattr(leaf, "dtype"):
        return Weight(name, (), type(leaf).__name__, skipped="no array")
    shape, dtype = tuple(leaf.shape), str(leaf.dtype)
    if not jnp.issubdtype(leaf.dtype, jnp.inexact):
        return Weight(name, shape, dtype, skipped=f"dtype {dtype} holds no weights")
    geometry, obstacle = found.get(name), found.reasons.get(name, _NONE_KNOWN)
    looked_at = found.shapes.get(name, ())
    if looked_at and len(looked_at) != len(shape):
        geometry, obstacle = None, _STACKED.format(looked_at, shape)
    return Weight.of(
        name,
        shape,
        dtype,
        geometry,
        skipped=found.skipped.get(name, ""),
        obstacle="" if geometry is not None else obstacle,
        opt_in=found.opt_in.get(name, ""),
        remark=found.remarks.get(name, ""),
    )
