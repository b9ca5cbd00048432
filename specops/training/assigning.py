"""What a plan decides about the parameters of a model, now and whenever they change."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol, TypeVar

from specops.errors import AdapterError, PlanError, SpecopsError
from specops.geometry import Geometry
from specops.training.assigned import warn_of
from specops.training.constrained import Constrained
from specops.training.coverage import warn_of_coverage
from specops.training.declared import override_geometries
from specops.training.parameter import Parameter
from specops.training.plan import Assignment, Plan

C = TypeVar("C", bound=Constrained[Any])
C_co = TypeVar("C_co", bound=Constrained[Any], covariant=True)


class Attaching(Protocol[C_co]):
    """What is asked of an attachment here."""

    plan: Plan

    def parameters(self) -> Sequence[Parameter]: ...
    def check_rule(self, rule: Any) -> None: ...
    def constrain(self, parameter: Any, assignment: Assignment) -> C_co: ...
    def goes_on(self, c: Any, decided: Assignment) -> bool: ...


def assigned(
    attachment: Attaching[C],
    geometries: Mapping[str, Geometry],
    constrained: Sequence[C],
    *,
    again: bool,
) -> tuple[list[Assignment], list[C]]:
    """(a decision about every parameter, those under a rule).

    Those constrained before go on with their states and sizes, or are released. An error leaves
    nothing of the others behind; one of the plan, and all that is known before layers are changed,
    leaves those as they are. At first what the plan leaves alone is warned of; `again`, patterns
    may have nothing left to act on.

    Raises
    ------
    PlanError
        The plan does not fit, or a rule cannot act on a weight that a pattern names.
    AdapterError
        A rule that the adapter does not run, or two parameters of one name.
    """
    parameters = attachment.parameters()
    _check_names(parameters)
    weights = override_geometries(
        [p.weight for p in parameters],
        geometries,
        aliases={p.weight.name: p.aliases for p in parameters},
        again=again,
    )
    before = {c.parameter.place: c for c in constrained}
    assignments: list[Assignment] = []
    left: dict[Any, Assignment] = {}
    acting: list[tuple[Parameter, Assignment, C | None]] = []
    result: list[C] = []
    new: list[C] = []
    listed = [(p, p.weight, p.declared) for p in parameters]
    pairs = zip(parameters, attachment.plan.assign(weights, again=again), strict=True)
    try:
        for parameter, decided in pairs:
            attachment.check_rule(decided.rule)
            if decided.weight is not parameter.weight:
                parameter.weight, parameter.declared = decided.weight, True
            assignment = _checked(decided, parameter)
            assignments.append(assignment)
            if assignment.rule is None:
                left.setdefault(parameter.place, assignment)
                continue
            kept = before.get(parameter.place)
            same = kept is not None and kept.rule is assignment.rule
            goes_on = kept is not None and same and kept.is_of(parameter, assignment)
            acting.append((parameter, assignment, before.pop(parameter.place) if goes_on else None))
        if not again:
            warn_of_coverage(assignments)
        staying = [
            (c, left[place])
            for place, c in before.items()
            if place in left and attachment.goes_on(c, left[place])
        ]
        for c in before.values():
            # First, for a tied weight may be taken at another of its places.
            if not any(c is other for other, _ in staying):
                c.release()
        for parameter, assignment, kept in acting:
            if kept is None:
                kept = _taken(attachment, parameter, assignment)
                new.append(kept)
            result.append(kept)
    except BaseException:
        for c in new:
            c.release()
        for p, weight, declared in listed:
            p.weight, p.declared = weight, declared
        raise
    for parameter, assignment, kept in acting:
        if kept is not None:
            kept.resume(parameter, assignment)
    for c, decided in staying:
        c.rename(decided.weight.name)
    return assignments, [*result, *(c for c, _ in staying)]


def _check_names(parameters: Sequence[Parameter]) -> None:
    """Raise where a name stands for two: states and reports go by names."""
    named: dict[str, Parameter] = {}
    for p in parameters:
        other = named.setdefault(p.weight.name, p)
        if other is not p:
            raise AdapterError(
                f"two parameters are called {p.weight.name!r}, of shapes {other.weight.shape} and "
                f"{p.weight.shape}: the adapter has to give each a name of its own"
            )


def _checked(assignment: Assignment, parameter: Parameter) -> Assignment:
    """The assignment, if its rule can act on such a weight."""
    rule, weight = assignment.rule, assignment.weight
    if rule is None or parameter.learns_size:
        return assignment
    assert weight.geometry is not None
    reason = _unsized(rule, weight.geometry)
    if reason and not assignment.lenient:
        raise PlanError(f"{weight.name}: {rule!r} cannot act on it: {reason}")
    return replace(assignment, rule=None, reason=reason) if reason else assignment


def _unsized(rule: Any, geometry: Geometry) -> str:
    """Why vectors of the operator's own norm cannot be followed; empty if they can."""
    if geometry.has_size or not rule.needs_input_size():
        return ""
    return (
        f"the operator's norm depends on the size of its input, which {geometry.describe()} "
        f"leaves open: name the input_shape in geometries="
    )


def _taken(attachment: Attaching[C], parameter: Parameter, assignment: Assignment) -> C:
    """A weight that a rule comes to act on."""
    warn_of(assignment)
    parameter.watch()
    c = attachment.constrain(parameter, assignment)
    if c.stage != "forward":
        return c
    try:
        c.prepare()
    except BaseException as error:
        c.release()
        if isinstance(error, SpecopsError):
            raise type(error)(f"{c.name}: {error}") from error
        raise
    return c
