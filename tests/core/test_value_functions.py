"""Functions of the singular values: clips from both sides, polar factors, Schatten balls."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given

import specops
from specops import Conv, Dense, errors
from specops.geometry import Geometry
from tests import oracle
from tests.backends import Backend
from tests.strategies import Case, denses

MATRICES: list[tuple[tuple[int, ...], Geometry]] = [
    ((6, 4), Dense()),
    ((4, 9), Dense()),
    ((1, 5), Dense()),
    ((5, 1), Dense()),
    ((2, 5, 4), Dense(out_axes=(1,), batch_axes=(0,))),
]
FUNCTIONS: dict[str, Any] = {
    "clip": lambda w, g: specops.clip_singular_values(w, 0.5, 1.5, g),
    "polar": lambda w, g: specops.polar_factor(w, g),
    "products": lambda w, g: specops.polar_factor(w, g, method="products"),
    "nuclear": lambda w, g: specops.project_schatten_ball(w, 1.0, g, p=1),
    "frobenius": lambda w, g: specops.project_schatten_ball(w, 1.0, g, p=2),
}


def on_simplex(s: np.ndarray, radius: float) -> np.ndarray:
    """The nearest point of the ℓ1 ball to non-negative values, by bisection on its threshold."""
    low, high = 0.0, float(s.max())
    for _ in range(200):
        middle = 0.5 * (low + high)
        low, high = (middle, high) if np.maximum(s - middle, 0).sum() > radius else (low, middle)
    return np.maximum(s - high, 0) if s.sum() > radius else s


def expected(name: str, w: np.ndarray, geometry: Dense) -> np.ndarray:
    """The matrices that the function stands for, from the SVD in double precision."""
    u, s, vh = np.linalg.svd(oracle.dense_matrix(w, geometry), full_matrices=False)
    values = {
        "clip": lambda s: np.clip(s, 0.5, 1.5),
        "polar": np.ones_like,
        "products": np.ones_like,
        "nuclear": lambda s: on_simplex(s, 1.0),
        "frobenius": lambda s: s * min(1.0, 1.0 / float(np.linalg.norm(s))),
    }[name]
    s = np.apply_along_axis(values, -1, s)
    return (u * s[..., None, :]) @ vh


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize(("shape", "geometry"), MATRICES)
def test_values_are_what_they_should_be(
    backend: Backend, name: str, shape: tuple[int, ...], geometry: Dense
) -> None:
    w = np.random.default_rng(3).standard_normal(shape)
    given = backend.array(w, "float32")
    got = backend.call(lambda x: FUNCTIONS[name](x, geometry), given)
    backend.same_kind(got, given)
    result = oracle.dense_matrix(backend.numpy(got), geometry)
    np.testing.assert_allclose(result, expected(name, w, geometry), atol=2e-5)


@pytest.mark.parametrize("name", FUNCTIONS)
@given(case=denses())
def test_every_dense_geometry(name: str, case: Case) -> None:
    w = case.weight()
    got = oracle.dense_matrix(FUNCTIONS[name](w, case.geometry), case.geometry)
    wanted = expected(name, w, case.geometry)
    s = np.linalg.svd(oracle.dense_matrix(w, case.geometry), compute_uv=False)
    # A polar factor is as sensitive as the reciprocal of the smallest value.
    sensitivity = 1.0 / max(float(s.min()), 1e-12) if name in ("polar", "products") else 1.0
    np.testing.assert_allclose(got, wanted, atol=1e-11 * max(1.0, float(s.max()) * sensitivity))


@pytest.mark.parametrize("p", [1, 2, math.inf])
def test_schatten_balls_are_feasible_as_stored_and_idempotent(eager: Backend, p: float) -> None:
    w = eager.array(np.random.default_rng(0).standard_normal((12, 8)), "float32")
    once = specops.project_schatten_ball(w, 2.0, p=p)
    sigma = np.linalg.svd(eager.numpy(once).astype(np.float64), compute_uv=False)
    assert np.linalg.norm(sigma, p) <= 2.0 * (1 + 1e-6)
    assert np.linalg.norm(sigma, p) >= 2.0 * (1 - 1e-5)
    assert specops.project_schatten_ball(once, 2.0, p=p) is once


@pytest.mark.parametrize("p", [1, 2])
@given(case=denses())
def test_schatten_projections_satisfy_the_variational_inequality(p: int, case: Case) -> None:
    w = case.weight()
    a = oracle.dense_matrix(w, case.geometry)
    nearest = oracle.dense_matrix(
        specops.project_schatten_ball(w, 0.7, case.geometry, p=p), case.geometry
    )
    other = np.random.default_rng(1).standard_normal(a.shape)
    norms = np.linalg.norm(np.linalg.svd(other, compute_uv=False), p, axis=-1)
    other = 0.7 * other / norms[..., None, None]
    inner = np.sum(((a - nearest).conj() * (other - nearest)).real, axis=(-2, -1))
    assert (inner <= 1e-10).all()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_half_precision(name: str, dtype: str) -> None:
    torch = pytest.importorskip("torch")
    w = torch.randn(16, 9, generator=torch.Generator().manual_seed(0)).to(getattr(torch, dtype))
    got = FUNCTIONS[name](w, None)
    assert got.dtype == w.dtype
    wanted = expected(name, w.double().numpy(), Dense())
    np.testing.assert_allclose(got.double().numpy(), wanted, atol=2e-2)


@pytest.mark.parametrize("scale", [1e-18, 1e18])
def test_extreme_scales(eager: Backend, scale: float) -> None:
    w = np.random.default_rng(2).standard_normal((6, 4))
    given = eager.array(w * scale, "float32")
    got = eager.numpy(specops.clip_singular_values(given, 0.5 * scale, 1.5 * scale)) / scale
    np.testing.assert_allclose(got, expected("clip", w, Dense()), atol=2e-5)
    got = eager.numpy(specops.polar_factor(given))
    np.testing.assert_allclose(got, expected("polar", w, Dense()), atol=2e-5)
    got = eager.numpy(specops.project_schatten_ball(given, scale, p=1)) / scale
    np.testing.assert_allclose(got, expected("nuclear", w, Dense()), atol=2e-5)


def test_zero_and_rank_deficient(eager: Backend) -> None:
    zero = eager.array(np.zeros((4, 3)), "float32")
    for p in (1, 2):
        assert specops.project_schatten_ball(zero, 1.0, p=p) is zero
    raised = eager.numpy(specops.clip_singular_values(zero, 0.5, 1.0))
    np.testing.assert_allclose(np.linalg.svd(raised, compute_uv=False), 0.5, atol=1e-6)
    one = eager.array(np.outer([1.0, 2.0, 2.0], [3.0, 4.0]), "float32")
    for method in ("svd", "products"):
        factor = eager.numpy(specops.polar_factor(one, method=method))
        np.testing.assert_allclose(factor.T @ factor, np.eye(2), atol=1e-5)


@pytest.mark.parametrize(
    ("shape", "geometry"),
    [
        ((4, 3, 3, 3), Conv((6, 5), boundary="circular")),
        ((4, 2, 2, 3), Conv((6, 6), stride=2, groups=2, boundary="circular")),
        ((3, 4, 5), Conv((3,), boundary="circular")),
    ],
)
def test_convolutions_as_in_the_paper(
    backend: Backend, shape: tuple[int, ...], geometry: Conv
) -> None:
    w = np.random.default_rng(3).standard_normal(shape)
    low, high = np.quantile(oracle.spectrum(w, geometry), [0.3, 0.7])
    got = backend.call(
        lambda x: specops.clip_singular_values(x, low, high, geometry), backend.array(w, "float32")
    )
    matrix = oracle.conv_matrix(w, geometry)
    u, s, vh = np.linalg.svd(matrix, full_matrices=False)
    clipped = (u * np.clip(s, low, high)) @ vh
    # Least squares over kernels: the projection of the clipped operator onto their span.
    span = np.stack(
        [oracle.conv_matrix(e, geometry).ravel() for e in np.eye(w.size).reshape(-1, *shape)]
    )
    change = np.linalg.lstsq(span.T, (clipped - matrix).ravel(), rcond=None)[0]
    np.testing.assert_allclose(backend.numpy(got), w + change.reshape(shape), atol=2e-5)


def test_rounds_approach_the_bounds() -> None:
    w = np.random.default_rng(0).standard_normal((8, 8, 3, 3))
    geometry = Conv((8, 8), boundary="circular")
    bound = 0.5 * specops.spectral_norm(w, geometry)
    norms = [
        float(
            specops.spectral_norm(
                specops.clip_singular_values(w, 0.0, bound, geometry, iterations=n), geometry
            )
        )
        for n in (1, 5, 50)
    ]
    assert norms[0] > 1.05 * bound
    assert norms[0] > norms[1] > norms[2] > bound
    assert norms[2] < 1.02 * bound


def test_bad_arguments() -> None:
    for bounds in ((-1.0, 1.0), (2.0, 1.0), (math.nan, 1.0), (0.0, math.nan), ("0", 1.0)):
        with pytest.raises(ValueError, match=r"lower|bounds"):
            specops.clip_singular_values(np.eye(2), *bounds)
    with pytest.raises(ValueError, match="p must be 1, 2 or infinity"):
        specops.project_schatten_ball(np.eye(2), 1.0, p=3)
    with pytest.raises(ValueError, match="method must be one of auto, svd, products"):
        specops.polar_factor(np.eye(2), method="newton")
    kernel = np.ones((2, 2, 3, 3))
    with pytest.raises(errors.UnsupportedGeometryError, match="circular"):
        specops.clip_singular_values(kernel, 0.0, 1.0, Conv((6, 6)))
    with pytest.raises(errors.UnsupportedGeometryError, match="kernel as large as its grid"):
        specops.polar_factor(kernel, Conv((6, 6), boundary="circular"))
    with pytest.raises(errors.UnsupportedGeometryError, match="reshaped"):
        specops.project_schatten_ball(kernel, 1.0, Conv((6, 6)), p=1)


def test_splits_and_bad_matrices_of_a_stack() -> None:
    w = np.concatenate([3 * np.eye(3), 0.1 * np.eye(3)])
    got = specops.clip_singular_values(w, 0.0, 1.0, Dense(splits=(3, 3)))
    np.testing.assert_allclose(got, np.concatenate([np.eye(3), 0.1 * np.eye(3)]), atol=1e-12)
    stack = np.stack([2 * np.eye(2), np.full((2, 2), np.nan)])
    with pytest.warns(errors.NonFiniteWarning, match="batch index 1 "):
        got = specops.polar_factor(stack, Dense(out_axes=(1,), batch_axes=(0,)))
    np.testing.assert_allclose(got[0], np.eye(2), atol=1e-12)
    assert np.isnan(got[1]).all()


@pytest.mark.parametrize("scale", [2.0**12, 2.0**40])
def test_bounds_far_below_the_values_are_not_rounded_away(backend: Backend, scale: float) -> None:
    rng = np.random.default_rng(7)
    w = rng.integers(-8, 9, (6, 5)).astype(np.float64)
    w[:, 1] = 2 * w[:, 0]  # of rank 4
    u, s, vh = np.linalg.svd(w * scale, full_matrices=False)
    wanted = (u * on_simplex(np.maximum(s - s[0] + 2.0, 0.0), 1.0)) @ vh
    given = backend.array(w * scale, "float32")
    ball = backend.call(lambda x: specops.project_schatten_ball(x, 1.0, p=1), given)
    np.testing.assert_allclose(backend.numpy(ball), wanted, atol=1e-4)

    torus = Conv((5, 5), boundary="circular")
    kernel = rng.integers(-8, 9, (2, 3, 3, 3)).astype(np.float64)
    # All values are above both bounds, in double precision without cancellation.
    wanted = specops.clip_singular_values(kernel, 2.0**-13, 2.0**-12, torus) * 2.0**12
    given = backend.array(kernel * scale, "float32")
    clipped = backend.call(lambda x: specops.clip_singular_values(x, 0.5, 1.0, torus), given)
    np.testing.assert_allclose(backend.numpy(clipped), wanted, atol=1e-4)
