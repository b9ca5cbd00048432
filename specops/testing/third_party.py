"""Checks that third-party rules act: one per stage, as small as the protocols allow."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np

from specops import arrays
from specops.geometry import Geometry
from specops.rules import Monitor
from specops.testing.base import SuiteBase, advanced, listed, relative
from specops.training.plan import Plan
from specops.typing import Array, State

_RADIUS = 0.75
_FACTOR = 4.0
_RTOL = 1e-4
"""Tolerance of one step in single precision."""
_APART = 1e-3
"""Tolerance of the difference of two steps in single precision."""


class _Minimal:
    """The members that all three rules share."""

    def init(self, weight: Array, geometry: Geometry, name: str) -> State:
        return {}

    def update(
        self, weight: Array, geometry: Geometry, state: State, *, step: int = 1, name: str = ""
    ) -> tuple[Array, State, dict[str, Any]]:
        return weight, state, {}


@dataclass(frozen=True)
class ScaleIntoBall(_Minimal):
    """W·min(1, r/‖W‖_F) after the step."""

    stage: ClassVar[Literal["weights"]] = "weights"

    def update(
        self, weight: Array, geometry: Geometry, state: State, *, step: int = 1, name: str = ""
    ) -> tuple[Array, State, dict[str, Any]]:
        xp, norm = arrays.namespace(weight), _frobenius(weight)
        factor = xp.where(norm > _RADIUS, _RADIUS / norm, xp.ones_like(norm))
        return weight * factor, state, {"factor": factor}


@dataclass(frozen=True)
class AddMultiple(_Minimal):
    """c·W, added to the gradient."""

    stage: ClassVar[Literal["gradients"]] = "gradients"

    def update(
        self, weight: Array, geometry: Geometry, state: State, *, step: int = 1, name: str = ""
    ) -> tuple[Array, State, dict[str, Any]]:
        return _FACTOR * weight, state, {}


@dataclass(frozen=True)
class DivideByNorm(_Minimal):
    """W/‖W‖_F in the forward pass."""

    stage: ClassVar[Literal["forward"]] = "forward"

    def apply(
        self, weight: Array, geometry: Geometry, state: State, *, step: int = 1, name: str = ""
    ) -> Array:
        return weight / _frobenius(weight)


class ThirdPartyChecks(SuiteBase):
    """Rules that have only what their stage requires."""

    def test_a_rule_of_others_acts_on_weights(self) -> None:
        """One step ends where the plain step, projected in double precision, does."""
        self.needs("weights")
        training = advanced(self.start(self.model(), ScaleIntoBall()), 1)
        plain, weights = self.plain(1).weights(), training.weights()
        records = {record["name"]: record for record in training.history()}
        for name in self.constrained(training):
            w = plain[name].astype(np.float64)
            factor = min(1.0, _RADIUS / float(np.linalg.norm(w)))
            apart = relative(weights[name].astype(np.float64), factor * w)
            assert apart <= _RTOL, (
                f"{name}: a rule with nothing but init and update led to a weight that differs "
                f"by {apart:.3g} (relative) from its result. Likely cause: the adapter ignores "
                f"third-party rules, or needs members that they need not have"
            )
            shown = records[name].get("factor")
            assert shown is not None, f"{name}: the rule's figure is not in the history"
            assert abs(float(shown) - factor) <= _RTOL * factor, (
                f"{name}: the history says factor {float(shown):.6g}, it was {factor:.6g}"
            )
        weights = advanced(training, 2).weights()
        norms = {n: float(np.linalg.norm(weights[n])) for n in self.constrained(training)}
        above = {name: norm for name, norm in norms.items() if norm > _RADIUS * (1 + _RTOL)}
        assert not above, f"after step 3 Frobenius norms exceed {_RADIUS}: {listed(above)}"

    def test_a_rule_of_others_acts_on_gradients(self) -> None:
        """c·W in the gradient moves every weight along -W, at one rate."""
        self.needs("gradients")
        start = self.start(self.model(), Monitor())
        initial, plain = start.weights(), self.plain(1).weights()
        names = self.constrained(start)
        plan = Plan([(name, AddMultiple()) for name in names])
        weights = advanced(self.start(self.model(), plan), 1).weights()
        rates = {}
        for name in names:
            w = initial[name].astype(np.float64)
            moved = weights[name].astype(np.float64) - plain[name]
            rates[name] = -float(np.sum(moved * w) / (_FACTOR * np.sum(w * w)))
            rest = float(np.linalg.norm(moved + rates[name] * _FACTOR * w))
            assert rates[name] > 0, (
                f"{name}: c·W in the gradient did not move the weight towards 0. Likely cause: "
                f"the adapter ignores third-party rules, or subtracts what update() returns"
            )
            assert rest <= _APART * float(np.linalg.norm(moved)), (
                f"{name}: c·W in the gradient moved the weight in another direction than -W. "
                f"Likely cause: start() has no plain gradient descent, or the adapter rescales"
            )
        assert max(rates.values()) <= (1 + _APART) * min(rates.values()), (
            f"c·W in the gradients moved weights at different rates ({listed(rates)})"
        )

    def test_a_rule_of_others_acts_in_the_forward_pass(self) -> None:
        """Outputs are those of a plain model with weights W/‖W‖_F."""
        self.needs("forward")
        training = advanced(self.start(self.model(), DivideByNorm()), 3)
        weights = training.weights()
        used = {}
        for name in self.constrained(training):
            w = weights[name].astype(np.float64)
            used[name] = (w / np.linalg.norm(w)).astype(weights[name].dtype)
        apart = relative(training.outputs(), self.outputs_with(weights | used))
        assert apart <= _RTOL, (
            f"outputs differ by {apart:.3g} (relative) from those of weights W/‖W‖_F. Likely "
            f"cause: the adapter ignores third-party rules, or applies them to an old weight"
        )


def _frobenius(weight: Array) -> Array:
    xp = arrays.namespace(weight)
    return xp.linalg.vector_norm(xp.reshape(weight, (-1,)))
