"""The certified gap of a nearest point, against a slow solver."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings

import specops
from specops import Conv
from specops.maps import explicit
from specops.projections.kernels import ball_on_host
from tests.core.nearest import (
    LAYERS,
    ROUNDING,
    certificate,
    constrained,
    norm,
    normal,
    project,
    slowly,
    small,
    squared,
)
from tests.strategies import Case, convolutions


@pytest.mark.slow
@pytest.mark.parametrize("method", ["auto", "cutting-planes", "accelerated", "dykstra"])
@pytest.mark.parametrize("complex", [False, True])
@pytest.mark.parametrize(("shape", "geometry"), LAYERS)
def test_certificate_against_a_slow_solver(
    shape: tuple[int, ...], geometry: Conv, complex: bool, method: str
) -> None:
    w = normal(shape, 6, complex=complex)
    factor = certificate(geometry, shape)
    bound = 0.5 * norm(w, geometry, method) / factor
    truth, error = _slowly_cached(shape, geometry, complex, method)
    best = squared(w - truth)
    for tolerance in (1e-2, 1e-5, 1e-10):
        got, info = specops.project_spectral_ball(
            w, bound, geometry, method=method, gap_tolerance=tolerance, return_info=True
        )
        gap = float(info.gap) * squared(w)
        assert norm(got, geometry, method) <= bound * factor * (1 + 1e-12)
        assert np.sqrt(squared(got - truth)) <= np.sqrt(gap + ROUNDING * squared(w)) + np.sqrt(
            error
        )
        # The dual value bounds the distance from below, so the gap holds the whole excess.
        assert squared(w - got) - gap <= best + ROUNDING * squared(w)
    # The first-order methods stop at 40 and 200 rounds.
    assert gap <= (5e-3 if method in ("accelerated", "dykstra") else 1e-9) * squared(w)


@pytest.mark.parametrize("complex", [False, True])
@pytest.mark.parametrize(("shape", "geometry"), LAYERS)
def test_one_half_space_a_round_against_a_slow_solver(
    shape: tuple[int, ...], geometry: Conv, complex: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As if half-spaces for single singular values were never affordable.
    monkeypatch.setattr(ball_on_host, "most_cuts", lambda *_: -1)
    monkeypatch.setattr(explicit, "_LARGEST_WORK", 0)  # on the torus
    w = normal(shape, 6, complex=complex)
    factor = certificate(geometry, shape)
    bound = 0.5 * norm(w, geometry, "accelerated") / factor
    truth, error = _slowly_cached(shape, geometry, complex, "accelerated")
    best = np.sqrt(squared(w - truth))
    for tolerance in (0.1, 0.02):
        options: dict[str, Any] = {"gap_tolerance": 1e-12, "distance_tolerance": tolerance}
        got, info = specops.project_spectral_ball(w, bound, geometry, **options, return_info=True)
        moved, gap = np.sqrt(squared(w - got)), float(info.gap) * squared(w)
        assert set(info.state) == {"direction", "nuclear", "taps"}
        assert norm(got, geometry, "accelerated") <= bound * factor * (1 + 1e-12)
        assert moved <= (1 + tolerance) * (best + np.sqrt(error))
        assert np.sqrt(squared(got - truth)) <= np.sqrt(gap + ROUNDING * squared(w)) + np.sqrt(
            error
        )
        assert moved**2 - gap <= best**2 + error + ROUNDING * squared(w)


_TRUTHS: dict[Any, tuple[np.ndarray, float]] = {}


def _slowly_cached(
    shape: tuple[int, ...], geometry: Conv, complex: bool, method: str
) -> tuple[np.ndarray, float]:
    key = (shape, constrained(geometry, shape, method), complex)
    if key not in _TRUTHS:
        w = normal(shape, 6, complex=complex)
        bound = 0.5 * norm(w, geometry, method) / certificate(geometry, shape)
        _TRUTHS[key] = slowly(w, geometry, bound, method=method)
    return _TRUTHS[key]


@pytest.mark.parametrize(("shape", "geometry"), LAYERS)
def test_alternating_is_feasible_and_farther(shape: tuple[int, ...], geometry: Conv) -> None:
    w = normal(shape, 6)
    factor = certificate(geometry, shape)
    bound = 0.5 * norm(w, geometry, "alternating") / factor
    truth, _ = _slowly_cached(shape, geometry, False, "alternating")
    for iterations in (None, 1, 20):
        got, info = specops.project_spectral_ball(
            w, bound, geometry, method="alternating", iterations=iterations, return_info=True
        )
        assert norm(got, geometry, "alternating") <= bound * factor * (1 + 1e-12)
        assert squared(w - got) >= squared(w - truth) * (1 - 1e-12)
        assert squared(got - truth) <= float(info.gap) * squared(w)


@given(convolutions())
@settings(max_examples=15)
def test_a_slow_solver_agrees_on_any_convolution(case: Case) -> None:
    assume(small(case))
    w = case.weight()
    assume(w.size <= 60)
    bound = 0.8 * norm(w, case.geometry)
    truth, error = slowly(w, case.geometry, bound)
    got, own = project(w, bound, case.geometry, gap_tolerance=1e-10)
    assert np.sqrt(squared(got - truth)) <= np.sqrt(own) + np.sqrt(error)


@pytest.mark.parametrize(("shape", "geometry"), LAYERS)
@pytest.mark.parametrize("seed", [7, 8])
def test_gap_tolerance_is_honoured(shape: tuple[int, ...], geometry: Conv, seed: int) -> None:
    w = normal(shape, seed, complex=seed == 8)
    bound = 0.6 * norm(w, geometry)
    rounds = []
    for tolerance in (0.3, 1e-2, 1e-4, 1e-7, 1e-10):
        _, info = specops.project_spectral_ball(
            w, bound, geometry, gap_tolerance=tolerance, return_info=True
        )
        rounds.append(info.iterations)
        assert float(info.gap) <= tolerance * (1 + 1e-9) + ROUNDING
    assert rounds == sorted(rounds)
    assert rounds[-1] < 100


def test_what_wraps_to_nothing_stays() -> None:
    # Two taps of opposite sign on one slot: the operator is zero, the kernel is not.
    geometry = Conv((2,), boundary="circular")
    silent = np.array([[[1.0, 0.0, -1.0, 0.0]]])
    assert norm(silent, geometry) == 0
    loud = np.array([[[2.0, 0.5, 1.0, 0.5]]])
    bound = 0.5 * norm(loud, geometry)
    apart = specops.project_spectral_ball(loud, bound, geometry, gap_tolerance=1e-12)
    both = specops.project_spectral_ball(loud + 5 * silent, bound, geometry, gap_tolerance=1e-12)
    np.testing.assert_allclose(both, apart + 5 * silent, atol=1e-6)
    assert specops.project_spectral_ball(silent, 1e-3, geometry) is silent
