"""Projections land where they say, change only what they must, and stay put."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given

import specops
from specops import Conv, Dense, errors
from specops.geometry import Geometry
from tests import oracle
from tests.backends import Backend
from tests.strategies import Case, convolutions, denses

GEOMETRIES: list[tuple[tuple[int, ...], Geometry]] = [
    ((6, 4), Dense()),
    ((4, 9), Dense()),
    ((2, 5, 4), Dense(out_axes=(1,), batch_axes=(0,))),
    ((4, 3, 3, 3), Conv((6, 6), boundary="circular")),
    ((4, 3, 3, 3), Conv((5, 5))),
    ((4, 2, 3, 3), Conv((6, 6), stride=2, groups=2, padding=1)),
    ((3, 4, 4, 4), Conv((4, 4), transposed=True, stride=2, padding=1, layout="IO*")),
    ((5, 2, 3), Conv((3,), boundary="circular", layout="*IO")),
]


@pytest.mark.parametrize(("shape", "geometry"), GEOMETRIES)
@pytest.mark.parametrize("dtype", ["float32", "float64", "complex64"])
def test_feasible_by_the_explicit_matrix(
    backend: Backend, shape: tuple[int, ...], geometry: Geometry, dtype: str
) -> None:
    rng = np.random.default_rng(5)
    w = rng.standard_normal(shape)
    if dtype == "complex64":
        w = w + 1j * rng.standard_normal(shape)
    given = backend.array(w, dtype)
    norm = oracle.spectrum(w, geometry)[..., 0].max()
    for share in (0.2, 0.7, 0.999):
        got = backend.call(
            lambda x, c=share * norm: specops.project_spectral_ball(x, c, geometry), given
        )
        backend.same_kind(got, given)
        assert got.shape == given.shape
        result = backend.numpy(got).astype(np.result_type(w, np.float64))
        sigma = oracle.spectrum(result, geometry)
        assert sigma[..., 0].max() <= share * norm * (1 + 1e-5)


@given(denses())
def test_dense_projection_is_the_nearest_point(case: Case) -> None:
    w = case.weight()
    geometry = case.geometry
    matrices = oracle.dense_matrix(w, geometry)
    u, s, vh = np.linalg.svd(matrices, full_matrices=False)
    bound = 0.6 * s.max()
    expected = (u * np.minimum(s, bound)[..., None, :]) @ vh
    got = specops.project_spectral_ball(w, bound, geometry)
    np.testing.assert_allclose(
        oracle.dense_matrix(got, geometry), expected, atol=1e-10 * max(s.max(), 1e-30)
    )


@given(convolutions())
def test_every_convolution_is_constrained(case: Case) -> None:
    w = case.weight()
    sigma = oracle.spectrum(w, case.geometry)[0]
    assume(sigma > 0)
    got, info = specops.project_spectral_ball(w, 0.5 * sigma, case.geometry, return_info=True)
    achieved = oracle.spectrum(got, case.geometry)[0]
    assert achieved <= 0.5 * sigma * (1 + 1e-12)
    assert achieved <= info.norm_after * (1 + 1e-12)
    assert info.norm_before >= sigma * (1 - 1e-12)
    assert got.shape == w.shape


@pytest.mark.slow
def test_any_size_holds_for_each_size() -> None:
    rng = np.random.default_rng(0)
    for stride, dilation in [(1, 1), (2, 1), (1, 2), (2, 3)]:
        w = rng.standard_normal((3, 2, 3, 2))
        options: dict[str, Any] = {"stride": stride, "dilation": dilation}
        got = specops.project_spectral_ball(w, 1.0, Conv(None, **options))
        for n in (1, 2, 3, 5, 8, 12):
            for boundary in ("zeros", "circular"):
                conv = Conv((n * stride, n * stride), boundary=boundary, **options)
                assert specops.spectral_norm(got, conv) <= 1.0 + 1e-12


@pytest.mark.parametrize(("shape", "geometry"), GEOMETRIES)
def test_inside_stays_untouched_and_twice_is_once(
    eager: Backend, shape: tuple[int, ...], geometry: Geometry
) -> None:
    w = eager.array(np.random.default_rng(2).standard_normal(shape), "float32")
    bound = 0.5 * float(eager.numpy(specops.spectral_norm_bounds(w, geometry).upper).max())
    once = specops.project_spectral_ball(w, bound, geometry)
    assert once is not w
    twice, info = specops.project_spectral_ball(once, bound, geometry, return_info=True)
    assert info.iterations == 0
    assert twice is once


def test_splits_are_separate_balls() -> None:
    w = np.concatenate([3 * np.eye(4), 0.5 * np.eye(4)])
    got, info = specops.project_spectral_ball(w, 1.0, Dense(splits=(4, 4)), return_info=True)
    np.testing.assert_allclose(got, np.concatenate([np.eye(4), 0.5 * np.eye(4)]), atol=1e-12)
    np.testing.assert_array_equal(got[4:], w[4:])
    np.testing.assert_allclose(info.norm_before, [3.0, 0.5])


@pytest.mark.parametrize("name", ["float16", "bfloat16"])
@pytest.mark.parametrize(("shape", "geometry"), [((64, 48), Dense()), ((6, 4, 3, 3), Conv((5, 5)))])
def test_half_precision_holds_as_stored(
    name: str, shape: tuple[int, ...], geometry: Geometry
) -> None:
    torch = pytest.importorskip("torch")
    w = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(getattr(torch, name))
    got = specops.project_spectral_ball(w, 1.0, geometry)
    assert got.dtype == w.dtype
    norm = float(specops.spectral_norm_bounds(got, geometry).lower)
    assert 0.98 < norm <= 1.0 or isinstance(geometry, Conv)
    assert norm <= 1.0


@pytest.mark.slow
@pytest.mark.parametrize("scale", [1e-18, 1e18])
@pytest.mark.parametrize(("shape", "geometry"), GEOMETRIES[:5])
def test_extreme_scales(
    eager: Backend, shape: tuple[int, ...], geometry: Geometry, scale: float
) -> None:
    small, large = (projected_at(eager, shape, geometry, s) for s in (1.0, scale))
    atol = 1e-5 if isinstance(geometry, Dense) else 5e-4
    np.testing.assert_allclose(large / scale, small, atol=atol)


@lru_cache(maxsize=2)
def projected_at(
    eager: Backend, shape: tuple[int, ...], geometry: Geometry, scale: float
) -> np.ndarray:
    """A weight and a bound, both of that scale."""
    w = np.random.default_rng(2).standard_normal(shape)
    # Within the gap a kernel may be any: a small one makes it the nearest to 1e-4.
    return eager.numpy(
        specops.project_spectral_ball(
            eager.array(w * scale, "float32"), scale, geometry, gap_tolerance=1e-9
        )
    )


@pytest.mark.parametrize(("shape", "geometry"), GEOMETRIES[:5])
def test_zero_stays_zero(backend: Backend, shape: tuple[int, ...], geometry: Geometry) -> None:
    zero = backend.array(np.zeros(shape, dtype=np.float32))
    got = backend.call(lambda x: specops.project_spectral_ball(x, 1.0, geometry), zero)
    assert (backend.numpy(got) == 0).all()


def test_repeated_projection_of_clipped_weights_survives_the_solver() -> None:
    rng = np.random.default_rng(0)
    torch = pytest.importorskip("torch")
    w = torch.asarray(rng.standard_normal((128, 128)).astype(np.float32))
    for _ in range(5):
        w = specops.project_spectral_ball(w, 1.0)
        w = w + 0.001 * torch.asarray(rng.standard_normal((128, 128)).astype(np.float32))
    assert float(specops.spectral_norm(specops.project_spectral_ball(w, 1.0))) <= 1.0


@pytest.mark.parametrize("bound", [0.0, -1.0, float("nan"), float("inf"), "1", None, True])
def test_bad_bounds(bound: Any) -> None:
    with pytest.raises(ValueError, match="max_norm must be a positive finite number"):
        specops.project_spectral_ball(np.eye(2), bound)
    with pytest.raises(ValueError, match="max_norm must be a positive finite number"):
        specops.ClipSpectralNorm(bound)


def test_unknown_method() -> None:
    with pytest.raises(ValueError, match="method must be one of auto, eigh, svd, products"):
        specops.project_spectral_ball(np.eye(2), 1.0, method="newton")


def test_bad_matrices_of_a_stack_are_left_alone() -> None:
    w = 5 * np.stack([np.eye(3), np.eye(3), np.eye(3)])
    w[1, 0, 0] = np.nan
    given = w.copy()
    geometry = Dense(out_axes=(1,), batch_axes=(0,))
    with pytest.warns(errors.NonFiniteWarning, match="batch index 1 "):
        got = specops.project_spectral_ball(w, 1.0, geometry)
    np.testing.assert_array_equal(w, given)
    np.testing.assert_array_equal(got[1], w[1])
    np.testing.assert_allclose(got[[0, 2]], np.stack([np.eye(3)] * 2), atol=1e-12)


def test_non_finite_raises_and_leaves_the_argument() -> None:
    for shape, geometry in GEOMETRIES[:2] + GEOMETRIES[3:]:
        w = np.full(shape, 2.0)
        w.flat[0] = np.inf
        with pytest.raises(errors.NonFiniteError):
            specops.project_spectral_ball(w, 1.0, geometry)
        assert np.isinf(w.flat[0])


@pytest.mark.parametrize("scale", [1e4, 1e6, 1e8, 1e20])
@pytest.mark.parametrize(("shape", "geometry"), GEOMETRIES[:6])
def test_far_outside_is_as_accurate(
    eager: Backend, shape: tuple[int, ...], geometry: Geometry, scale: float
) -> None:
    w = np.random.default_rng(2).standard_normal(shape)
    got = eager.numpy(
        specops.project_spectral_ball(eager.array(w * scale, "float32"), 1.0, geometry)
    )
    expected = specops.project_spectral_ball(w, 1.0 / scale, geometry) * scale
    np.testing.assert_allclose(got, expected, atol=2e-5 if isinstance(geometry, Dense) else 2e-2)
    if isinstance(geometry, Dense):
        u, _, vh = np.linalg.svd(oracle.dense_matrix(w, geometry), full_matrices=False)
        np.testing.assert_allclose(oracle.dense_matrix(got, geometry), u @ vh, atol=1e-5)


def test_tiny_bounds_in_half_precision_are_met() -> None:
    torch = pytest.importorskip("torch")
    w = torch.randn(8, 8, generator=torch.Generator().manual_seed(0)).half()
    got = specops.project_spectral_ball(w, 1e-6)
    assert float(specops.spectral_norm(got)) <= 1e-6


def test_traced_projection_leaves_a_bad_kernel_alone() -> None:
    jax = pytest.importorskip("jax")
    w = np.full((2, 2, 3), 3.0)
    w[0, 0, 0] = np.nan
    got = jax.jit(lambda x: specops.project_spectral_ball(x, 1.0, Conv((4,))))(w)
    np.testing.assert_array_equal(got, w)
