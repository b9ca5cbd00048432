"""Numbers and schedules of rules: used when fired, and checked."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import specops
from specops import (
    ClipAndCut,
    ClipSpectralNorm,
    Dense,
    NormalizeIfAbove,
    ProjectStableRank,
    SpectralHammer,
    SpectralNormalization,
    SpectralNormPenalty,
    SpectralSoftCap,
    StableRankNormalization,
    TrainableScale,
)
from specops.errors import PlanError
from specops.geometry import Geometry
from tests.backends import Backend
from tests.core.laws import (
    outcome,
    weight,
)

SCHEDULED: dict[str, tuple[Callable[[Any], Any], float]] = {
    "clip": (ClipSpectralNorm, 0.8),
    "clip reshaped": (lambda c: ClipSpectralNorm(c, norm="reshaped"), 0.8),
    "clip and cut": (ClipAndCut, 0.8),
    "normalize": (lambda c: NormalizeIfAbove(c, norm="operator"), 0.8),
    "soft cap": (lambda c: SpectralSoftCap(c, norm="operator"), 0.8),
    "hammer": (lambda c: SpectralHammer(c, norm="operator"), 0.8),
    "ratio": (lambda r: ProjectStableRank(ratio=r, norm="operator"), 0.3),
    "target": (lambda r: ProjectStableRank(target=r, norm="operator"), 1.3),
    "scale": (lambda s: SpectralNormalization(norm="operator", scale=s), 1.7),
    "forward ratio": (lambda r: StableRankNormalization(r, norm="operator"), 0.3),
    "strength": (lambda s: SpectralNormPenalty(s, norm="operator"), 0.2),
}

every_number = pytest.mark.parametrize("name", SCHEDULED)


@every_number
def test_schedules(eager: Backend, name: str) -> None:
    make, number = SCHEDULED[name]
    seen = []

    def schedule(step: int, name: str, geometry: Geometry) -> float:
        seen.append((step, name, geometry))
        return number if step == 7 else number * 0.9

    w = eager.array(weight((5, 4)).astype(np.float32))
    fixed = eager.numpy(outcome(make(number), w, Dense())[0])
    got = eager.numpy(outcome(make(schedule), w, Dense(), step=7, name="layer")[0])
    np.testing.assert_allclose(got, fixed, rtol=0, atol=1e-6)
    assert set(seen) == {(7, "layer", Dense())}
    other = eager.numpy(outcome(make(schedule), w, Dense(), step=8)[0])
    assert np.abs(other - fixed).max() > 1e-3


@every_number
@pytest.mark.parametrize("value", [-1.0, math.nan, math.inf])
def test_values_of_a_schedule_are_checked_when_used(name: str, value: float) -> None:
    with pytest.raises(ValueError, match="must be"):
        outcome(SCHEDULED[name][0](lambda *_: value), weight((5, 4)), Dense())


@every_number
def test_a_schedule_of_the_step_alone_is_told_what_it_is_called_with(name: str) -> None:
    def warmup(step: int) -> float:
        return 1.0

    with pytest.raises(PlanError, match=r"\(step, name, geometry\), which warmup does not take"):
        outcome(SCHEDULED[name][0](warmup), weight((5, 4)), Dense())


def test_what_fails_within_a_schedule_is_shown_as_it_is() -> None:
    with pytest.raises(TypeError, match="unsupported operand"):
        outcome(ClipSpectralNorm(lambda *_: None + 1), weight((5, 4)), Dense())  # type: ignore[operator]


@every_number
@pytest.mark.parametrize("value", [0.0, -1.0, math.nan, math.inf, "1", None, True])
def test_bad_numbers(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=r"must be|give exactly one"):
        SCHEDULED[name][0](value)


@every_number
@pytest.mark.parametrize("number", [np.float32, np.float64])
def test_numbers_of_numpy(name: str, number: Any) -> None:
    make, value = SCHEDULED[name]
    w = weight((5, 4))
    got = outcome(make(number(value)), w, Dense())[0]
    np.testing.assert_allclose(got, outcome(make(value), w, Dense())[0], atol=1e-6)


BAD: list[tuple[Any, dict[str, Any]]] = [
    (ClipSpectralNorm, {"max_norm": 1.0, "distance_tolerance": -0.1}),
    (ClipSpectralNorm, {"max_norm": 1.0, "norm": "bidirectional"}),
    (NormalizeIfAbove, {"max_norm": 1.0, "norm": "bidirectional"}),
    (SpectralHammer, {"max_norm": 1.0, "norm": "bidirectional"}),
    (ProjectStableRank, {"norm": "operator"}),
    (ProjectStableRank, {"norm": "operator", "ratio": 0.5, "target": 2.0}),
    (ProjectStableRank, {"norm": "operator", "ratio": 0.5, "preserve": -1}),
    (ProjectStableRank, {"norm": "bidirectional", "ratio": 0.5}),
    (SpectralNormalization, {"norm": "frobenius"}),
    (SpectralNormalization, {"norm": "reshaped", "iterations": 0}),
    (StableRankNormalization, {"norm": "bidirectional", "ratio": 0.5}),
    (SpectralNormPenalty, {"norm": "reshaped", "strength": 0.1, "iterations": 1.5}),
    (TrainableScale, {"initial": 0.0}),
]


@pytest.mark.parametrize(("make", "options"), BAD)
def test_bad_arguments(make: Any, options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"must be|give exactly one"):
        make(**options)


def test_only_rules_are_told_how_to_be_switched_off() -> None:
    off = "give it no rule"
    with pytest.raises(ValueError, match=off):
        ClipSpectralNorm(0.0)
    rule = SpectralNormPenalty(lambda step, name, geometry: 0.0, norm="operator")
    with pytest.raises(ValueError, match=off):
        outcome(rule, weight((3, 2)), Dense())
    for function in (
        lambda: specops.project_spectral_ball(np.eye(2), 0.0),
        lambda: specops.project_spectral_ball(np.eye(2), 1.0, gap_tolerance=0.0),
        lambda: specops.project_schatten_ball(np.eye(2), 0.0, p=1),
        lambda: specops.spectral_norm_bounds(np.eye(2), rtol=0.0),
    ):
        with pytest.raises(ValueError, match=r"positive finite number, got 0\.0$"):
            function()
