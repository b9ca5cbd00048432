"""Checks that errors are reported, and that none leaves some weights written and others not."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest

from specops.errors import NonFiniteError, PlanError, SpecopsError
from specops.geometry import Dense
from specops.rules import (
    ClipSpectralNorm,
    Monitor,
    SpectralNormalization,
    SpectralNormPenalty,
)
from specops.testing.base import BOUND, SuiteBase, advanced, changed, listed
from specops.training.plan import Plan

_CLIP = ClipSpectralNorm(BOUND)
_OF_STAGE = {
    "weights": _CLIP,
    "gradients": SpectralNormPenalty(0.1, norm="reshaped"),
    "forward": SpectralNormalization(norm="reshaped"),
}


class BadInputChecks(SuiteBase):
    """Errors name the layer and leave all weights alone."""

    def test_nan_in_a_weight_is_named(self) -> None:
        """Without an error a diverged run would go on."""
        self.needs("weights")
        within, refusal = self.capabilities.nonfinite_within, self.capabilities.refuses_nonfinite
        kinds = (NonFiniteError,) if refusal is None else (NonFiniteError, refusal)
        expected = " or ".join(kind.__name__ for kind in kinds)
        for name in self.ruled():
            training = self.start(self.model(), Plan([(name, _CLIP)]))
            training.step()
            training.set_weight(name, _poisoned(training.weights()[name]))
            error = _raised(partial(advanced, training, within), kinds)
            assert error is not None, (
                f"{name} holds NaN, and {within} step(s) of {_CLIP!r} raised no {expected}. "
                f"Likely cause: the error is swallowed, or the weight is not checked before the "
                f"rule"
            )
            # The framework itself may have raised first, in its own words.
            assert name in str(error) or not isinstance(error, NonFiniteError), (
                f"the NonFiniteError does not name the layer {name!r}: {str(error)!r}. Likely "
                f"cause: it comes from the core and was not caught and named"
            )

    def test_nan_leaves_every_weight_as_it_was(self) -> None:
        """project() computes all new weights before it writes the first."""
        self.needs("weights")
        self.needs_a_changed_model()
        model = self.model()
        training = self.start(model, Monitor())
        training.step()
        name = self.constrained(training)[-1]
        training.detach()
        training.set_weight(name, _poisoned(training.weights()[name]))
        before = training.weights()
        error = _raised(lambda: self.project(model, _CLIP))
        assert error is not None, (
            f"{name} holds NaN, and project() raised no NonFiniteError. Likely cause: the error "
            f"is swallowed"
        )
        assert name in str(error), (
            f"the NonFiniteError of project() does not name the layer {name!r}: {str(error)!r}. "
            f"Likely cause: it comes from the core and was not caught and named"
        )
        moved = changed(training.weights(), before, 0.0)
        assert not moved, (
            f"project() raised about {name}, yet changed {listed(moved)} (relative change). "
            f"Compute all, check, then write"
        )

    def test_a_rule_that_fails_leaves_every_weight_as_it_was(self) -> None:
        """An error at one layer leaves the others unconstrained, too."""
        self.needs("weights")
        last = self.ruled()[-1]

        def bound(step: int, name: str, geometry: Any) -> float:
            if name == last:
                raise ValueError("this layer has no bound")
            return BOUND

        try:
            training = self.start(self.model(), ClipSpectralNorm(bound))
        except (ValueError, SpecopsError):
            return  # raised by attach(), before anything could be written
        before = training.weights()
        try:
            training.step()
        except (ValueError, SpecopsError):
            pass
        else:
            pytest.fail(f"the schedule of a rule raised for {last}, and step() did not")
        weights = training.weights()
        moved = changed(weights, self.plain(1).weights())
        # A functional step that raises returns nothing.
        if moved and changed(weights, before):
            pytest.fail(
                f"a rule failed at {last}, the last weight, yet {listed(moved)} were written "
                f"(relative change against the plain step). Compute all, check, then write"
            )

    @pytest.mark.parametrize(
        "plan",
        [
            pytest.param(Plan([("no.such.layer", _CLIP)]), id="names nothing"),
            pytest.param(ClipSpectralNorm, id="class"),
            pytest.param([("*", _CLIP)], id="list"),
        ],
    )
    def test_a_plan_that_cannot_hold_is_refused(self, plan: Any) -> None:
        """With a PlanError, before anything is changed."""
        self._refused(plan, PlanError)

    def test_geometries_that_name_nothing_are_refused(self) -> None:
        """A misspelt name would leave the inferred geometry in force."""
        geometries = {"no.such.layer": Dense()}
        self._refused(Monitor(), PlanError, geometries=geometries)

    def test_unknown_options_are_refused(self) -> None:
        """A misspelt one (`on_nonfinit`) would silently do nothing."""
        try:
            self.start(self.model(), Monitor(), no_such_option=1)
        except (TypeError, ValueError, SpecopsError):
            return
        pytest.fail(
            "attach(..., no_such_option=1) was accepted. Likely cause: the adapter takes "
            "**options and does not hand them on to BaseAttachment"
        )

    def test_a_refused_plan_leaves_nothing_behind(self) -> None:
        """No hook on the model keeps a rule of a refused plan alive."""
        self.needs("weights")
        self.needs_a_changed_model()
        model, bound = self.model(), _Bound()
        plan = Plan([("no.such.layer", _CLIP), ("*", ClipSpectralNorm(bound))])
        kept = weakref.ref(bound)
        try:
            self.start(model, plan)
        except PlanError:
            pass
        else:
            return  # that the plan was accepted, another check reports
        del plan, bound
        _assert_freed(
            kept,
            model,
            "the rule of a plan that was refused is still alive, with nothing but the model "
            "around: a hook was hung on it before assign() and left there",
        )

    def test_rules_of_other_stages_are_refused(self) -> None:
        """An adapter must not accept rules that it does not run."""
        for stage, rule in _OF_STAGE.items():
            if stage not in self.capabilities.stages:
                self._refused(rule, SpecopsError)

    def test_detaching_frees(self) -> None:
        """No hook on the model keeps a rule alive."""
        self.needs("weights")
        self.needs_a_changed_model()
        model, bound = self.model(), _Bound()
        training = advanced(self.start(model, ClipSpectralNorm(bound)), 1)
        training.detach()
        kept = weakref.ref(bound)
        del training, bound
        _assert_freed(
            kept,
            model,
            "the rule is still alive after detach(), with nothing but the model around: a hook "
            "was left on it, or a cache holds the rule",
        )

    def _refused(self, plan: Any, kind: type[Exception], **options: Any) -> None:
        model = self.model()
        try:
            self.start(model, plan, **options)
        except kind:
            pass
        except Exception as error:
            pytest.fail(
                f"{plan!r} {options or ''}: expected {kind.__name__}, got "
                f"{type(error).__name__}: {error}. Plan.of, Plan.assign and override_geometries "
                f"raise what is expected"
            )
        else:
            pytest.fail(
                f"{plan!r} {options or ''} was accepted; expected {kind.__name__}. Likely "
                f"cause: the adapter does not go through Plan.of, Plan.assign and "
                f"override_geometries, or runs no rules of this stage"
            )
        moved = changed(self.start(model, Monitor()).weights(), self.plain().weights(), 0.0)
        assert not moved, f"refusing {plan!r} changed {listed(moved)} (relative change)"


class _Bound:
    """A schedule to which a weak reference can be held."""

    def __call__(self, step: int, name: str, geometry: Any) -> float:
        return BOUND


def _poisoned(weight: np.ndarray) -> np.ndarray:
    values = weight.copy()
    values.flat[-1] = np.nan
    return values


def _raised(
    act: Callable[[], Any], kinds: tuple[type[Exception], ...] = (NonFiniteError,)
) -> Exception | None:
    try:
        act()
    except kinds as error:
        return error
    return None


def _assert_freed(kept: weakref.ref[Any], model: Any, message: str) -> None:
    """Assert that nothing holds it, while the model is still alive."""
    gc.collect()
    assert kept() is None, message
    assert model is not None
