"""A nearest point by the inequalities that only projections onto convex sets satisfy."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import assume, given, settings

import specops
from specops import Conv, Dense
from specops.geometry import Geometry
from tests.core.nearest import (
    LAYERS,
    SPLIT,
    check_variational_inequality,
    clipped,
    inner,
    matrices,
    norm,
    normal,
    project,
    random_like,
    small,
    squared,
)
from tests.strategies import Case, convolutions, denses


@given(denses())
def test_dense_variational_inequality(case: Case) -> None:
    check_variational_inequality(case.weight(), case.geometry, 0.6)


@pytest.mark.parametrize(("shape", "geometry"), SPLIT)
@pytest.mark.parametrize("complex", [False, True])
def test_split_variational_inequality(
    shape: tuple[int, ...], geometry: Dense, complex: bool
) -> None:
    w = normal(shape, 3, complex=complex)
    check_variational_inequality(w, geometry, 0.4)
    p = specops.project_spectral_ball(w, 0.4 * norm(w, geometry), geometry)
    for got, m in zip(matrices(p, geometry), matrices(w, geometry), strict=True):
        expected = clipped(m, 0.4 * norm(w, geometry))
        np.testing.assert_allclose(got, expected, atol=1e-13 * norm(w, geometry))


@given(convolutions())
@settings(max_examples=60)
def test_conv_variational_inequality(case: Case) -> None:
    assume(small(case))
    w = case.weight()
    assume(norm(w, case.geometry) > 0)
    check_variational_inequality(w, case.geometry, 0.7)


@pytest.mark.parametrize(("shape", "geometry"), LAYERS)
def test_conv_variational_inequality_of_each_kind(shape: tuple[int, ...], geometry: Conv) -> None:
    check_variational_inequality(normal(shape, 4), geometry, 0.3)
    check_variational_inequality(normal(shape, 5, complex=True), geometry, 0.9)


def check_firmly_non_expansive(a: np.ndarray, geometry: Geometry) -> None:
    """‖P(a) − P(b)‖² ≤ ⟨P(a) − P(b), a − b⟩ for near and far b."""
    rng = np.random.default_rng(1)
    bound = 0.6 * norm(a, geometry)
    assume(bound > 0)
    p, error_a = project(a, bound, geometry, gap_tolerance=1e-10)
    for step in (1e-2, 1.0):
        b = a + step * np.sqrt(squared(a) / a.size) * random_like(a, rng)
        q, error_b = project(b, bound, geometry, gap_tolerance=1e-10)
        error, far = np.sqrt(error_a) + np.sqrt(error_b), np.sqrt(squared(a - b))
        slack = error * (3.0 * far + error)
        assert squared(p - q) <= inner(p - q, a - b) + slack


@given(denses())
@settings(max_examples=20)
def test_dense_is_firmly_non_expansive(case: Case) -> None:
    check_firmly_non_expansive(case.weight(), case.geometry)


@pytest.mark.slow
@given(convolutions())
@settings(max_examples=30)
def test_conv_is_firmly_non_expansive(case: Case) -> None:
    assume(small(case))
    check_firmly_non_expansive(case.weight(), case.geometry)
