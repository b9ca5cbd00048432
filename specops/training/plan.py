"""Plans: which rule acts on which weight, and at which steps."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from specops.errors import AdapterError, GeometryError, PlanError, UnsupportedArrayError
from specops.geometry.arguments import integer
from specops.rules import Rule, StagedRule, completed
from specops.tables import some_names
from specops.training.weight import Weight, is_named


@dataclass(frozen=True)
class Assignment:
    """What a plan decided about one weight: a rule, or the reason why there is none."""

    weight: Weight
    rule: StagedRule | None
    every: int = 1
    reason: str = ""
    lenient: bool = False
    """Whether the weight is skipped, with no error, if the rule turns out not to suit its map."""


NO_MAP = "no geometry is known for it"
"""The reason to leave a weight alone that has no geometry and names no obstacle."""
_KINDS = ("conv", "dense", "embedding")


@dataclass(frozen=True)
class _Entry:
    pattern: str
    rule: StagedRule | None
    every: int | None = None

    @property
    def kind(self) -> str:
        """The kind of maps that a pattern such as "conv:*" asks for; empty if it asks for none."""
        head, colon, _ = self.pattern.partition(":")
        return head if colon and head in _KINDS else ""

    @property
    def names(self) -> str:
        """The pattern of names, without the kind."""
        return self.pattern.removeprefix(f"{self.kind}:") if self.kind else self.pattern

    @property
    def is_bare(self) -> bool:
        return self.names == "*" and self.kind != "embedding"

    def matches(self, weight: Weight) -> bool:
        return self.kind in ("", weight.kind) and is_named(weight.name, self.names)


@dataclass(frozen=True)
class Plan:
    """An ordered list of (pattern, rule) pairs; the first pattern that matches a name wins.

    Parameters
    ----------
    entries : sequence of (pattern, rule) or (pattern, rule, every)
        `pattern` is matched against a parameter's full name, with the wildcards of `fnmatch`
        (case matters). With "conv:", "dense:" or "embedding:" before it, it matches only
        parameters which are that kind of map. The rule None leaves what it matches alone, and
        `every` replaces the plan's interval for this entry.

        The patterns "*", "conv:*" and "dense:*" are lenient: they skip what they cannot
        constrain, with a reason in the report, and leave embeddings alone. Any other pattern
        that meets an unsupported layer, or constrains nothing, is an error.
    every, start, stop : int
        Rules act at the steps with ``(step - start) % every == 0`` and ``start < step < stop``;
        steps are successful optimizer steps, counted from 1.

    Raises
    ------
    PlanError
        An entry is neither of these, a number is out of range, or no step is left at which a
        rule acts.

    Examples
    --------
    >>> from specops import ClipSpectralNorm
    >>> plan = Plan([("head.*", None), ("*", ClipSpectralNorm(1.0))], every=10)
    >>> [step for step in range(1, 31) if plan.fires(step)]
    [10, 20, 30]
    """

    entries: Sequence[tuple[Any, ...]]
    every: int = 1
    start: int = 0
    stop: int | None = None
    _parsed: tuple[_Entry, ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        fix = object.__setattr__
        try:
            fix(self, "every", integer(self.every, "every", least=1))
            fix(self, "start", integer(self.start, "start", least=0))
            if self.stop is not None:
                fix(self, "stop", integer(self.stop, "stop", least=self.start + 2))
        except GeometryError as error:
            raise PlanError(str(error)) from None
        if isinstance(self.entries, Mapping | str) or not isinstance(self.entries, Iterable):
            raise PlanError(f"a plan takes a list of (pattern, rule) pairs, got {self.entries!r}")
        fix(self, "_parsed", tuple(_parse(entry) for entry in self.entries))
        if not self._parsed:
            raise PlanError("the plan is empty: give it at least one (pattern, rule) pair")
        for entry in self._parsed:
            self._check_fires(entry)

    @classmethod
    def of(cls, rule_or_plan: Any, every: int | None = None) -> Plan:
        """A plan from a rule for all weights ("*") or from a plan, with `every` if it is given."""
        if isinstance(rule_or_plan, Plan):
            return rule_or_plan if every is None else replace(rule_or_plan, every=every)
        if isinstance(rule_or_plan, list | tuple | dict):
            raise PlanError(
                f"wrap several rules in a plan: Plan([(pattern, rule), ...]), not {rule_or_plan!r}"
            )
        return cls([("*", rule_or_plan)], every=1 if every is None else every)

    def once(self) -> Plan:
        """The plan for a single firing without training, at step 1: every rule acts.

        Raises
        ------
        AdapterError
            The plan has a rule on gradients, and without training there are none.
        """
        for entry in self._parsed:
            if entry.rule is not None and entry.rule.stage == "gradients":
                raise AdapterError(
                    f"{entry.rule!r} acts on gradients, and here there are none: attach it instead"
                )
        entries = [(entry.pattern, entry.rule) for entry in self._parsed]
        return Plan(entries)

    def fires(self, step: int, every: int | None = None) -> bool:
        """Whether rules act at this step (at an interval of their own, if they have one)."""
        interval = self.every if every is None else every
        if step <= self.start or (self.stop is not None and step >= self.stop):
            return False
        return (step - self.start) % interval == 0

    def assign(self, weights: Sequence[Weight], *, again: bool = False) -> list[Assignment]:
        """Decide about every weight; raise `PlanError` if a pattern cannot be followed.

        `again`, with a model that was assigned before, a pattern may match nothing any more:
        layers may have been frozen or removed.
        """
        used: list[list[Assignment]] = [[] for _ in self._parsed]
        result = []
        for weight in weights:
            for entry, taken in zip(self._parsed, used, strict=True):
                if entry.matches(weight):
                    taken.append(self._decide(entry, weight))
                    result.append(taken[-1])
                    break
            else:
                result.append(Assignment(weight, None, reason="no pattern of the plan matches"))
        if not again:
            for entry, taken in zip(self._parsed, used, strict=True):
                self._check_used(entry, taken, weights)
        return result

    def _decide(self, entry: _Entry, weight: Weight) -> Assignment:
        if weight.skipped:
            return Assignment(weight, None, reason=weight.skipped)
        if entry.rule is None:
            return Assignment(weight, None, reason=f"excluded by {entry.pattern!r}")
        if weight.obstacle or weight.geometry is None:
            reason = weight.obstacle or NO_MAP
            if entry.is_bare:
                return Assignment(weight, None, reason=reason)
            raise PlanError(
                f"{weight.name} (shape {weight.shape}) is named by pattern {entry.pattern!r} "
                f"but cannot be constrained: {reason}. Exclude it with "
                f'("{weight.name}", None) before that pattern, or pass '
                f"geometries={{'{weight.name}': ...}}"
            )
        reason = entry.rule.obstacle(weight.geometry)
        if reason and entry.is_bare:
            return Assignment(weight, None, reason=reason)
        if reason:
            raise PlanError(f"{weight.name}: {entry.rule!r} cannot act on it: {reason}")
        if weight.opt_in and entry.is_bare:
            return Assignment(weight, None, reason=weight.opt_in)
        if weight.unusable:
            raise UnsupportedArrayError(f"{weight.name} {weight.unusable}")
        every = self.every if entry.every is None else entry.every
        return Assignment(weight, entry.rule, every, lenient=entry.is_bare)

    def _check_fires(self, entry: _Entry) -> None:
        every = self.every if entry.every is None else entry.every
        if entry.rule is None or entry.rule.stage == "forward" or self.stop is None:
            return
        if self.start + every >= self.stop:
            raise PlanError(
                f"{entry.rule!r} of {entry.pattern!r} never acts: with every={every} the first "
                f"step after start={self.start} is {self.start + every}, and stop={self.stop}"
            )

    def _check_used(
        self, entry: _Entry, assignments: list[Assignment], weights: Sequence[Weight]
    ) -> None:
        if any(a.rule is not None for a in assignments) or (entry.rule is None and assignments):
            return
        if entry.is_bare and len(self._parsed) > 1:
            return
        names = [w.name for w in weights]
        if not names:
            raise PlanError(
                "the model has no parameters to act on: if it is quantised or a frozen program, "
                "pass the model that it was made from"
            )
        if assignments:
            reasons = "; ".join(f"{a.weight.name}: {a.reason}" for a in assignments[:5])
            raise PlanError(
                f"pattern {entry.pattern!r} constrains nothing. Every parameter that it matches "
                f"was skipped ({reasons})"
            )
        if any(entry.matches(w) for w in weights):
            raise PlanError(
                f"pattern {entry.pattern!r} matches only parameters that an earlier pattern "
                f"took: put it first, or drop it"
            )
        if entry.kind and any(is_named(name, entry.names) for name in names):
            raise PlanError(
                f"pattern {entry.pattern!r} matches no parameter: those with a name that matches "
                f"{entry.names!r} are no {entry.kind} maps"
            )
        layer = f"{entry.names}.*"
        hint = f"; for the whole layer write {layer!r}" if fnmatch.filter(names, layer) else ""
        raise PlanError(
            f"pattern {entry.pattern!r} matches no parameter{hint}. Parameters are called "
            f"{some_names(names, entry.names)}"
        )


def _parse(entry: Any) -> _Entry:
    if not isinstance(entry, tuple | list) or len(entry) not in (2, 3):
        raise PlanError(
            f"a plan's entry must be (pattern, rule) or (pattern, rule, every), got {entry!r}"
        )
    pattern, rule = entry[:2]
    if not isinstance(pattern, str) or not pattern:
        raise PlanError(f"a pattern must be a non-empty string, got {pattern!r}")
    if rule is not None and (isinstance(rule, type) or not isinstance(rule, Rule)):
        raise PlanError(
            f"{rule!r} is no rule: pass an instance such as ClipSpectralNorm(1.0), or None to "
            f"exclude what {pattern!r} matches"
        )
    every = None
    if len(entry) == 3:
        try:
            every = integer(entry[2], "every", least=1)
        except GeometryError as error:
            raise PlanError(str(error)) from None
    return _Entry(pattern, None if rule is None else completed(rule), every)
