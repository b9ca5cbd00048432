"""The kit on "tiny": its adapter, and adapters that are broken on purpose.

Not collected by name: `test_kit` runs it in a process of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from specops import Conv, Dense, Monitor
from specops.geometry import Geometry
from specops.testing import AdapterSuite, Capabilities, LayerCase
from specops.training.plan import Assignment, Plan
from specops.training.report import Report
from tests.kit import framework
from tests.kit.adapter import Attachment, TinyAdapter
from tests.kit.tiny import Tiny, TinyTraining


def flawed(attachment: type[Attachment]) -> type[TinyAdapter]:
    """An adapter with another attachment."""
    return type("Flawed", (TinyAdapter,), {"attachment": attachment})


class TestTiny(Tiny, AdapterSuite):
    """As it should be."""


class Flawed(Tiny, AdapterSuite):
    """With one law: the others take long and know nothing of adapters."""

    def choices(self) -> Any:
        return super().choices() | {"law": lambda: ["penalty"], "projection": list}


class TestWrongLayout(Flawed):
    """Kernels are read as torch has them."""

    class Flaw(Attachment):
        def geometry_of(self, layer: Any) -> Geometry:
            if isinstance(layer, framework.Dense):
                return Dense()
            return Conv(layer.grid, stride=layer.stride, padding=layer.padding, layout="OI*")

    adapter = flawed(Flaw)


class TestIgnoresStride(Flawed):
    """Strided layers are taken for plain ones."""

    class Flaw(Attachment):
        def geometry_of(self, layer: Any) -> Geometry:
            if isinstance(layer, framework.Dense):
                return Dense(out_axes=(1,))
            return Conv(layer.grid, padding=layer.padding, layout="*IO")

    adapter = flawed(Flaw)


class TestMutatesInForward(Flawed):
    """Vectors advance in each forward pass."""

    class Flaw(Attachment):
        def use(self, name: str, w: np.ndarray) -> np.ndarray:
            used = super().use(name, w)
            if used is not w:
                rule, geometry = self.rules[name].rule, self.geometries[name]
                self.states[name] = rule.update(w, geometry, self.states[name], name=name)[1]
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
        def on_nonfinite(self, name: str, step: int) -> None:
            pass

    adapter = flawed(Flaw)


class TestIgnoresEvery(Flawed):
    """Rules act at every step."""

    class Flaw(Attachment):
        def fires(self, assignment: Assignment, step: int) -> bool:
            return self.plan.stop is None or step < self.plan.stop

    adapter = flawed(Flaw)


class TestWritesAsItGoes(Flawed):
    """Weights are written one by one."""

    class Flaw(Attachment):
        def computed(self, stage: str, step: int) -> Any:
            rules, result = self.rules, {}
            for name, assignment in rules.items():
                self.rules = {name: assignment}
                try:
                    one = super().computed(stage, step)
                finally:
                    self.rules = rules
                result |= one
                if stage == "weights":
                    self.write(one)
            return result

    adapter = flawed(Flaw)


class TestStaysOn(Flawed):
    """Detaching leaves the hooks."""

    class Flaw(Attachment):
        def detach(self) -> None:
            pass

    adapter = flawed(Flaw)


class TestReportsHalf(Flawed):
    """Parameters without a rule are left out."""

    class Flaw(Attachment):
        def report(self) -> Any:
            return Report(super().report().constrained)

    adapter = flawed(Flaw)


class TestSubtracts(Flawed):
    """Penalties pull the wrong way."""

    class Flaw(Attachment):
        def computed(self, stage: str, step: int) -> Any:
            found = super().computed(stage, step)
            sign = -1 if stage == "gradients" else 1
            return {name: (sign * array, state) for name, (array, state) in found.items()}

    adapter = flawed(Flaw)


class TestUsesRawWeights(Flawed):
    """Forward rules are accepted and have no effect."""

    class Flaw(Attachment):
        def use(self, name: str, w: np.ndarray) -> np.ndarray:
            return w

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


class TestClaimsTooLittle(Flawed):
    """Rules of a stage that is not claimed are accepted."""

    capabilities = Capabilities(stages=("weights",))


class TestSkipsThePlan(Flawed):
    """Patterns that match nothing are let through."""

    class Flaw(Attachment):
        def __init__(self, optimizer: Any, model: Any, plan: Plan, geometries: Any = None) -> None:
            known = {k: g for k, g in (geometries or {}).items() if k in model.parameters}
            entries = [e for e in plan.entries if e[0] == "*" or e[0] in model.parameters]
            plan = replace(plan, entries=entries or [("*", None)])
            super().__init__(optimizer, model, plan, known)

    adapter = flawed(Flaw)


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
        def write(self, computed: Any) -> None:
            weights = self.model.parameters
            super().write({name: (weights[name], state) for name, (_, state) in computed.items()})

    adapter = flawed(Flaw)


class TestMonitorActs(Flawed):
    """Rules without an effect have one."""

    class Flaw(Attachment):
        def write(self, computed: Any) -> None:
            for name, (w, state) in computed.items():
                factor = np.float32(0.99 if isinstance(self.rules[name].rule, Monitor) else 1)
                super().write({name: (factor * w, state)})

    adapter = flawed(Flaw)


class TestOtherName(Flawed):
    """The suite is called otherwise than the plugin."""

    name = "other"


class TestNoLayers(Flawed):
    """No geometry would be checked."""

    def layers(self) -> Sequence[LayerCase]:
        return []
