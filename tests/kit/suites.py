"""The kit on "tiny": its adapter, and adapters that are broken on purpose.

Not collected by name: `test_kit` runs it in a process of its own.
"""

from __future__ import annotations

import gc
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from specops import Dense, Monitor, Plan
from specops.geometry import Geometry
from specops.testing import AdapterSuite, Capabilities, LayerCase
from specops.training.report import Report, measured
from tests.kit import framework
from tests.kit.adapter import Attachment, Kernel, TinyAdapter
from tests.kit.tiny import Tiny, TinyTraining

gc.freeze()  # What is imported is not looked at by each test that collects.


def flawed(attachment: type[Attachment]) -> type[TinyAdapter]:
    """An adapter with another attachment."""
    return type("Flawed", (TinyAdapter,), {"attachment": attachment})


class TestTiny(Tiny, AdapterSuite):
    """As it should be."""


class TestDenseOnly(Tiny, AdapterSuite):
    """A framework without convolutions."""

    capabilities = Capabilities(convolutions=False, differentiates=False)

    def model(self) -> framework.Model:
        layers = framework.Dense(50, 8), framework.Tanh(), framework.Dense(8, 3)
        return framework.Model(*layers, adapter=self.adapter)


class RefusesNaN(Tiny):
    """A framework that looks at its weights before it steps."""

    capabilities = Capabilities(refuses_nonfinite=FloatingPointError, differentiates=False)

    def start(self, model: framework.Model, rule_or_plan: Any, **options: Any) -> TinyTraining:
        training = super().start(model, rule_or_plan, **options)
        step = training.step

        def looked() -> None:
            if not all(np.isfinite(p).all() for p in model.parameters.values()):
                raise FloatingPointError("the model has diverged")
            step()

        training.step = looked  # type: ignore[method-assign]
        return training


class TestRefusesNaN(RefusesNaN, AdapterSuite):
    """It says so, which is enough."""


class Flawed(Tiny, AdapterSuite):
    """With one law: the others take long and know nothing of adapters."""

    def choices(self) -> Any:
        return super().choices() | {"law": lambda: ["penalty"], "projection": list}


class TestWrongLayout(Flawed):
    """Kernels are read as torch has them."""

    class Flaw(Attachment):
        class kind(Kernel):
            def inferred(self) -> Geometry:
                found = super().inferred()
                return Dense() if isinstance(found, Dense) else replace(found, layout="OI*")

    adapter = flawed(Flaw)


class TestIgnoresStride(Flawed):
    """Strided layers are taken for plain ones."""

    class Flaw(Attachment):
        class kind(Kernel):
            def inferred(self) -> Geometry:
                found = super().inferred()
                return found if isinstance(found, Dense) else replace(found, stride=1)

    adapter = flawed(Flaw)


class TestMutatesInForward(Flawed):
    """Vectors advance in each forward pass."""

    class Flaw(Attachment):
        def use(self, name: str, w: np.ndarray) -> np.ndarray:
            used = super().use(name, w)
            for c in self._constrained:
                if c.name == name and used is not w:
                    c.state = c.rule.update(w, c.geometry, c.state, name=name)[1]
            return used

    adapter = flawed(Flaw)


class TestLosesState(Flawed):
    """A resumed attachment begins anew."""

    class Flaw(Attachment):
        def load_state_dict(self, saved: dict[str, Any]) -> None:
            pass

    adapter = flawed(Flaw)


class TestLosesVectors(Flawed):
    """A resumed attachment knows the step, but the vectors begin anew."""

    class Flaw(Attachment):
        def load_state_dict(self, saved: dict[str, Any]) -> None:
            self.steps = saved["steps"]

    adapter = flawed(Flaw)


class TestSwallowsNaN(Flawed):
    """A weight that cannot be measured is passed over."""

    class Flaw(Attachment):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            self._firing.on_nonfinite = "skip"

    adapter = flawed(Flaw)


class TestIgnoresEvery(Flawed):
    """Rules act at every step."""

    class Flaw(Attachment):
        def fires(self, c: Any, step: int) -> bool:
            return self.plan.stop is None or step < self.plan.stop

    adapter = flawed(Flaw)


class TestWritesAsItGoes(Flawed):
    """Weights are written one by one."""

    class Flaw(Attachment):
        def fire(self, due: Any, step: int, **options: Any) -> None:
            for c in due:
                super().fire([c], step, **options)

    adapter = flawed(Flaw)


class TestStaysOn(Flawed):
    """Detaching leaves the hooks."""

    class Flaw(Attachment):
        def detach(self, *, fold: bool = False) -> None:
            pass

    adapter = flawed(Flaw)


