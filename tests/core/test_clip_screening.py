"""The screening of the clip: certified once, then estimated, and for how long."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import specops
from specops import (
    ClipSpectralNorm,
    Conv,
    Dense,
)
from specops.geometry import Geometry
from tests.backends import Backend
from tests.core.laws import (
    GEOMETRIES,
    outcome,
    skip_unless_needed,
    weight,
)


class Screening:
    """A clip, its state, and how often it was certified."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, geometry: Geometry, **options: Any):
        self.rule = ClipSpectralNorm(**{"max_norm": 1.0, **options})
        self.geometry, self.certified = geometry, 0
        self.state: dict[str, Any] = {}

        def counted(*args: Any, **kwargs: Any) -> Any:
            self.certified += 1
            return specops.project_spectral_ball(*args, **kwargs)

        monkeypatch.setattr("specops.rules.clip.project_spectral_ball", counted)

    def fire(self, w: Any, *, enforce: bool = False) -> tuple[Any, Any]:
        act = self.rule.enforce if enforce else self.rule.update
        new, self.state, figures = act(w, self.geometry, self.state, name="w")
        return new, figures


CALM, GROWN = np.diag([0.6, 0.2, 0.1, 0.0]), np.diag([0.5, 3.0, 0.1, 0.0])
"""Power steps from the first axis alone never leave it."""


@pytest.mark.parametrize("scale", [1.0, 1e20, 1e-20])
@pytest.mark.parametrize("key", ["dense", "stack", "blocks", "circular", "zeros"])
def test_inside_is_certified_once_and_then_estimated(
    monkeypatch: pytest.MonkeyPatch, eager: Backend, key: str, scale: float
) -> None:
    if scale != 1.0 or (eager.name == "jax" and key != "stack"):
        skip_unless_needed(eager)
    shape, geometry = GEOMETRIES[key]
    host = weight(shape)
    norm = np.max(outcome(ClipSpectralNorm(1e3), host, geometry)[2]["norm_before"])
    screening = Screening(monkeypatch, geometry, max_norm=scale)

    def of_norm(size: float) -> Any:
        return eager.array(host * (size * scale / norm), "float32")

    w = of_norm(0.8)
    new, certified = screening.fire(w)
    assert new is w
    for _ in range(3):
        new, estimated = screening.fire(w)
        assert new is w
        for name, value in certified.items():
            assert estimated[name].shape == value.shape
            eager.same_kind(estimated[name], value)
            ratio = eager.numpy(estimated[name]) / eager.numpy(value)
            np.testing.assert_allclose(ratio, 1.0, rtol=5e-3)
    assert screening.certified == 1
    # It grows, and the power steps see it.
    new, figures = screening.fire(of_norm(1.2))
    assert screening.certified == 2
    assert np.max(eager.numpy(figures["norm_before"])) / scale == pytest.approx(1.2, rel=1e-3)
    assert np.max(eager.numpy(figures["norm_after"])) <= scale * (1 + 1e-6)
    # Found outside, it is certified until it is inside again, and always near the bound.
    near = of_norm(0.97)
    for count in (3, 4, 5):
        assert screening.fire(near)[0] is near
        assert screening.certified == count


def test_a_fooled_estimate_lasts_to_the_hundredth_firing(
    monkeypatch: pytest.MonkeyPatch, eager: Backend
) -> None:
    skip_unless_needed(eager)
    screening = Screening(monkeypatch, Dense())
    screening.fire(eager.array(CALM))
    seen = np.linalg.norm(CALM, 2)
    grown, low = eager.array(GROWN), eager.array(np.asarray(seen))
    blind = lambda weight, geometry, state, **_: (low, state)  # noqa: E731
    monkeypatch.setattr("specops.rules.clip.estimate", blind)
    for firing in range(2, 100):
        new, figures = screening.fire(grown)
        assert new is grown, firing
    assert screening.certified == 1
    assert float(figures["norm_after"]) == pytest.approx(seen)
    new, figures = screening.fire(grown)
    np.testing.assert_allclose(eager.numpy(new), np.minimum(GROWN, 1.0), atol=1e-6)
    assert float(figures["norm_before"]) == pytest.approx(3.0)


@pytest.mark.parametrize("loaded", ["as large", "one direction"])
def test_a_weight_that_was_replaced_is_certified(
    loaded: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Along the old vectors it looks far smaller than it is."""
    rng = np.random.default_rng(0)
    first = rng.standard_normal((64, 64))
    second = rng.standard_normal((64, 64))
    if loaded == "one direction":
        second = np.outer(second[0], second[1])
    first, second = (x / np.linalg.norm(x, 2) for x in (first, second))
    screening = Screening(monkeypatch, Dense())
    for _ in range(3):
        screening.fire(0.8 * first)
    assert screening.certified == 1
    new, figures = screening.fire(1.2 * second)
    assert np.linalg.norm(new, 2) <= 1.0 + 1e-9
    assert float(figures["norm_before"]) == pytest.approx(1.2)


def test_the_count_starts_again_after_a_certificate(monkeypatch: pytest.MonkeyPatch) -> None:
    screening = Screening(monkeypatch, Dense())
    counts = []
    for _ in range(300):
        screening.fire(CALM)
        counts.append(screening.certified)
    assert [counts[0], counts[98], counts[99]] == [1, 1, 2]
    assert (np.diff(np.flatnonzero(np.diff(counts))) <= 100).all()


def test_a_leading_direction_that_turns_is_followed(monkeypatch: pytest.MonkeyPatch) -> None:
    screening = Screening(monkeypatch, Dense())
    for angle in np.linspace(0.0, np.pi / 2, 10):
        turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
        screening.fire(turn @ np.diag([0.8, 0.5]) @ turn.T)
    assert screening.certified == 1
    # The vectors of the beginning would see 0.5.
    new, _ = screening.fire(turn @ np.diag([1.2, 0.5]) @ turn.T)
    assert np.linalg.norm(new, 2) == pytest.approx(1.0)


@pytest.mark.parametrize("screen", [True, False])
def test_enforce_and_screen_false_certify_at_once(
    monkeypatch: pytest.MonkeyPatch, eager: Backend, screen: bool
) -> None:
    screening = Screening(monkeypatch, Dense(), screen=screen)
    calm, grown = eager.array(CALM), eager.array(GROWN)
    for _ in range(3):
        assert screening.fire(calm, enforce=screen)[0] is calm
    assert screening.certified == 3
    new = screening.fire(grown, enforce=screen)[0]
    np.testing.assert_allclose(eager.numpy(new), np.minimum(GROWN, 1.0), atol=1e-6)


def test_a_bound_that_sinks_below_the_estimate_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    screening = Screening(monkeypatch, Dense())
    assert screening.fire(CALM)[0] is CALM
    screening.rule = ClipSpectralNorm(0.5)
    assert np.linalg.norm(screening.fire(CALM)[0], 2) <= 0.5 + 1e-12


@pytest.mark.parametrize("tolerance", [0.0, 0.1])
def test_estimates_are_of_the_norm_that_is_certified(
    monkeypatch: pytest.MonkeyPatch, tolerance: float
) -> None:
    """Where no distance is tolerated, this layer is constrained itself and not a torus around it.

    Estimates of the torus looked like jumps: every firing decomposed the layer.
    """
    geometry = Conv((2, 3))
    w = np.random.default_rng(0).standard_normal((90, 90, 3, 3))
    w *= 0.4 / float(specops.spectral_norm(w, geometry))
    screening = Screening(monkeypatch, geometry, distance_tolerance=tolerance)
    for _ in range(3):
        assert screening.fire(w)[0] is w
    assert screening.certified == 1
