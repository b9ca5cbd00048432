"""The kit on adapters that fail a model as a whole: frozen weights, options, one projection.

Run with `suites`.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import numpy as np

from specops import Plan
from specops.geometry import Geometry
from specops.training.report import Report
from tests.kit import framework
from tests.kit.adapter import Attachment, Kernel, TinyAdapter
from tests.kit.suites import Flawed, flawed


class TestActsOnFrozen(Flawed):
    """What is frozen is projected like the rest."""

    class Flaw(Attachment):
        class kind(Kernel):
            def frozen(self) -> str:
                return ""

    adapter = flawed(Flaw)


class TestNamesADtype(Flawed):
    """Parameters are all said to be of double precision."""

    class Flaw(Attachment):
        class kind(Kernel):
            def __init__(self, model: framework.Model, name: str) -> None:
                super().__init__(model, name)
                self.weight = replace(self.weight, dtype="float64")

    adapter = flawed(Flaw)


class TestForgetsSizes(Flawed):
    """Input sizes that were seen are in no checkpoint."""

    class Flaw(Attachment):
        class kind(Kernel):
            def sizes(self) -> Any:
                return None

    adapter = flawed(Flaw)


class TestKnowsBetter(Flawed):
    """Maps that the user declares are listed, and not used."""

    class Flaw(Attachment):
        class kind(Kernel):
            def geometry(self) -> Geometry:
                return self.inferred()

    adapter = flawed(Flaw)


class TestStoresAnything(Flawed):
    """Weights are replaced by what a rule gives, in double precision."""

    class Flaw(Attachment):
        class kind(Kernel):
            def write(self, value: np.ndarray) -> None:
                self.model.parameters[self.name] = value.astype(np.float64)

    adapter = flawed(Flaw)


class TestDropsOptions(Flawed):
    """Options are taken, and nothing is done with them."""

    class Flaw(Attachment):
        def __init__(
            self,
            optimizer: Any,
            model: framework.Model,
            plan: Plan,
            geometries: Any = None,
            **options: Any,
        ) -> None:
            super().__init__(optimizer, model, plan, geometries)

    adapter = flawed(Flaw)


class TestHangsFirst(Flawed):
    """The model is hooked before the plan was found to fit."""

    class Flaw(Attachment):
        def __init__(self, optimizer: Any, model: Any, plan: Plan, geometries: Any = None) -> None:
            model.use = self.use
            super().__init__(optimizer, model, plan, geometries)

    adapter = flawed(Flaw)


class TestNeverFolds(Flawed):
    """Projecting under a forward rule leaves the raw weights."""

    class Flaw(Attachment):
        def detach(self, *, fold: bool = False) -> None:
            super().detach()

    adapter = flawed(Flaw)


class TestProjectsACopy(Flawed):
    """What project() changes is thrown away."""

    class adapter(TinyAdapter):
        def project(self, model: framework.Model, plan: Plan, **options: Any) -> Report:
            return super().project(copy.deepcopy(model), plan, **options)


class TestEnforcesNothing(Flawed):
    """Before an export rules wait for their step."""

    class Flaw(Attachment):
        def enforce(self) -> None:
            pass

    adapter = flawed(Flaw)
