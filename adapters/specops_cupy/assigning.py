"""What a plan decides about the entries of a dict, and the gradients that belong to them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from specops.errors import AdapterError, PlanError
from specops.geometry import Dense, Geometry
from specops.training.assigned import check_stage
from specops.training.plan import Assignment, Plan, Weight
from specops.typing import Array
from specops_cupy.arrays import flatten, is_array, library, measurable
from specops_cupy.constrained import Constrained
from specops_cupy.firing import check_writeable

_NEEDS = {"weights": "update", "gradients": "update", "forward": "apply"}


def assign(
    plan: Plan,
    weights: Sequence[Weight],
    leaves: Mapping[str, Any],
    before: Mapping[str, Constrained],
) -> tuple[list[Assignment], list[Constrained]]:
    """(a decision about every weight, those under a rule); what was decided before is kept.

    Raises
    ------
    PlanError
        The plan does not fit, or a rule cannot act on a weight that a pattern names.
    AdapterError
        A rule of an unknown stage, or a trainable scale.
    """
    assignments = plan.assign([measurable(weight) for weight in weights])
    constrained = []
    for index, assignment in enumerate(assignments):
        weight, rule = assignment.weight, assignment.rule
        if rule is None:
            continue
        _check_rule(rule)
        assert weight.geometry is not None
        reason = _why_not(rule, weight.geometry)
        if reason and not assignment.lenient:
            raise PlanError(f"{weight.name}: {rule!r} cannot act on it: {reason}")
        if reason:
            assignments[index] = replace(assignment, rule=None, reason=reason)
            continue
        kept = before.get(weight.name)
        if kept is None or kept.assignment != assignment:
            kept = Constrained(assignment, leaves[weight.name])
            if kept.stage == "forward":
                kept.prepare()
        constrained.append(kept)
    return assignments, constrained


def matched(
    gradients: Any,
    constrained: Sequence[Constrained],
    described: Sequence[Weight],
    aliases: Mapping[str, Sequence[str]],
) -> dict[str, Array]:
    """Gradients by the names of constrained arrays, checked; those that are missing left out."""
    given = flatten(gradients)
    shapes = {weight.name: weight.shape for weight in described}
    unknown = [name for name in given if name not in shapes]
    if unknown:
        raise AdapterError(
            f"{unknown[0]} has a gradient but is no entry of the model, whose entries are called "
            f"{', '.join(map(repr, list(shapes)[:5]))}, …"
        )
    result = {}
    for c in constrained:
        names = (c.name, *aliases.get(c.name, ()))
        name = next((n for n in names if given.get(n) is not None), None)
        if name is None:
            continue
        gradient = given[name]
        if not is_array(gradient) or library(gradient) != library(c.array):
            raise AdapterError(
                f"the gradient of {name} is a {type(gradient).__module__}."
                f"{type(gradient).__name__}, no array of {library(c.array)} as its weight: "
                f"convert it first"
            )
        if tuple(gradient.shape) != shapes[c.name]:
            raise AdapterError(
                f"{name} has shape {shapes[c.name]}, but its gradient {tuple(gradient.shape)}: "
                f"pass the gradient of the array itself"
            )
        check_writeable(f"the gradient of {name}", gradient)
        result[c.name] = gradient
    return result


def _why_not(rule: Any, geometry: Geometry) -> str:
    """Why vectors of the operator's own norm cannot be followed; empty if they can."""
    sized = isinstance(geometry, Dense) or geometry.grid is not None
    if sized or not rule.needs_input_size():
        return ""
    return (
        f"the operator's norm depends on the size of its input, which {geometry.describe()} "
        f"leaves open: name the input_shape in geometries="
    )


def _check_rule(rule: Any) -> None:
    check_stage(rule, _NEEDS)
    if rule.stage == "forward" and rule.trained_scale() is not None:
        raise AdapterError(
            f"{rule!r}: arrays have no automatic differentiation to train a scale with; give a "
            f"number or a schedule"
        )
