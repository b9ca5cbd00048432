"""`SuiteBase`: the methods that an adapter's author writes, and helpers of all checks."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pytest

import specops
from specops.geometry import Geometry
from specops.rules import Monitor
from specops.rules.base import Stage
from specops.spectra import spectral_norm, spectral_norm_bounds
from specops.testing.cases import Capabilities, LayerCase, Training
from specops.testing.recording import Recorder, with_grid
from specops.training.plan import Plan

Weights = Mapping[str, np.ndarray]

BOUND = 1.0
SLACK = 1e-4
"""How far, relatively, a norm may exceed the bound: rounding in single precision."""
_ROUNDING = 1e-5
"""Relative difference of weights that were computed in the same way, in single precision."""


class SuiteBase(ABC):
    """The methods that an author writes, and helpers for the checks."""

    name: str
    capabilities: Capabilities = Capabilities()

    @abstractmethod
    def model(self) -> Any:
        """A tiny fresh model, the same at every call.

        It has at least one dense layer, one convolution (unless the capabilities deny them)
        and one bias; the operator norms of its weights are above 1.
        """

    @abstractmethod
    def layers(self) -> Sequence[LayerCase]:
        """One case for each layer type that the adapter knows, with fresh models.

        Also called when tests are collected, for the labels.
        """

    @abstractmethod
    def start(self, model: Any, rule_or_plan: Any, **options: Any) -> Training:
        """Attach, with gradient descent (momentum or not) fast enough that norms grow.

        `options` are those of ``specops.attach`` (``geometries=``). Data and optimizer are the
        same at every call.
        """

    @abstractmethod
    def array(self, values: np.ndarray) -> Any:
        """The framework's array of these values, of the same dtype."""

    @abstractmethod
    def numpy(self, x: Any) -> np.ndarray:
        """The NumPy array of a framework's array, of the same dtype."""

    def jit(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """`function` compiled; used where the capabilities claim ``supports_jit``."""
        return function

    def project(self, model: Any, rule_or_plan: Any, **options: Any) -> Any:
        """Apply a rule once, without training: ``specops.project``."""
        return specops.project(model, rule_or_plan, **options)

    def freeze(self, model: Any, name: str) -> None:
        """Freeze one weight of a fresh model, as users of the framework would."""
        pytest.skip("the suite does not say how a weight is frozen: override freeze()")

    def examine(self, case: LayerCase) -> tuple[np.ndarray, Geometry]:
        """The weight of a layer and the geometry that the adapter finds for it.

        It runs `project` with a rule that records its arguments. A convolution whose input size the
        adapter learns only in training gets that of the case. Override the method if the adapter
        finds geometries in another way.
        """
        recorder = Recorder()
        geometries = None if case.geometry is None else {case.weight: case.geometry}
        plan = Plan([(case.weight, recorder)])
        self.project(case.model, plan, geometries=geometries)
        assert recorder.seen, (
            f"{case.label}: a rule of stage 'weights' that names {case.weight!r} was never "
            f"called in project(). Likely cause: the adapter runs its own rules only, or did "
            f"not list this parameter"
        )
        weight, geometry = recorder.seen[-1]
        values = np.array(self.numpy(weight))
        return values, with_grid(geometry, values.shape, case.input_shape)

    def choices(self) -> dict[str, Callable[[], Sequence[str]]]:
        """Values of those arguments of checks for which a check runs once per value."""
        return {}

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        """A test for each choice."""
        for argument, values in self.choices().items():
            if argument in metafunc.fixturenames:
                metafunc.parametrize(argument, values())

    def plain(self, steps: int = 0) -> Training:
        """Training of a fresh model without rules, after some steps."""
        training = self.start(self.model(), Monitor())
        training.detach()
        return advanced(training, steps)

    def outputs_with(self, weights: Weights) -> np.ndarray:
        """The outputs of a model without rules that has these weights."""
        training = self.plain()
        for name, values in weights.items():
            training.set_weight(name, values)
        return training.outputs()

    def constrained(self, training: Training) -> list[str]:
        """Names of the weights under a rule."""
        return [row.name for row in training.report().constrained]

    def ruled(self) -> list[str]:
        """Names of the weights that a rule for all of them acts on."""
        return self.constrained(self.start(self.model(), Monitor()))

    def needs(self, *stages: Stage) -> None:
        """Skip the test unless the adapter claims these stages."""
        for stage in stages:
            if stage not in self.capabilities.stages:
                pytest.skip(f"the adapter does not claim rules of stage {stage!r}")

    def needs_a_changed_model(self) -> None:
        """Skip the test unless the adapter changes models in place, and not copies."""
        if not self.capabilities.in_place:
            pytest.skip("the adapter changes no model: it makes new weights")


def advanced(training: Training, steps: int) -> Training:
    """The same training after some steps."""
    for _ in range(steps):
        training.step()
    return training


def norm_of(weight: np.ndarray, geometry: Geometry) -> float:
    """The operator norm, the largest if there are several; without an input size, a bound."""
    w = np.asarray(weight, dtype=np.complex128 if np.iscomplexobj(weight) else np.float64)
    if not geometry.has_size:
        return float(spectral_norm_bounds(w, geometry).upper)
    norms = spectral_norm(w, geometry)
    return max(float(np.max(n)) for n in (norms if isinstance(norms, tuple) else (norms,)))


def norms_of(training: Training) -> dict[str, float]:
    """Norms of the raw weights under a rule, in double precision, by name."""
    weights = training.weights()
    return {name: norm_of(weights[name], g) for name, g in training.geometries.items()}


def changed(new: Weights, old: Weights, rtol: float = _ROUNDING) -> dict[str, float]:
    """Names of the weights that differ by more than rounding, and by how much, relatively."""
    assert new.keys() == old.keys(), (
        f"weights() lists {sorted(new)} here and {sorted(old)} there: names of parameters must "
        f"not depend on the rules"
    )
    found = {}
    for name, values in old.items():
        # NaN in both counts as equal; NaN in one of them as an infinite difference.
        moved = np.abs(np.asarray(new[name], np.float64) - np.asarray(values, np.float64))
        moved = np.where(np.isnan(new[name]) & np.isnan(values), 0.0, moved)
        worst = float(np.max(np.where(np.isnan(moved), np.inf, moved), initial=0.0))
        size = float(np.nanmax(np.abs(values), initial=0.0))
        if worst > rtol * max(size, 1e-30):
            found[name] = worst / size if size else np.inf
    return found


def relative(a: np.ndarray, b: np.ndarray) -> float:
    """The largest difference of two outputs, relatively to the largest entry."""
    assert a.shape == b.shape, f"outputs of shapes {a.shape} and {b.shape}"
    return float(np.max(np.abs(a - b)) / max(float(np.max(np.abs(b))), 1e-30))


def listed(figures: Mapping[str, float]) -> str:
    """Names with their figures, for a message."""
    return ", ".join(f"{name} ({value:.4g})" for name, value in figures.items()) or "none"
