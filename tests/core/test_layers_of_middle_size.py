"""Layers too large to be decomposed round by round, whose torus is no near substitute."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import specops
from specops import Conv
from specops.projections.kernels import layer_ball, layer_cuts, layer_nearest
from tests import oracle
from tests.core.nearest import normal, squared

LAYERS: list[tuple[tuple[int, ...], Conv]] = [
    ((6, 6, 3, 3), Conv((3, 3))),
    ((3, 2, 7, 7), Conv((3, 3))),
    ((4, 2, 5, 5), Conv((5, 4), groups=2)),
    ((3, 5, 7), Conv((4,))),
]


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Treat layers of a few channels as those of 1024 to 2048 inputs and outputs are treated."""
    monkeypatch.setattr(layer_ball, "MIDDLE", 1e-9)
    monkeypatch.setattr(layer_cuts, "KRYLOV_FROM", 0)
    monkeypatch.setattr(layer_cuts, "_WIDTH", 2)
    monkeypatch.setattr(layer_cuts, "_DEPTH", 4)


def own_norm(w: np.ndarray, geometry: Conv) -> float:
    return float(oracle.spectrum(w.astype(float), geometry)[0])


def project(w: np.ndarray, bound: float, geometry: Conv, **options: Any) -> Any:
    return specops.project_spectral_ball(w, bound, geometry, return_info=True, **options)


@pytest.mark.parametrize(("shape", "geometry"), LAYERS)
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_kernels_near_the_ball_end_at_its_nearest_point(
    patient: None, shape: tuple[int, ...], geometry: Conv, dtype: str
) -> None:
    w = normal(shape, 1).astype(dtype)
    bound = 0.95 * own_norm(w, geometry)
    got, info = project(w, bound, geometry)
    assert info.constrained == "layer"
    assert got.dtype == w.dtype
    assert own_norm(got, geometry) <= bound * (1 + 1e-12)
    assert own_norm(got, geometry) >= 0.99 * bound
    if dtype == "float32":
        assert float(info.gap) <= 1e-4
    assert specops.project_spectral_ball(w, 1.01 * bound / 0.95, geometry) is w


@pytest.mark.parametrize(("shape", "geometry"), LAYERS)
@pytest.mark.parametrize("measured", [False, True])
def test_kernels_with_many_large_values_end_on_the_way_from_the_torus(
    patient: None,
    monkeypatch: pytest.MonkeyPatch,
    shape: tuple[int, ...],
    geometry: Conv,
    measured: bool,
) -> None:
    monkeypatch.setattr(layer_nearest, "_MOST", 1)
    w = 1e-3 * normal(shape, 2)
    bound = 0.5 * own_norm(w, geometry)
    around, known = project(w, bound, geometry, method="accelerated")
    assert known.constrained == "torus"
    got, info = project(w, bound, geometry, measure_norms=measured)
    assert info.constrained == "layer"
    after = own_norm(got, geometry)
    assert 0.99 * bound <= after <= bound * (1 + 1e-12)
    assert own_norm(around, geometry) < 0.98 * bound
    assert squared(got - w) < squared(around - w)
    if measured:
        assert float(info.norm_before) == pytest.approx(own_norm(w, geometry), rel=1e-9)
        assert float(info.norm_after) == pytest.approx(after, rel=1e-9)
    monkeypatch.undo()
    nearest = specops.project_spectral_ball(w, bound, geometry, gap_tolerance=1e-9)
    assert squared(got - nearest) <= float(info.gap) * squared(w)


def test_states_are_taken_by_either_way(patient: None, monkeypatch: pytest.MonkeyPatch) -> None:
    shape, geometry = LAYERS[0]
    w = normal(shape, 3)
    bound = 0.8 * own_norm(w, geometry)
    _, near = project(w, bound, geometry)
    assert "frequency" not in near.state
    monkeypatch.setattr(layer_nearest, "_MOST", 1)
    _, far = project(w, 0.9 * bound, geometry, state=near.state)
    assert "frequency" in far.state
    for start in (near.state, far.state):
        got, again = project(w, 0.9 * bound, geometry, state=start)
        assert again.constrained == "layer"
        assert 0.99 * 0.9 * bound <= own_norm(got, geometry) <= 0.9 * bound * (1 + 1e-12)
    monkeypatch.setattr(layer_nearest, "_MOST", 64)
    _, info = project(1.01 * w, bound, geometry, state=far.state)
    assert float(info.gap) <= 1e-4


@pytest.mark.parametrize(
    "options",
    [{"distance_tolerance": 0.1}, {"iterations": 20}, {"method": "accelerated"}],
    ids=lambda options: next(iter(options)),
)
def test_a_torus_is_constrained_where_time_counts(patient: None, options: dict[str, Any]) -> None:
    shape, geometry = (16, 16, 5, 5), Conv((6, 6))
    w = normal(shape, 4)
    _, info = project(w, 0.98 * float(specops.spectral_norm(w, geometry)), geometry, **options)
    assert info.constrained == "torus"


def test_a_torus_that_is_hardly_larger_takes_the_place_of_the_layer(patient: None) -> None:
    w, geometry = normal((3, 3, 3), 5), Conv((40,))
    _, info = project(w, 0.9 * own_norm(w, geometry), geometry)
    assert info.constrained == "torus"
    same, info = project(0.0 * w, 1.0, geometry)
    assert float(info.norm_after) == 0.0
    assert not same.any()


@pytest.mark.slow
def test_a_layer_of_more_than_1024_inputs() -> None:
    w, geometry = normal((34, 34, 5, 5), 6).astype("float32"), Conv((6, 6))
    norm = float(specops.spectral_norm(w, geometry))
    got, info = project(w, 0.95 * norm, geometry)
    assert info.constrained == "layer"
    assert float(info.gap) <= 1e-4
    assert float(specops.spectral_norm(got, geometry)) == pytest.approx(0.95 * norm, rel=1e-5)
