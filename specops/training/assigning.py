"""`assigned`: apply a plan to the parameters of a model, at first and whenever they change."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
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
    """The part of an attachment that `assigned` uses."""

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
    """Apply the plan: (a decision about every parameter, the weights under a rule).

    Weights in `constrained`, which an earlier call returned, go on with their states and sizes, or
    are released if no rule acts on them any more. On an error no new weight stays constrained. If
    the error is found before layers are changed, as errors of the plan are, the weights in
    `constrained` stay as they were. The first call warns if the plan leaves most matrices
    alone; in later calls, with `again`, a pattern need not match a weight any more.

    Raises
    ------
    PlanError
        The plan does not fit, or a rule cannot act on a weight that a pattern names.
    AdapterError
        The adapter does not run a rule, or two parameters have the same name.
    """
    parameters = attachment.parameters()
    _check_names(parameters)
    weights = override_geometries(
        [p.weight for p in parameters],
        geometries,
        aliases={p.weight.name: p.aliases for p in parameters},
        again=again,
    )
    decided = attachment.plan.assign(weights, again=again)
    before = {c.parameter.place: c for c in constrained}
    new: list[C] = []
    with _undone_on_error(parameters, new):
        pairs = [(p, _settled(attachment, p, a)) for p, a in zip(parameters, decided, strict=True)]
        assignments = [a for _, a in pairs]
        acting = [(p, a, _continued(before, p, a)) for p, a in pairs if a.rule is not None]
        if not again:
            warn_of_coverage(assignments)
        left: dict[Any, Assignment] = {}
        for p, a in pairs:
            if a.rule is None:
                left.setdefault(p.place, a)
        staying = [
            (c, left[place])
            for place, c in before.items()
            if place in left and attachment.goes_on(c, left[place])
        ]
        # Released before others are taken, for a tied weight may be taken at another of its places.
        for c in before.values():
            if not any(c is other for other, _ in staying):
                c.release()
        result: list[C] = []
        for p, a, kept in acting:
            if kept is None:
                kept = _taken(attachment, p, a)
                new.append(kept)
            result.append(kept)
    for p, a, kept in acting:
        if kept is not None:
            kept.resume(p, a)
    for c, a in staying:
        c.rename(a.weight.name)
    return assignments, [*result, *(c for c, _ in staying)]


@contextmanager
def _undone_on_error(parameters: Sequence[Parameter], new: Sequence[C]) -> Iterator[None]:
    """On an error, release the `new` weights and describe parameters as they were."""
    described = [(p, p.weight, p.declared) for p in parameters]
    try:
        yield
    except BaseException:
        for c in new:
            c.release()
        for p, weight, is_declared in described:
            p.weight, p.declared = weight, is_declared
        raise


def _settled(attachment: Attaching[C], parameter: Parameter, decided: Assignment) -> Assignment:
    """What the plan decided, if the adapter and the weight allow it; notes a declared map."""
    attachment.check_rule(decided.rule)
    if decided.weight is not parameter.weight:
        parameter.weight, parameter.declared = decided.weight, True
    return _checked(decided, parameter)


def _continued(before: dict[Any, C], parameter: Parameter, assignment: Assignment) -> C | None:
    """The constrained weight that goes on, taken out of `before`; None for a new one."""
    kept = before.get(parameter.place)
    if kept is None or kept.rule is not assignment.rule or not kept.is_of(parameter, assignment):
        return None
    return before.pop(parameter.place)


def _check_names(parameters: Sequence[Parameter]) -> None:
    """Raise if two parameters have one name, because states and reports are keyed by names."""
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
    """Why the rule cannot track the operator's norm without an input size; empty if it can."""
    if geometry.has_size or not rule.needs_input_size():
        return ""
    return (
        f"the operator's norm depends on the size of its input, which {geometry.describe()} "
        f"leaves open: name the input_shape in geometries="
    )


def _taken(attachment: Attaching[C], parameter: Parameter, assignment: Assignment) -> C:
    """A weight that comes under a rule, with its hooks in place."""
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