class TestReportsHalf(Flawed):
    """Parameters without a rule are left out."""

    class Flaw(Attachment):
        def report(self, **options: Any) -> Any:
            return Report(super().report(**options).constrained)

    adapter = flawed(Flaw)


class TestSubtracts(Flawed):
    """Penalties pull the wrong way."""

    class Flaw(Attachment):
        def add(self, gradient: np.ndarray, term: np.ndarray) -> np.ndarray:
            return super().add(gradient, -term)

    adapter = flawed(Flaw)


class TestUsesRawWeights(Flawed):
    """Forward rules are accepted and have no effect."""

    class Flaw(Attachment):
        def use(self, name: str, w: np.ndarray) -> np.ndarray:
            return w

        def measured(self, constrained: Any) -> Any:
            return {c.name: measured(c.parameter.read(), c.geometry, c.rule) for c in constrained}

    adapter = flawed(Flaw)


class TestCachesTheNorm(Flawed):
    """Layers use a weight made after the last step, whatever was written since."""

    class Flaw(Attachment):
        def use(self, name: str, w: np.ndarray) -> np.ndarray:
            used = super().use(name, w)
            if used is w:
                return w
            kept = self.__dict__.setdefault("kept", {})
            step, ratio = kept.get(name, (None, None))
            if step != self.steps:
                ratio = np.float32(np.vdot(used, w) / np.vdot(w, w))
                kept[name] = self.steps, ratio
            return ratio * w

    adapter = flawed(Flaw)


class TestKeepsVectors(Flawed):
    """Vectors of forward rules never advance."""

    class Flaw(Attachment):
        def fires(self, c: Any, step: int) -> bool:
            return c.stage != "forward" and super().fires(c, step)

    adapter = flawed(Flaw)


class TestFollowsOldVectors(Flawed):
    """Between firings nobody looks who has written to a weight."""

    class Flaw(Attachment):
        def step(self) -> None:
            super().step()
            for c in self._constrained:
                c.note_norms = lambda: None
                c._norms = None

    adapter = flawed(Flaw)


class TestPenalisesTwice(Flawed):
    """A hook was hung on the optimizer twice."""

    class Flaw(Attachment):
        def before_step(self, gradients: Any) -> None:
            super().before_step(gradients)
            super().before_step(gradients)

    adapter = flawed(Flaw)


class TestClaimsTooLittle(Flawed):
    """Rules of a stage that is not claimed are accepted."""

    capabilities = Capabilities(stages=("weights",), differentiates=False)


class TestSkipsThePlan(Flawed):
    """Patterns that match nothing are let through."""

    class Flaw(Attachment):
        def __init__(self, optimizer: Any, model: Any, plan: Plan, geometries: Any = None) -> None:
            known = {k: g for k, g in (geometries or {}).items() if k in model.parameters}
            entries = [e for e in plan.entries if e[0] == "*" or e[0] in model.parameters]
            plan = replace(plan, entries=entries or [("*", None)])
            super().__init__(optimizer, model, plan, known)

    adapter = flawed(Flaw)


class TestRefusesUnasked(RefusesNaN, Flawed):
    """The framework refuses NaN, and the capabilities do not say so."""

    capabilities = Capabilities(differentiates=False)


class TestHasNoConvolution(Flawed):
    """No convolution, and the capabilities do not say so."""

    def model(self) -> framework.Model:
        return TestDenseOnly.model(self)


class TestTooTame(Flawed):
    """Norms that stay below the bound by themselves."""

    def model(self) -> framework.Model:
        model = super().model()
        for name, p in model.parameters.items():
            model.parameters[name] = np.float32(0.05) * p
        return model

    def start(self, model: Any, rule_or_plan: Any, **options: Any) -> TinyTraining:
        training = super().start(model, rule_or_plan, **options)
        training.optimizer.rate = np.float32(1e-4)
        return training


class TestNeverWrites(Flawed):
    """New weights are computed and forgotten."""

    class Flaw(Attachment):
        def write(self, outcomes: Any) -> None:
            super().write([replace(o, array=o.weight) for o in outcomes])

    adapter = flawed(Flaw)


class TestMonitorActs(Flawed):
    """Rules without an effect have one."""

    class Flaw(Attachment):
        def write(self, outcomes: Any) -> None:
            factor = np.float32(0.99)
            super().write(
                [
                    replace(o, array=factor * o.weight)
                    if isinstance(o.constrained.rule, Monitor)
                    else o
                    for o in outcomes
                ]
            )

    adapter = flawed(Flaw)


class TestOtherName(Flawed):
    """The suite is called otherwise than the plugin."""

    name = "other"


class TestNoLayers(Flawed):
    """No geometry would be checked."""

    def layers(self) -> Sequence[LayerCase]:
        return []
