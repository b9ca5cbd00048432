"""Compiled decompositions of infinity: LAPACK may never end on it."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import specops
from specops import Conv, Dense


@pytest.mark.parametrize("bad", [np.inf, -np.inf, np.nan])
@pytest.mark.parametrize(("shape", "geometry"), [((6, 4), Dense()), ((2, 2, 3, 3), Conv((5, 5)))])
def test_compiled_projections_end_and_leave_the_weight(
    bad: float, shape: tuple[int, ...], geometry: Any
) -> None:
    w = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    w.flat[0] = bad
    project = jax.jit(lambda w: specops.project_spectral_ball(w, 1.0, geometry))
    np.testing.assert_array_equal(project(jnp.asarray(w)), w)
    fine = jnp.asarray(np.where(np.isfinite(w), w, 3.0))
    assert specops.spectral_norm(np.asarray(project(fine)), geometry) <= 1 + 1e-5
