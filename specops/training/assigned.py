"""`Assigned`: the base of the classes in which adapters keep one weight under a rule."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, cast

from specops.errors import AdapterError
from specops.geometry import Geometry
from specops.rules import ForwardRule, GradientRule, StagedRule, WeightRule
from specops.rules.base import Stage
from specops.training.cautions import caution
from specops.training.plan import Assignment


class Assigned:
    """Shorthands for the parts of an `assignment` that has a rule."""

    assignment: Assignment

    @property
    def name(self) -> str:
        """The parameter's path."""
        return self.assignment.weight.name

    @property
    def rule(self) -> StagedRule:
        """The rule that acts on it."""
        rule = self.assignment.rule
        assert rule is not None
        return rule

    @property
    def weight_rule(self) -> WeightRule:
        """The rule, of stage "weights"."""
        return cast(WeightRule, self.rule)

    @property
    def gradient_rule(self) -> GradientRule:
        """The rule, of stage "gradients"."""
        return cast(GradientRule, self.rule)

    @property
    def forward_rule(self) -> ForwardRule:
        """The rule, of stage "forward"."""
        return cast(ForwardRule, self.rule)

    @property
    def stage(self) -> Stage:
        """When the rule acts."""
        return self.rule.stage

    @property
    def geometry(self) -> Geometry:
        """The map that the weight stands for."""
        geometry = self.assignment.weight.geometry
        assert geometry is not None
        return geometry


def warn_of(assignment: Assignment) -> None:
    """Warn of what the rule's `caution` says about a weight that it begins to act on."""
    rule, weight = assignment.rule, assignment.weight
    if rule is None or weight.geometry is None:
        return
    message = rule.caution(weight.geometry, tuple(weight.shape))
    if message:
        caution(f"{weight.name}: {message}")


def inactive(*, was_assigned: bool) -> AdapterError:
    """The error to raise if an attachment should act that is detached, or not yet assigned."""
    if was_assigned:
        return AdapterError("this attachment is detached and does nothing: attach again")
    return AdapterError(
        "this attachment has no weights yet: its adapter has to call assign() when the model is "
        "at hand"
    )


def check_saved(
    state: Mapping[str, Any], names: Iterable[str], assignments: Iterable[Assignment]
) -> None:
    """Raise unless a saved state is of a known version and of these weights.

    `assignments` tell why others are left alone.

    Raises
    ------
    AdapterError
        The state is of another version, or names other weights.
    """
    if "version" not in state:
        raise AdapterError("the state is not from an attachment's state_dict: it has no version")
    if state["version"] != 1:
        raise AdapterError(f"the state has the unknown version {state['version']!r}")
    expected, found = set(names), set(state["weights"])
    left = {a.weight.name: a.reason for a in assignments if a.weight.name not in expected}
    known = sorted(found & left.keys())
    if known and not expected - found:
        raise AdapterError(
            f"{', '.join(known)} had a rule when the state was saved and now has none "
            f"({left[known[0]]}): attach and load it first, then freeze layers or exchange "
            f"optimizers as that run did"
        )
    if expected != found:
        raise AdapterError(
            f"the state is of other weights: missing {sorted(expected - found)}, unexpected "
            f"{sorted(found - expected)}. Attach the same plan to a model of the same names; "
            f"where names are made up, give layers names"
        )


def check_stage(rule: Any, needs: Mapping[str, str]) -> None:
    """Raise unless a rule's stage is among those of an adapter, and has the method it needs.

    Parameters
    ----------
    rule : rule or None
        None stands for a parameter that is left alone, which needs no check.
    needs : mapping of str to str
        For each stage of the adapter, the method of a rule that it calls.

    Raises
    ------
    AdapterError
        The adapter does not have the rule's stage, or the rule lacks that method.
    """
    if rule is None:
        return
    needed = needs.get(rule.stage)
    if needed is None or not hasattr(rule, needed):
        lacks = f"; such a rule needs a method {needed!r}" if needed else ""
        raise AdapterError(
            f"{rule!r} acts in stage {rule.stage!r}; this adapter runs rules of the stages "
            f"{', '.join(map(repr, needs))}{lacks}"
        )
