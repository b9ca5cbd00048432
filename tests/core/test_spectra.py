"""Spectra against the explicit matrix."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import assume, given

import specops
from specops import Conv, Dense, errors
from specops.geometry import Geometry
from specops.maps.symbol import symbol_of
from tests import oracle
from tests.backends import Backend, leave_to_others
from tests.strategies import Case, convolutions, denses

MEASURES = (
    specops.singular_values,
    specops.spectral_norm,
    specops.stable_rank,
)


def reference(function: object, sigma: np.ndarray) -> np.ndarray:
    first = sigma[..., 0]
    if function is specops.singular_values:
        return sigma
    if function is specops.spectral_norm:
        return first
    return (sigma**2).sum(-1) / np.where(first > 0, first, 1) ** 2


def test_every_convolution_against_the_explicit_matrix() -> None:
    @given(convolutions())
    def check(case: Case) -> None:
        w = case.weight()
        sigma = oracle.spectrum(w, case.geometry)
        assume(sigma.size > 0 and w.size * sigma.size < 200_000)
        values = specops.singular_values(w, case.geometry)
        assert values.shape == sigma.shape
        scale = sigma[0] or 1.0
        assert np.abs(values - sigma).max() <= 1e-12 * scale
        assert abs(specops.spectral_norm(w, case.geometry) - sigma[0]) <= 1e-12 * scale
        rank = specops.stable_rank(w, case.geometry)
        assert rank == pytest.approx((sigma**2).sum() / scale**2, rel=1e-10)
        bounds = specops.spectral_norm_bounds(w, case.geometry)
        assert bounds.lower <= sigma[0] <= bounds.upper

    check()


@pytest.mark.parametrize("dtype", ["float64", "float32", "complex64"])
@pytest.mark.parametrize(
    ("shape", "geometry"),
    [
        ((5, 3, 3, 3), Conv((6, 6), boundary="circular")),
        ((4, 2, 5, 2), Conv((3, 8), stride=(1, 2), groups=2, boundary="circular")),
        ((3, 3, 4, 2), Conv((5, 4), boundary="circular", layout="*IO")),
        ((3, 4, 2, 2), Conv((3, 2), boundary="circular", transposed=True, layout="IO*")),
        ((4, 3, 3, 3), Conv((5, 5))),
        ((4, 3, 3), Conv((7,), stride=2, padding=1)),
        ((6, 4), Dense()),
        ((6, 4), Dense(out_axes=(1,))),
        ((2, 5, 4), Dense(out_axes=(1,), batch_axes=(0,))),
    ],
)
@pytest.mark.parametrize("function", MEASURES, ids=lambda f: f.__name__)
def test_on_every_backend(
    backend: Backend,
    function: object,
    shape: tuple[int, ...],
    geometry: Geometry,
    dtype: str,
    rng: np.random.Generator,
) -> None:
    w = rng.standard_normal(shape)
    if dtype.startswith("complex"):
        w = w + 1j * rng.standard_normal(shape)
    given = backend.array(w, dtype)
    got = backend.call(lambda x: function(x, geometry), given)  # type: ignore[operator]
    real = backend.array(np.zeros(1), {"complex64": "float32"}.get(dtype, dtype)).dtype
    backend.same_kind(got, given, real)
    sigma = oracle.spectrum(w, geometry)
    expected = reference(function, sigma)
    digits = 1e-5 if "float64" not in str(given.dtype) else 1e-12
    scale = sigma.max() if function is specops.singular_values else np.abs(expected).max()
    assert backend.numpy(got).shape == expected.shape
    assert np.abs(backend.numpy(got) - expected).max() <= digits * scale


@given(denses())
def test_dense_views(case: Case) -> None:
    w = case.weight()
    sigma = oracle.spectrum(w, case.geometry)
    values = specops.singular_values(w, case.geometry)
    assert values.shape == sigma.shape
    np.testing.assert_allclose(values, sigma, atol=1e-12 * sigma.max())
    np.testing.assert_allclose(specops.spectral_norm(w, case.geometry), sigma[..., 0], rtol=1e-12)


def test_splits_measure_each_block(backend: Backend, rng: np.random.Generator) -> None:
    w = rng.standard_normal((7, 4)).astype(np.float32)
    geometry = Dense(splits=(2, 5))
    got = backend.call(lambda x: specops.singular_values(x, geometry), backend.array(w))
    assert isinstance(got, tuple)
    for part, block in zip(got, (w[:2], w[2:]), strict=True):
        np.testing.assert_allclose(
            backend.numpy(part), np.linalg.svd(block, compute_uv=False), rtol=1e-5
        )


def test_kernel_larger_than_the_grid_folds() -> None:
    w = np.random.default_rng(0).standard_normal((2, 2, 5, 5))
    geometry = Conv((3, 3), boundary="circular")
    sigma = oracle.spectrum(w, geometry)
    assert specops.spectral_norm(w, geometry) == pytest.approx(sigma[0], rel=1e-12)
    truncated = np.linalg.svd(np.fft.fft2(w, (3, 3), axes=(2, 3)).transpose(2, 3, 0, 1))[1].max()
    assert abs(truncated - sigma[0]) > 0.1 * sigma[0]


def test_groups_take_the_largest_norm_not_the_product() -> None:
    w = np.ones((2, 1, 1, 1)) * np.array([3.0, 5.0]).reshape(2, 1, 1, 1)
    geometry = Conv((4, 4), groups=2, boundary="circular")
    assert float(specops.spectral_norm(w, geometry)) == pytest.approx(5.0)


def test_reshaped_norm_is_not_the_operators() -> None:
    w = np.ones((1, 1, 3, 3))
    assert float(specops.spectral_norm(w, Dense())) == pytest.approx(3.0)
    assert float(specops.spectral_norm(w, Conv((8, 8), boundary="circular"))) == pytest.approx(9.0)


@pytest.mark.parametrize("scale", [1e-20, 1e20, 2.0**-100, 2.0**100])
@pytest.mark.parametrize(("shape", "geometry"), [((5, 4), Dense()), ((3, 2, 3, 3), Conv((4, 4)))])
def test_extreme_scales(
    backend: Backend, shape: tuple[int, ...], geometry: Geometry, scale: float
) -> None:
    w = np.random.default_rng(3).standard_normal(shape)
    small = backend.array(w.astype(np.float32))
    large = backend.array((w * scale).astype(np.float32))
    norms = lambda x: specops.spectral_norm(x, geometry)  # noqa: E731
    ranks = lambda x: specops.stable_rank(x, geometry)  # noqa: E731
    for function, factor in ((norms, scale), (ranks, 1.0)):
        a = backend.numpy(backend.call(function, small))
        b = backend.numpy(backend.call(function, large))
        np.testing.assert_allclose(b / factor, a, rtol=2e-6)


@pytest.mark.parametrize(("shape", "geometry"), [((4, 3), Dense()), ((3, 2, 3, 3), Conv((4, 4)))])
def test_zero_weights(backend: Backend, shape: tuple[int, ...], geometry: Geometry) -> None:
    zero = backend.array(np.zeros(shape, dtype=np.float32))
    for function in MEASURES:
        got = backend.call(lambda x, f=function: f(x, geometry), zero)
        assert (backend.numpy(got) == 0).all()


@pytest.mark.parametrize("name", ["float16", "bfloat16"])
def test_half_precision_is_measured_in_single(name: str) -> None:
    torch = pytest.importorskip("torch")
    w = torch.randn(6, 4, generator=torch.Generator().manual_seed(0)).to(getattr(torch, name))
    norm = specops.spectral_norm(w)
    assert norm.dtype == torch.float32
    assert float(norm) == pytest.approx(float(torch.linalg.matrix_norm(w.double(), 2)), rel=1e-6)


def test_one_bad_matrix_does_not_spoil_the_stack(eager: Backend) -> None:
    w = np.random.default_rng(1).standard_normal((3, 4, 5))
    good = np.linalg.svd(w, compute_uv=False)
    w[1, 2, 2] = np.nan
    geometry = Dense(out_axes=(1,), batch_axes=(0,))
    with pytest.warns(errors.NonFiniteWarning, match="batch index 1 ") as seen:
        values = eager.numpy(specops.singular_values(eager.array(w), geometry))
    assert seen[0].filename == __file__
    assert np.isnan(values[1]).all()
    np.testing.assert_allclose(values[[0, 2]], good[[0, 2]], rtol=1e-5)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize(("shape", "geometry"), [((4, 3), Dense()), ((3, 2, 3, 3), Conv((4, 4)))])
def test_non_finite_weights_raise(
    eager: Backend, shape: tuple[int, ...], geometry: Geometry, bad: float
) -> None:
    w = np.ones(shape)
    w.flat[1] = bad
    for function in MEASURES:
        with pytest.raises(errors.NonFiniteError, match="NaN or infinity"):
            function(eager.array(w), geometry)


def test_what_has_no_exact_spectrum_says_what_to_use() -> None:
    w = np.ones((2, 2, 3, 3))
    with pytest.raises(errors.UnsupportedGeometryError, match="spectral_norm_bounds"):
        specops.singular_values(w, Conv((7, 7), stride=2, boundary="circular"))
    with pytest.raises(errors.UnsupportedGeometryError, match="spectral_norm_bounds"):
        specops.singular_values(w, Conv(None))
    with pytest.raises(errors.UnsupportedGeometryError, match="spectral_norm"):
        specops.singular_values(np.ones((32, 32, 3, 3)), Conv((32, 32)))


@given(convolutions(boundary="circular"))
def test_transposing_array_and_geometry_keeps_the_spectrum(case: Case) -> None:
    w = case.weight()
    assume(np.prod(case.shape) * np.prod(case.geometry.grid) < 3000)
    np.testing.assert_allclose(
        specops.singular_values(w, case.geometry.transpose()),
        specops.singular_values(w, case.geometry),
        atol=1e-12 * np.abs(w).sum(),
    )


def test_indivisible_circular_stride_is_enclosed() -> None:
    rng = np.random.default_rng(0)
    for _ in range(20):
        w = rng.standard_normal((2, 3, 3, 2))
        geometry = Conv((7, 5), stride=(2, 3), boundary="circular")
        sigma = oracle.spectrum(w, geometry)[0]
        assert specops.spectral_norm(w, geometry) == pytest.approx(sigma, rel=1e-12)
        bounds = specops.spectral_norm_bounds(w, geometry)
        assert bounds.lower <= sigma <= bounds.upper


def test_any_size_bounds_hold_for_each_size() -> None:
    rng = np.random.default_rng(0)
    for stride, dilation in [(1, 1), (2, 1), (1, 2), (2, 2), (3, 2)]:
        w = rng.standard_normal((3, 2, 3))
        options = {"stride": stride, "dilation": dilation}
        bounds = specops.spectral_norm_bounds(w, Conv(None, **options))
        best = 0.0
        for n in (stride * m for m in (1, 2, 3, 7, 20, 40)):
            best = max(best, float(specops.spectral_norm(w, Conv((n,), **options))))
        assert 0.97 * bounds.upper <= best <= bounds.upper
        assert bounds.lower <= best * (1 + 5e-3)
        circular = specops.spectral_norm_bounds(w, Conv(None, boundary="circular", **options))
        for n in range(1, 13):
            norm = specops.spectral_norm(w, Conv((n,), boundary="circular", **options))
            assert norm <= circular.upper


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_many_groups_of_similar_norm(eager: Backend, dtype: str) -> None:
    leave_to_others(eager, dtype == "float32")
    for seed in range(6 if eager.name in ("numpy", "torch") else 1):
        rng = np.random.default_rng(seed)
        w = rng.standard_normal((16, 1, 3, 3)).astype(dtype)
        geometry = Conv((7, 7), groups=16, padding=1)
        sigma = oracle.spectrum(w.astype(np.float64), geometry)[0]
        got = float(specops.spectral_norm(eager.array(w), geometry))
        precise = dtype == "float64" and eager.doubles
        assert got == pytest.approx(sigma, rel=1e-10 if precise else 2e-6)


def test_layers_that_differ_in_channels_share_their_tables() -> None:
    """Of a megabyte and more on large grids."""
    conv = Conv((64, 64), boundary="circular")
    first, second = (symbol_of(conv.sizes((channels, 2, 3, 3)), (64, 64)) for channels in (3, 5))
    assert first.angles is second.angles
    assert first.frequencies is second.frequencies
