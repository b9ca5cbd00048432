"""``measure_norms=False``: the same weight, and NaN where a norm was not measured."""

from __future__ import annotations

import numpy as np
import pytest

import specops
from specops import Conv, Dense
from specops.geometry import Geometry
from tests.backends import Backend

WEIGHTS: dict[str, tuple[tuple[int, ...], Geometry]] = {
    "matrix": ((6, 4), Dense()),
    "stack": ((3, 4, 5), Dense(out_axes=(1,), batch_axes=(0,))),
    "splits": ((6, 4), Dense(splits=(2, 4))),
    "circular": ((3, 2, 3, 3), Conv((6, 6), boundary="circular")),
    "zeros": ((2, 2, 3), Conv((7,))),
    "stride": ((2, 3, 4), Conv((9,), stride=2)),
}
BOUNDS = {"far outside": 1e-4, "outside": 0.7, "inside": 1e3}


def weight(shape: tuple[int, ...]) -> np.ndarray:
    return np.random.default_rng(0).standard_normal(shape)


@pytest.mark.parametrize("bound", BOUNDS.values(), ids=BOUNDS)
@pytest.mark.parametrize(("shape", "geometry"), WEIGHTS.values(), ids=WEIGHTS)
def test_norms_that_were_not_measured_are_nan(
    backend: Backend, shape: tuple[int, ...], geometry: Geometry, bound: float
) -> None:
    w = backend.array(weight(shape))

    def projected(w, measure):  # type: ignore[no-untyped-def]
        new, info = specops.project_spectral_ball(
            w, bound, geometry, return_info=True, measure_norms=measure
        )
        return new, info.norm_before, info.norm_after

    new, *measured = backend.call(lambda w: projected(w, True), w)
    same, *unmeasured = backend.call(lambda w: projected(w, False), w)
    np.testing.assert_array_equal(backend.numpy(same), backend.numpy(new))
    for norm, unknown in zip(measured, unmeasured, strict=True):
        backend.same_kind(unknown, norm)
        assert unknown.shape == norm.shape
        assert (backend.numpy(norm) > 0).all()
        if backend.traced:
            # It is needed for the decision, and costs nothing more to tell.
            np.testing.assert_array_equal(backend.numpy(unknown), backend.numpy(norm))
        else:
            assert np.isnan(backend.numpy(unknown)).all()


@pytest.mark.parametrize("name", ["matrix", "circular", "zeros"])
def test_zeros_are_inside_unmeasured(eager: Backend, name: str) -> None:
    shape, geometry = WEIGHTS[name]
    w = eager.array(np.zeros(shape))
    new, info = specops.project_spectral_ball(
        w, 1.0, geometry, return_info=True, measure_norms=False
    )
    assert new is w
    assert np.isnan(eager.numpy(info.norm_before)).all()
    new, info = specops.project_spectral_ball(w, 1.0, geometry, return_info=True)
    assert new is w
    assert eager.numpy(info.norm_before) == 0.0


def test_a_warm_start_may_tell_a_bound_instead(eager: Backend) -> None:
    shape, geometry = WEIGHTS["circular"]
    w = eager.array(weight(shape))
    _, info = specops.project_spectral_ball(w, 0.7, geometry, return_info=True)
    new, told = specops.project_spectral_ball(
        w, 0.7, geometry, return_info=True, measure_norms=False, state=info.state
    )
    assert 0.7 < eager.numpy(told.norm_before) <= eager.numpy(info.norm_before) * (1 + 1e-5)
    assert np.isnan(eager.numpy(told.norm_after))
    # A state that is of no use: nothing was measured on the way.
    small, told = specops.project_spectral_ball(
        1e-3 * w, 0.7, geometry, return_info=True, measure_norms=False, state=info.state
    )
    assert eager.numpy(small).shape == eager.numpy(new).shape
    assert np.isnan(eager.numpy(told.norm_before))
