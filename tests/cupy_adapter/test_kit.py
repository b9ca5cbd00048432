"""The adapter passes the conformance kit: on NumPy arrays and, where there is one, on a device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

import specops
import specops_cupy
from specops.geometry import Conv, Dense, Geometry
from specops_cupy.adapter import CupyAdapter
from tests.cupy_adapter.libraries import CUPY, needs_device
from tests.cupy_adapter.network import MAPS, ArrayTraining, convolve, initial

testing = pytest.importorskip("specops.testing", reason="the conformance kit is not installed")


class TestStandIn(testing.AdapterSuite):
    """The adapter's own classes on NumPy arrays, which the plugin does not claim."""

    name = "cupy"
    capabilities = testing.Capabilities(registered=False, differentiates=False)
    xp: Any = np

    def attach(self, *args: Any, **options: Any) -> Any:
        return specops_cupy.attach(*args, **options)

    def project(self, model: Any, rule_or_plan: Any, **options: Any) -> Any:
        if options.get("geometries") is None and model.keys() == initial(self.array).keys():
            options["geometries"] = MAPS  # arrays do not tell
        return self.project_once(model, rule_or_plan, **options)

    def project_once(self, model: Any, rule_or_plan: Any, **options: Any) -> Any:
        return CupyAdapter().project(model, specops.Plan.of(rule_or_plan), **options)

    def model(self) -> Any:
        return initial(self.array)

    def layers(self) -> Sequence[Any]:
        def dense(label: str, geometry: Geometry, turned: bool = False) -> Any:
            w = self._normal(5, 9) if turned else self._normal(9, 5)

            def apply(x: np.ndarray) -> np.ndarray:
                return self.numpy(self.array(x) @ (w if turned else w.T))

            return testing.LayerCase(label, {"w": w}, "w", (5,), apply, geometry)

        def conv(label: str, channels: int, padding: int, **options: Any) -> Any:
            k = self._normal(6, channels // options.get("groups", 1), 3, 2)

            def apply(x: np.ndarray) -> np.ndarray:
                return self.numpy(convolve(self.xp, self.array(x), k, padding=padding, **options))

            geometry = Conv((6, 5), padding=padding, **options)
            shape = (channels, 6, 5)
            return testing.LayerCase(label, {"a": {"k": k}}, "a.k", shape, apply, geometry)

        return [
            dense("dense", Dense()),
            dense("dense, in × out", Dense((1,)), turned=True),
            dense("fused", Dense(splits=(4, 3, 2))),
            conv("conv", 2, 1),
            conv("strided", 2, 1, stride=2),
            conv("dilated", 2, 2, dilation=2),
            conv("grouped", 4, 0, groups=2),
        ]

    def start(self, model: Any, rule_or_plan: Any, **options: Any) -> ArrayTraining:
        return ArrayTraining(self.xp, self.attach, model, rule_or_plan, **options)

    def array(self, values: np.ndarray) -> Any:
        return np.array(values)

    def numpy(self, x: Any) -> np.ndarray:
        return np.asarray(x)

    def _normal(self, *shape: int) -> Any:
        return self.array(np.random.default_rng(2).standard_normal(shape).astype(np.float32))


@needs_device
class TestCupy(TestStandIn):
    """The installed plugin on a device."""

    capabilities = testing.Capabilities(differentiates=False)
    xp = CUPY

    def attach(self, *args: Any, **options: Any) -> Any:
        return specops.attach(*args, **options)

    def project_once(self, model: Any, rule_or_plan: Any, **options: Any) -> Any:
        return specops.project(model, rule_or_plan, **options)

    def array(self, values: np.ndarray) -> Any:
        # Collecting the labels needs no device.
        return np.array(values) if CUPY is None else CUPY.asarray(values)

    def numpy(self, x: Any) -> np.ndarray:
        return CUPY.asnumpy(x)
