"""States that do not fit a rule, weights that are not finite, and states under a compiler."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from specops import (
    Conv,
    Dense,
    errors,
)
from specops.geometry import Geometry
from tests.core.laws import (
    GEOMETRIES,
    LAWS,
    assert_near,
    every_rule,
    outcome,
    weight,
)


@pytest.mark.slow
@every_rule
@pytest.mark.parametrize("size", [1.0, 0.01])
def test_a_state_that_does_not_fit_is_not_used(name: str, size: float) -> None:
    """Of no firing yet, of another input size, shape or geometry; outside and inside."""
    rule = LAWS[name].make(1.0)
    kernel, matrix = size * weight((4, 3, 3, 3)), size * weight((5, 4))
    uses: list[tuple[np.ndarray, Any, Geometry]] = [
        (kernel, (kernel, Conv((6, 7))), Conv((3, 4))),
        (kernel, (kernel, Conv((3, 4))), Conv((6, 7))),
        (kernel, (kernel, Dense()), Conv((3, 4))),
        (kernel, (kernel, Conv((3, 4))), Dense()),
        (matrix, (size * weight((6, 4)), Dense()), Dense()),
        (matrix, None, Dense()),
    ]
    for w, before, now in uses:
        state = {} if before is None else outcome(rule, *before)[1]
        fresh = outcome(rule, w, now)[0]
        assert_near(outcome(rule, w, now, state)[0], fresh, now, rule, 1e-2)


@every_rule
@pytest.mark.parametrize("boundary", ["zeros", "circular"])
def test_nan_is_refused_or_told(name: str, boundary: Any) -> None:
    """By an error, or by the figures; never by a warning of an array library."""
    rule = LAWS[name].make(1.0)
    conv = Conv((5,), boundary=boundary)
    used: list[tuple[tuple[int, ...], Geometry]] = [((5, 4), Dense()), ((4, 3, 3), conv)]
    for shape, geometry in used:
        w = weight(shape)
        good = rule.init(w, geometry, "w")
        w[0, 0] = np.nan
        for state in (None, good):
            try:
                _, _, figures = outcome(rule, w, geometry, state)
            except errors.NonFiniteError:
                continue
            assert state is good
            assert not all(np.isfinite(x).all() for x in figures.values())


@pytest.mark.parametrize("name", ["clip", "normalize operator", "soft cap"])
def test_one_nan_matrix_leaves_the_others_of_a_stack_capped(name: str) -> None:
    w = weight((2, 5, 4))[::-1].copy()
    w[1, 0, 0] = np.nan
    with pytest.warns(errors.NonFiniteWarning):
        got = outcome(LAWS[name].make(1.0), w, GEOMETRIES["stack"][1])[0]
    assert np.linalg.norm(got[0], 2) <= 1.0 + 1e-9


@pytest.mark.parametrize("name", ["clip", "rank operator", "penalty operator"])
def test_jit_takes_a_state_of_an_eager_firing(name: str) -> None:
    jax = pytest.importorskip("jax")
    rule = LAWS[name].make(6.0)  # inside, so that the clip has vectors
    w = jax.numpy.asarray(weight((5, 4)))
    state = outcome(rule, w, Dense())[1]
    eager, later, figures = outcome(rule, 1.1 * w, Dense(), state)
    traced = jax.jit(lambda x, s: outcome(rule, x, Dense(), s))(1.1 * w, state)
    np.testing.assert_allclose(traced[0], eager, rtol=0, atol=1e-6)
    for key, value in figures.items():
        np.testing.assert_allclose(traced[2][key], value, rtol=1e-6)
    if rule.stage != "weights":
        assert traced[1].keys() == later.keys()
        for key, value in later.items():
            sign = np.sign(np.vdot(traced[1][key], value))  # of a vector it is arbitrary
            np.testing.assert_allclose(sign * traced[1][key], value, rtol=0, atol=1e-8)
