"""The nearest point of a nearest point is itself, the same array."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

import specops
from specops import Dense
from specops.geometry import Geometry
from tests.backends import Backend
from tests.core.nearest import (
    LAYERS,
    SPLIT,
    dtypes_of,
    few_above,
    norm,
    normal,
)

IDEMPOTENT: list[tuple[tuple[int, ...], Geometry]] = [
    ((7, 5), Dense()),
    ((3, 4, 6), Dense(out_axes=(1,), batch_axes=(0,))),
    *SPLIT,
    *LAYERS[:4],
    LAYERS[8],
    LAYERS[-1],
]


def test_twice_is_once(eager: Backend) -> None:
    for shape, geometry in IDEMPOTENT[4:5] if eager.name == "jax" else IDEMPOTENT:
        check_twice_is_once(eager, shape, geometry)


def check_twice_is_once(eager: Backend, shape: tuple[int, ...], geometry: Geometry) -> None:
    """The second call returns its argument, from a warm state as well."""
    for dtype, share in itertools.product(
        dtypes_of(eager, "float32", "float64", "complex64"), (0.3, 0.9)
    ):
        values = normal(shape, 9, complex=dtype == "complex64")
        w = eager.array(values, dtype)
        bound = share * norm(values, geometry)
        once, info = specops.project_spectral_ball(w, bound, geometry, return_info=True)
        assert info.iterations >= 1
        assert specops.project_spectral_ball(once, bound, geometry) is once
        for state in (None, info.state):
            twice, again = specops.project_spectral_ball(
                once, bound, geometry, state=state, return_info=True
            )
            assert twice is once
            assert again.iterations == 0
            assert (eager.numpy(again.gap) == 0).all()
            after, before = eager.numpy(again.norm_after), eager.numpy(again.norm_before)
            np.testing.assert_array_equal(after, before)
            assert (after <= bound * (1 + 1e-6)).all()


@pytest.mark.parametrize("method", ["cutting-planes", "accelerated", "dykstra", "alternating"])
def test_twice_is_once_by_each_method(method: str) -> None:
    shape, geometry = LAYERS[0]
    w = normal(shape, 10)
    once = specops.project_spectral_ball(w, 2.0, geometry, method=method)
    for again in ("auto", method):
        assert specops.project_spectral_ball(once, 2.0, geometry, method=again) is once


def test_twice_is_once_from_a_warm_matrix() -> None:
    w = few_above(64, 48)
    _, info = specops.project_spectral_ball(w, 1.0, return_info=True)
    once, warm = specops.project_spectral_ball(
        w + 1e-4 * normal(w.shape, 11), 1.0, state=info.state, return_info=True
    )
    for state in (None, info.state, warm.state):
        twice, again = specops.project_spectral_ball(once, 1.0, state=state, return_info=True)
        assert twice is once
        assert again.iterations == 0
