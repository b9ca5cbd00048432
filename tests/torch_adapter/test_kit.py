"""The torch adapter passes the conformance kit."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pytest

import specops
from specops.geometry import Dense, Geometry
from specops.testing import AdapterSuite, Capabilities, LayerCase
from specops.testing.geometry import GeometryChecks
from specops.testing.recording import Recorder
from specops.training.report import Report

torch = pytest.importorskip("torch")
nn = torch.nn

from specops_torch.in_use import InUse  # noqa: E402


class TorchTraining:
    """SGD with momentum on one batch."""

    def __init__(self, model: Any, rule_or_plan: Any, **options: Any) -> None:
        generator = torch.Generator().manual_seed(1)
        self.x = torch.randn(8, 2, 6, 6, generator=generator)
        self.y = torch.randn(8, 3, generator=generator)
        self.model = model
        self.optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.5)
        self.attachment = specops.attach(self.optimizer, model, rule_or_plan, **options)

    def step(self) -> None:
        self.optimizer.zero_grad()
        # Away from zero outputs, so that norms grow.
        nn.functional.mse_loss(self.model(self.x), 10.0 * self.y).backward()
        self.optimizer.step()

    def weights(self) -> dict[str, np.ndarray]:
        return {n: p.detach().numpy().copy() for n, p in self.model.named_parameters()}

    def outputs(self) -> np.ndarray:
        with torch.no_grad():
            return self.model(self.x).numpy()

    def report(self) -> Report:
        return self.attachment.report()

    def history(self) -> list[dict[str, Any]]:
        return self.attachment.history

    def save(self) -> Any:
        parts = (self.model, self.optimizer, self.attachment)
        return copy.deepcopy([part.state_dict() for part in parts])

    def restore(self, saved: Any) -> None:
        for part, state in zip((self.model, self.optimizer, self.attachment), saved, strict=True):
            part.load_state_dict(state)

    def set_weight(self, name: str, values: np.ndarray) -> None:
        with torch.no_grad():
            dict(self.model.named_parameters())[name].copy_(torch.from_numpy(values))

    def enforce(self) -> None:
        self.attachment.enforce()

    def detach(self) -> None:
        self.attachment.detach()

    @property
    def geometries(self) -> Mapping[str, Geometry]:
        return {c.name: c.geometry for c in self.attachment._constrained}


def forward(layer: Any) -> Callable[[np.ndarray], np.ndarray]:
    """NumPy in, NumPy out."""

    def apply(x: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            return layer(torch.from_numpy(x)).numpy()

    return apply


def case(label: str, layer: Any, *input_shape: int) -> LayerCase:
    return LayerCase(label, nn.Sequential(layer), "0.weight", input_shape, forward(layer))


def fused_attention() -> LayerCase:
    attention = nn.MultiheadAttention(4, 2)
    model = nn.ModuleDict({"attention": attention})
    used = nn.Linear(4, 12)
    used.weight = attention.in_proj_weight
    return LayerCase("in_proj", model, "attention.in_proj_weight", (4,), forward(used))


class Torch:
    """What the kit asks for."""

    name = "torch"
    capabilities = Capabilities(stages=("weights", "gradients", "forward"))

    def model(self) -> Any:
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Conv2d(2, 4, 3, stride=2, padding=1),
            nn.Tanh(),
            nn.Conv2d(4, 4, 3, padding=1),
            nn.Tanh(),
            nn.Flatten(),
            nn.Linear(36, 3),
        )
        with torch.no_grad():
            for p in model.parameters():
                p.mul_(3.0)
        return model

    def layers(self) -> Sequence[LayerCase]:
        torch.manual_seed(0)
        declared = nn.Linear(5, 9)
        return [
            case("Linear", nn.Linear(5, 3), 5),
            case("Conv1d", nn.Conv1d(2, 3, 3, padding=1), 2, 7),
            case("Conv2d", nn.Conv2d(2, 3, (3, 2), padding=(1, 0)), 2, 6, 5),
            case("Conv3d", nn.Conv3d(2, 3, 2, padding="valid"), 2, 4, 3, 3),
            case("strided", nn.Conv2d(2, 3, 3, stride=2, padding=1), 2, 7, 6),
            case("dilated", nn.Conv2d(2, 3, 3, dilation=2, padding=2), 2, 6, 6),
            case("same", nn.Conv2d(2, 3, (2, 3), dilation=2, padding="same"), 2, 5, 6),
            case("grouped", nn.Conv2d(4, 6, 3, groups=2), 4, 6, 5),
            case("depthwise", nn.Conv1d(4, 8, 3, groups=4, padding=2), 4, 5),
            case("circular", nn.Conv2d(2, 3, 3, padding=1, padding_mode="circular"), 2, 5, 4),
            case(
                "circular strided",
                nn.Conv1d(2, 3, 3, stride=2, padding=1, padding_mode="circular"),
                2,
                6,
            ),
            case("transposed", nn.ConvTranspose2d(2, 3, 3, stride=2, padding=1), 2, 4, 3),
            case(
                "transposed, more",
                nn.ConvTranspose1d(4, 6, 3, stride=3, groups=2, output_padding=1, dilation=2),
                4,
                4,
            ),
            fused_attention(),
            LayerCase(
                "declared splits",
                nn.Sequential(declared),
                "0.weight",
                (5,),
                forward(declared),
                Dense(splits=(4, 3, 2)),
            ),
        ]

    def start(self, model: Any, rule_or_plan: Any, **options: Any) -> TorchTraining:
        return TorchTraining(model, rule_or_plan, **options)

    def freeze(self, model: Any, name: str) -> None:
        model.get_parameter(name).requires_grad_(False)

    def array(self, values: np.ndarray) -> Any:
        return torch.from_numpy(np.array(values))

    def numpy(self, x: Any) -> np.ndarray:
        return x.numpy()


class TestTorch(Torch, AdapterSuite):
    """Everything."""


class TestLearntSizes(Torch, GeometryChecks):
    """Geometries with the input sizes that an attachment has seen."""

    def examine(self, case: LayerCase) -> tuple[np.ndarray, Geometry]:
        recorder = Recorder()
        geometries = None if case.geometry is None else {case.weight: case.geometry}
        plan = specops.Plan([(case.weight, recorder)])
        attachment = specops.attach(None, case.model, plan, geometries=geometries)
        case.apply(np.zeros((1, *case.input_shape), np.float32))
        attachment.step()
        weight, geometry = recorder.seen[-1]
        return weight.numpy().astype(np.float64), geometry


@pytest.mark.parametrize("cause", ["the norm counts as constant", "passed on as it is"])
def test_the_kit_sees_wrong_gradients(cause: str, monkeypatch: Any) -> None:
    """Of weights in use whose values are right."""
    used = InUse._used

    def flawed(self: InUse, raw: torch.Tensor) -> torch.Tensor:
        found = used(self, raw)
        if "constant" in cause:
            return raw * (found.detach() / raw.detach())
        return raw + (found - raw).detach()

    monkeypatch.setattr("specops_torch.in_use.InUse._used", flawed)
    with pytest.raises(AssertionError, match=cause):
        TestTorch().test_the_gradient_is_that_of_the_weight_in_use()
