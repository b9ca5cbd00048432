"""Circular convolutions whose stride does not divide the grid along some axis."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import specops
from specops import Conv
from specops.maps.convolution import ConvOperator
from specops.maps.every_size import certified_symbol
from specops.tracking import TrackedOperator, TrackedTorus
from tests import oracle, structured
from tests.backends import BACKENDS, Backend, leave_to_others
from tests.core.nearest import check_variational_inequality, norm, slowly, torus
from tests.core.stable_ranks import (
    assert_nearest_in_cone,
    axis_and_gram,
    coordinates,
    least_along,
    nearest_along,
)
from tests.strategies import Case

pytestmark = pytest.mark.slow

LAYERS: list[tuple[tuple[int, ...], Conv]] = [
    ((1, 1, 3), Conv((4,), stride=3, dilation=2, boundary="circular")),
    ((2, 3, 3), Conv((7,), stride=2, boundary="circular")),
    ((2, 2, 3, 3), Conv((5, 4), stride=2, boundary="circular")),
    ((4, 1, 5, 2), Conv((3, 6), stride=(2, 3), groups=2, boundary="circular")),
    ((3, 5, 2, 1), Conv((4, 3), stride=(3, 4), dilation=(2, 1), layout="*IO", boundary="circular")),
    ((2, 2, 4), Conv((1,), stride=2, boundary="circular")),
    ((1, 2, 2, 3, 2), Conv((2, 3, 3), stride=(2, 2, 3), boundary="circular")),
]


@st.composite
def strided(draw: Any, complex: bool = True) -> Case:
    """At least one stride does not divide; taps wrap onto each other as often as not."""
    ndim = draw(st.sampled_from([1, 1, 2, 2, 3]))
    axes = [
        (
            draw(st.integers(1, 3 if ndim == 3 else 7)),
            draw(st.integers(1, 2 if ndim == 3 else 5)),
            draw(st.integers(1, 4)),
            draw(st.integers(1, 3)),
        )
        for _ in range(ndim)
    ]
    size, kernel, stride, dilation = (tuple(a[i] for a in axes) for i in range(4))
    assume(any(n % s for n, s in zip(size, stride, strict=True)))
    groups = draw(st.sampled_from([1, 1, 2]))
    layout = draw(st.sampled_from(["OI*", "IO*", "*IO", "*OI"]))
    geometry = Conv(
        size, stride=stride, dilation=dilation, groups=groups, boundary="circular", layout=layout
    )
    full, part = draw(st.integers(1, 3)) * groups, draw(st.integers(1, 3))
    shape = (full, part, *kernel) if layout[0] != "*" else (*kernel, part, full)
    return Case(geometry, shape, complex and draw(st.booleans()), draw(st.integers(0, 2**16)))


def normal(shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape)


def check_numbers(w: np.ndarray, geometry: Conv) -> None:
    """Norm, bounds, stable rank and tracked norms against the explicit matrices."""
    sigma = oracle.spectrum(w, geometry)
    unit = sigma[0] or 1.0
    assert float(specops.spectral_norm(w, geometry)) == pytest.approx(sigma[0], abs=1e-12)
    rank = float(specops.stable_rank(w, geometry))
    assert rank == pytest.approx(((sigma / unit) ** 2).sum(), rel=1e-9)
    operator = ConvOperator(geometry.kernel(w), geometry.sizes(w.shape))
    squared = float(operator.squared_frobenius())
    assert squared == pytest.approx((sigma**2).sum(), rel=1e-10, abs=1e-20)
    bounds = specops.spectral_norm_bounds(w, geometry)
    assert float(bounds.lower) <= sigma[0] <= float(bounds.upper)
    assert float(bounds.lower) == pytest.approx(sigma[0], rel=1e-10, abs=1e-12)
    on_torus = np.linalg.norm(oracle.conv_matrix(w, torus(geometry, w.shape)), 2)
    assert float(bounds.upper) == pytest.approx(on_torus, rel=1e-10, abs=1e-12)
    follow = TrackedOperator(geometry)
    state = follow.advance(w, follow.start(w, "w"), 20)
    (tracked,) = follow.measured(state)
    assert sigma[0] * 0.99 - 1e-12 <= float(tracked) <= sigma[0] * (1 + 1e-12)
    constrained = TrackedTorus(geometry)
    estimate = float(constrained.estimate(w, constrained.start(w, "w"), 20)[0])
    assert on_torus * 0.95 - 1e-12 <= estimate <= on_torus * (1 + 1e-12)


@pytest.mark.slow
@given(strided())
@settings(max_examples=40)
def test_every_number_is_that_of_the_explicit_matrix(case: Case) -> None:
    check_numbers(case.weight(), case.geometry)


@pytest.mark.slow
@given(strided(complex=False), st.sampled_from(list(structured.KINDS)))
@settings(max_examples=40)
def test_every_number_of_kernels_with_structure(case: Case, kind: str) -> None:
    check_numbers(structured.weight(case, kind, 1.0, False), case.geometry)


@given(strided())
def test_strides_that_divide_stay(case: Case) -> None:
    geometry = case.geometry
    symbol, factor = certified_symbol(geometry.sizes(case.shape), True)
    kept = tuple(1 if n % s else s for n, s in zip(geometry.grid, geometry.stride, strict=True))
    assert factor == 1.0
    assert symbol.sizes.stride == kept
    assert symbol.fine == geometry.grid


def test_a_stride_that_divides_makes_the_bound_sharper() -> None:
    w, geometry = normal((3, 2, 3, 3)), Conv((6, 5), stride=(3, 2), boundary="circular")
    at_one = Conv((6, 5), boundary="circular")
    upper = float(specops.spectral_norm_bounds(w, geometry).upper)
    assert upper < 0.9 * float(specops.spectral_norm(w, at_one))


@given(strided())
@settings(max_examples=40)
def test_projections_are_nearest_and_inside_the_layers_own_ball(case: Case) -> None:
    w, geometry = case.weight(), case.geometry
    assume(max(torus(geometry, case.shape).sizes(case.shape).matrix_shape()) <= 200)
    check_variational_inequality(w, geometry, 0.7)
    own = oracle.spectrum(w, geometry)[0]
    assume(own > 0)
    for method in ("auto", "accelerated"):
        p, info = specops.project_spectral_ball(
            w, 0.7 * own, geometry, method=method, return_info=True
        )
        bounded = norm(p, geometry, method)
        assert float(info.norm_after) == pytest.approx(bounded, rel=1e-3)
        assert oracle.spectrum(p, geometry)[0] <= bounded * (1 + 1e-12) <= 0.7 * own * (1 + 1e-9)


@pytest.mark.parametrize(("shape", "geometry"), LAYERS)
@pytest.mark.parametrize("method", ["auto", "accelerated", "dykstra", "alternating"])
def test_the_gap_is_that_of_what_is_constrained(
    shape: tuple[int, ...], geometry: Conv, method: str
) -> None:
    w = normal(shape, 6)
    bound = 0.5 * norm(w, geometry, method)
    truth, error = slowly(w, geometry, bound, method=method)
    for tolerance in (1e-2, 1e-6):
        got, info = specops.project_spectral_ball(
            w, bound, geometry, method=method, gap_tolerance=tolerance, return_info=True
        )
        certified = (float(info.gap) + 1e-13) * (w**2).sum()
        assert np.linalg.norm(got - truth) <= np.sqrt(certified) + np.sqrt(error)


@given(strided())
@settings(max_examples=40)
def test_stable_rank_projections(case: Case) -> None:
    w, geometry = case.weight(), case.geometry
    assume(w.size <= 60)
    sigma = oracle.spectrum(w, geometry)
    assume(sigma[0] > 1e-6)
    full, least = (sigma**2).sum() / sigma[0] ** 2, least_along(w, geometry)
    assume(full > least * (1 + 1e-6))
    apart = len(sigma) < 2 or sigma[1] < sigma[0] * (1 - 1e-3)
    for share in (1e-3, 0.1, 0.6):
        target = least + share * (full - least)
        x, info = specops.project_stable_rank(w, geometry, target=target, return_info=True)
        s = oracle.spectrum(x, geometry)
        assert (s**2).sum() <= target * s[0] ** 2 * (1 + 1e-9)
        assert float(info.rank_before) == pytest.approx(full, rel=1e-6)
        assert float(info.distance) == pytest.approx(np.linalg.norm(w - x), rel=1e-6)
        along, axis, _ = nearest_along(w, geometry, target)
        assert np.linalg.norm(w - x) <= np.linalg.norm(w - along) * (1 + 1e-6)
        if apart:
            e, (_, gram) = coordinates(axis), axis_and_gram(w, geometry)
            assert coordinates(w) @ e == pytest.approx(sigma[0])
            assert_nearest_in_cone(coordinates(w), coordinates(along), e, gram, target)


@pytest.mark.parametrize(("shape", "geometry"), LAYERS[2:5])
def test_on_every_backend(backend: Backend, shape: tuple[int, ...], geometry: Conv) -> None:
    leave_to_others(backend, geometry != LAYERS[2][1])
    dtype = "float64" if backend.doubles else "float32"
    w = normal(shape).astype(dtype)
    sigma, given_ = oracle.spectrum(w.astype(float), geometry), backend.array(w, dtype)
    rank = (sigma**2).sum() / sigma[0] ** 2
    tolerance = 64 * float(np.finfo(dtype).eps)

    def measure(x: Any) -> Any:
        bounds = specops.spectral_norm_bounds(x, geometry)
        norm = specops.spectral_norm(x, geometry)
        return norm, specops.stable_rank(x, geometry), bounds.lower, bounds.upper

    norm, found, lower, upper = map(float, backend.call(measure, given_))
    assert (norm, found) == pytest.approx((sigma[0], rank), rel=tolerance)
    assert lower <= sigma[0] <= upper
    p = backend.numpy(
        backend.call(lambda x: specops.project_spectral_ball(x, 0.5 * norm, geometry), given_)
    ).astype(float)
    assert oracle.spectrum(p, geometry)[0] <= 0.5 * norm * (1 + 1e-6)
    least = least_along(w.astype(float), geometry)
    target = least + 0.5 * (rank - least)
    q = backend.numpy(
        backend.call(lambda x: specops.project_stable_rank(x, geometry, target=target), given_)
    ).astype(float)
    s = oracle.spectrum(q, geometry)
    assert (s**2).sum() <= target * s[0] ** 2 * (1 + 1e-5)


def test_a_case_by_hand() -> None:
    geometry = Conv((4,), stride=3, dilation=2, boundary="circular")
    rank = float(specops.stable_rank(np.array([[[1.0, 2.0, 3.0]]]), geometry))
    assert rank == pytest.approx(2.0, rel=1e-14)


@pytest.mark.parametrize("name", ["numpy", "torch", "jax"])
@pytest.mark.parametrize(("shape", "geometry"), LAYERS[:4])
def test_the_derivative_of_the_stable_rank(
    name: str, shape: tuple[int, ...], geometry: Conv
) -> None:
    w, direction, step = normal(shape), normal(shape, 1), 1e-6
    ends = [specops.stable_rank(w + t * direction, geometry) for t in (step, -step)]
    wanted = float(ends[0] - ends[1]) / (2 * step)
    if name == "torch":
        torch = pytest.importorskip("torch")
        x = torch.tensor(w, requires_grad=True)
        specops.stable_rank(x, geometry).backward()
        slope = x.grad.numpy()
    elif name == "jax":
        jax = pytest.importorskip("jax")
        slope = np.asarray(jax.jit(jax.grad(lambda x: specops.stable_rank(x, geometry)))(w))
    else:
        operator = oracle.conv_matrix(w, geometry)
        u, s, vh = np.linalg.svd(operator)
        units = np.eye(w.size).reshape(-1, *shape)
        images = np.stack([oracle.conv_matrix(unit, geometry) for unit in units])
        inside = np.tensordot(images, operator, 2) - (operator**2).sum() / s[0] * np.einsum(
            "kij,i,j->k", images, u[:, 0], vh[0]
        )
        slope = (2 * inside / s[0] ** 2).reshape(shape)
    assert (slope * direction).sum() == pytest.approx(wanted, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("name", ["numpy", "torch"])
def test_large_operators_are_iterated(name: str) -> None:
    (backend,) = (b for b in BACKENDS if b.name == name)
    geometry = Conv((13, 12), stride=(2, 3), boundary="circular")
    for w in (normal((4, 4, 3, 3)), structured.orthogonal(np.random.default_rng(0), 4, 4, (3, 3))):
        s = oracle.spectrum(w, geometry)
        given_ = backend.array(w)
        assert float(specops.spectral_norm(given_, geometry)) == pytest.approx(s[0], rel=1e-5)
        rank = float(specops.stable_rank(given_, geometry))
        assert rank == pytest.approx((s**2).sum() / s[0] ** 2, rel=1e-4)


@pytest.mark.parametrize("name", ["numpy", "torch", "jax"])
@pytest.mark.parametrize(("shape", "geometry"), LAYERS[2:4])
def test_rules(name: str, shape: tuple[int, ...], geometry: Conv) -> None:
    (backend,) = (b for b in BACKENDS if b.name == name)
    leave_to_others(backend, geometry != LAYERS[2][1])
    w = normal(shape)
    own, given_ = oracle.spectrum(w, geometry)[0], backend.array(w)
    clip = specops.ClipSpectralNorm(0.5 * own)
    for state in ({}, clip.watch(given_, geometry, "w")):
        new = backend.numpy(clip.update(given_, geometry, state)[0])
        assert oracle.spectrum(new, geometry)[0] <= 0.5 * own * (1 + 1e-9)
    rule = specops.SpectralNormalization(norm="operator")
    used = rule.apply(given_, geometry, rule.init(given_, geometry, "w"))
    assert oracle.spectrum(backend.numpy(used), geometry)[0] == pytest.approx(1.0, rel=1e-2)
    limit = specops.StableRankNormalization(0.9, norm="operator", iterations=30)
    state = limit.update(given_, geometry, limit.init(given_, geometry, "w"))[1]
    s = oracle.spectrum(backend.numpy(limit.apply(given_, geometry, state)), geometry)
    side = min(geometry.sizes(shape).matrix_shape())
    allowed = max(0.9 * side, 1.0, least_along(w, geometry))
    assert (s**2).sum() / s[0] ** 2 <= allowed * (1 + 1e-2)
