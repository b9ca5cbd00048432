"""Layers that are copies of one matrix, 1×1 and patches apart: as cheap as that matrix."""

from __future__ import annotations

import itertools
import tracemalloc

import numpy as np
import pytest

import specops
from specops import ClipSpectralNorm, Conv, Dense, errors
from specops.training.report import measured_norm
from tests import oracle
from tests.backends import Backend

COPIES: list[tuple[tuple[int, ...], Conv]] = [
    ((6, 4, 1, 1), Conv((3, 3))),
    ((6, 4, 1, 1), Conv((4, 5), stride=(2, 3), padding=1)),
    ((3, 5, 1), Conv((4,), stride=3, boundary="circular")),
    ((1, 1, 4, 6), Conv((2, 3), layout="*IO")),
    ((4, 3, 2, 2), Conv((4, 6), stride=2, padding=0)),
    ((4, 3, 2, 3), Conv((5, 5), stride=(2, 4), padding=((1, 0), (2, 2)))),
    ((3, 2, 2), Conv((6,), stride=3, dilation=2, boundary="circular")),
    ((5, 3, 2, 2), Conv((2, 3), transposed=True, stride=2, padding=0, layout="IO*")),
    ((2, 2, 2, 3), Conv((2, 1), transposed=True, stride=3, layout="*OI")),
]
OTHERS: list[tuple[tuple[int, ...], Conv]] = [
    ((4, 3, 2, 2), Conv((4, 4), stride=(2, 1))),
    ((4, 3, 3), Conv((9,), stride=4, dilation=2, padding=2)),
    ((4, 3, 1), Conv((1,), stride=2, padding=1)),
    ((4, 3, 2), Conv((2,), stride=2, padding=1)),
    ((4, 3, 2), Conv((3,), stride=2, boundary="circular")),
    ((4, 3, 2), Conv(None, stride=2)),
    ((4, 1, 1), Conv((3,), groups=4)),
]


def normal(shape: tuple[int, ...], dtype: str = "float64") -> np.ndarray:
    return np.random.default_rng(1).standard_normal(shape).astype(dtype)


def matrix_of(shape: tuple[int, ...], geometry: Conv) -> Dense:
    matrix = geometry.repeated_matrix(shape)
    assert matrix is not None
    return matrix


@pytest.mark.parametrize(("shape", "geometry"), COPIES)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_the_norm_and_the_nearest_weight_are_the_matrixs(
    backend: Backend, shape: tuple[int, ...], geometry: Conv, dtype: str
) -> None:
    w = backend.array(normal(shape), dtype)
    matrix = matrix_of(shape, geometry)
    own = oracle.spectrum(backend.numpy(w).astype(float), geometry)[0]
    norm = backend.numpy(backend.call(lambda w: specops.spectral_norm(w, geometry), w))
    assert norm == pytest.approx(own, rel=1e-5)
    bounds = specops.spectral_norm_bounds(w, geometry)
    assert float(bounds.lower) <= own * (1 + 1e-6)
    assert own <= float(bounds.upper) * (1 + 1e-6)

    bound = float(0.6 * own)
    got = backend.call(lambda w: specops.project_spectral_ball(w, bound, geometry), w)
    as_matrix = backend.call(lambda w: specops.project_spectral_ball(w, bound, matrix), w)
    backend.same_kind(got, w)
    assert np.array_equal(backend.numpy(got), backend.numpy(as_matrix))
    after = oracle.spectrum(backend.numpy(got).astype(float), geometry)[0]
    assert after == pytest.approx(bound, rel=1e-4)


@pytest.mark.parametrize(("shape", "geometry"), OTHERS)
def test_others_are_no_copies_of_a_matrix(shape: tuple[int, ...], geometry: Conv) -> None:
    assert geometry.repeated_matrix(shape) is None


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("boundary", ["zeros", "circular"])
def test_no_layer_is_taken_for_copies_that_has_another_norm(
    boundary: str, transposed: bool
) -> None:
    found = 0
    pads = list(itertools.product(range(3), repeat=2)) if boundary == "zeros" else [None]
    sizes = itertools.product(range(1, 6), range(1, 4), range(1, 4), range(1, 3), pads)
    for n, k, s, d, pad in sizes:
        padding = "same" if pad is None else (pad,)
        geometry = Conv(
            (n,), stride=s, dilation=d, padding=padding, boundary=boundary, transposed=transposed
        )
        shape = (2, 3, k)
        try:
            matrix = geometry.repeated_matrix(shape)
        except errors.GeometryError:
            continue
        if matrix is not None:
            found += 1
            w = normal(shape)
            own = oracle.spectrum(w, geometry)[0]
            assert own == pytest.approx(oracle.spectrum(w, matrix)[0], rel=1e-12), geometry
    assert found >= 15


def test_methods_and_rounds_are_those_of_kernels() -> None:
    w, geometry = normal((6, 4, 1, 1)), Conv((3, 3))
    _, info = specops.project_spectral_ball(
        w, 1.0, geometry, method="dykstra", iterations=3, return_info=True
    )
    assert info.constrained == "torus"


def test_the_rule_follows_the_matrix_and_the_report_has_its_norm() -> None:
    w, geometry = normal((6, 4, 1, 1)), Conv((9, 9))
    matrix = matrix_of(w.shape, geometry)
    rule = ClipSpectralNorm(100.0)
    assert rule.watch(w, geometry, "w").keys() == rule.watch(w, matrix, "w").keys()
    first = rule.update(w, geometry, rule.init(w, geometry, "w"), name="w")
    expected = rule.update(w, matrix, rule.init(w, matrix, "w"), name="w")
    assert first[0] is w
    assert first[1].keys() == expected[1].keys()
    assert measured_norm(w, geometry) == measured_norm(w, matrix)


@pytest.mark.parametrize(
    ("shape", "geometry"),
    [((384, 384, 1, 1), Conv((7, 7))), ((384, 6, 8, 8), Conv((64, 64), stride=8, padding=0))],
)
def test_many_values_above_the_bound_take_no_half_space_each(
    shape: tuple[int, ...], geometry: Conv
) -> None:
    w = normal(shape, "float32")
    tracemalloc.start()
    specops.project_spectral_ball(w, 5.0, geometry)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 40 * w.nbytes
