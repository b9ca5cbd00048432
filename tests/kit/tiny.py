"""What the conformance kit asks of the author of the "tiny" adapter."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pytest

import specops
from specops.geometry import Geometry
from specops.plugins import manager
from specops.testing import Capabilities, LayerCase
from specops.training.report import Report
from tests.kit import framework
from tests.kit.adapter import Plugin, TinyAdapter


class TinyTraining:
    """SGD with momentum on one batch."""

    def __init__(self, model: framework.Model, rule_or_plan: Any, **options: Any) -> None:
        rng = np.random.default_rng(1)
        self.x = rng.standard_normal((8, 5, 5, 2)).astype(np.float32)
        self.y = 10 * rng.standard_normal((8, 3)).astype(np.float32)
        self.model = model
        self.optimizer = framework.SGD(model, rate=0.02, momentum=0.5)
        self.attachment = specops.attach(self.optimizer, model, rule_or_plan, **options)

    def step(self) -> None:
        error = self.model(self.x) - self.y
        self.optimizer.step(self.model.gradients(error / len(error)))

    def weights(self) -> dict[str, np.ndarray]:
        return copy.deepcopy(self.model.parameters)

    def outputs(self) -> np.ndarray:
        return self.model(self.x)

    def report(self) -> Report:
        return self.attachment.report()

    def history(self) -> list[dict[str, Any]]:
        return self.attachment.history

    def save(self) -> Any:
        rules = self.attachment.state_dict()
        return copy.deepcopy((self.model.parameters, self.optimizer.velocity, rules))

    def restore(self, saved: Any) -> None:
        for name, values in saved[0].items():
            self.set_weight(name, values)
        self.optimizer.velocity = copy.deepcopy(saved[1])
        self.attachment.load_state_dict(saved[2])

    def set_weight(self, name: str, values: np.ndarray) -> None:
        self.model.parameters[name][...] = values

    def enforce(self) -> None:
        self.attachment.enforce()

    def detach(self) -> None:
        self.attachment.detach()

    @property
    def geometries(self) -> Mapping[str, Geometry]:
        return self.attachment.geometries()


class Tiny:
    """What the kit asks for."""

    name = "tiny"
    capabilities = Capabilities(stages=("weights", "gradients", "forward"), differentiates=False)
    adapter: type[TinyAdapter] = TinyAdapter

    @pytest.fixture(autouse=True)
    def _plugin(self) -> Iterator[None]:
        """As an entry point would."""
        plugin = Plugin()
        manager().register(plugin, name="tiny")
        yield
        manager().unregister(plugin)

    def model(self) -> framework.Model:
        return framework.Model(
            framework.Conv(2, 4, (3, 3), stride=2, padding=1),
            framework.Tanh(),
            framework.Dense(36, 3),
            adapter=self.adapter,
        )

    def layers(self) -> Sequence[LayerCase]:
        return [
            self._case("dense", framework.Dense(5, 3), 5),
            self._case("square", framework.Dense(4, 4), 4),
            self._case("conv1d", framework.Conv(2, 3, (3,), padding=1), 7, 2),
            self._case("conv1d strided", framework.Conv(2, 3, (4,), stride=3), 8, 2),
            self._case("conv2d", framework.Conv(2, 3, (3, 2), padding=1), 4, 6, 2),
            self._case("conv2d strided", framework.Conv(2, 3, (3, 3), 2, 1), 6, 5, 2),
        ]

    def _case(self, label: str, layer: Any, *input_shape: int) -> LayerCase:
        model = framework.Model(layer, adapter=self.adapter)
        layer.grid = None
        return LayerCase(label, model, "0.kernel", input_shape, model)

    def start(self, model: Any, rule_or_plan: Any, **options: Any) -> TinyTraining:
        return TinyTraining(model, rule_or_plan, **options)

    def freeze(self, model: framework.Model, name: str) -> None:
        model.frozen.add(name)

    def array(self, values: np.ndarray) -> np.ndarray:
        return values.copy()

    def numpy(self, x: np.ndarray) -> np.ndarray:
        return x
