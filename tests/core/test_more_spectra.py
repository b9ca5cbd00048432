"""Operators, leading triplets, further summaries, and tightened bounds."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

import specops
from specops import Conv, Dense, errors
from specops.linalg.gram_iteration import enclosure, gram_iteration
from tests import oracle
from tests.backends import Backend
from tests.strategies import Case, convolutions, denses


def matrices() -> list[np.ndarray]:
    """Square, wide, tall, repeated, rank-deficient, zero, tiny and huge."""
    rng = np.random.default_rng(0)
    q = np.linalg.qr(rng.standard_normal((12, 12)))[0]
    shapes = [(8, 8), (5, 20), (20, 5), (1, 7), (7, 1)]
    return [
        *(rng.standard_normal(s) for s in shapes),
        q,
        q @ np.diag([3.0, 3, 3, 2.999, *np.linspace(2, 1, 8)]) @ q.T,
        np.outer(np.arange(6.0), np.arange(5.0)),
        np.zeros((4, 3)),
        1e-20 * q,
        1e20 * q,
    ]


@given(convolutions())
def test_operator_is_the_explicit_matrix(case: Case) -> None:
    w = case.weight()
    matrix = oracle.conv_matrix(w, case.geometry)
    operator = specops.linear_operator(w, case.geometry)
    assert operator.shape == matrix.shape
    rng = np.random.default_rng(0)
    x, y = (rng.standard_normal((2, n)).astype(w.dtype) for n in matrix.shape[::-1])
    np.testing.assert_allclose(operator.matvec(x), x @ matrix.T, atol=1e-10)
    np.testing.assert_allclose(operator.rmatvec(y), y @ matrix.conj(), atol=1e-10)
    np.testing.assert_allclose(operator.to_matrix(), matrix, atol=1e-12)


@given(denses())
def test_operator_of_matrices(case: Case) -> None:
    w = case.weight()
    matrix = oracle.dense_matrix(w, case.geometry)
    operator = specops.linear_operator(w, case.geometry)
    assert operator.shape == matrix.shape[-2:]
    np.testing.assert_array_equal(operator.to_matrix(), matrix)
    rng = np.random.default_rng(0)
    x = rng.standard_normal((*matrix.shape[:-2], matrix.shape[-1])).astype(w.dtype)
    y = operator.matvec(x)
    np.testing.assert_allclose(y, np.einsum("...ij,...j->...i", matrix, x), atol=1e-12)
    z = rng.standard_normal(y.shape).astype(w.dtype)
    assert np.vdot(z, y) == pytest.approx(np.vdot(operator.rmatvec(z), x))


@given(convolutions())
def test_triplets_of_convolutions(case: Case) -> None:
    w = case.weight()
    sigma = oracle.spectrum(w, case.geometry)
    assume(sigma.size >= 2 and sigma[0] > 0)
    k = min(3, sigma.size)
    matrix = oracle.conv_matrix(w, case.geometry)
    u, s, v = specops.top_singular_triplets(w, k, case.geometry)
    check_triplets(matrix, u, s, v, sigma[:k], 1e-10)


@given(convolutions(boundary="circular"), st.integers(1, 10**6))
def test_any_number_of_triplets_of_circular_convolutions(case: Case, count: int) -> None:
    """From a few of a cluster to all, those that are zero among them."""
    w = case.weight()
    sigma = oracle.spectrum(w, case.geometry)
    matrix = oracle.conv_matrix(w, case.geometry)
    k = 1 + count % sigma.size
    u, s, v = specops.top_singular_triplets(w, k, case.geometry)
    check_triplets(matrix, u, s, v, sigma[:k], 1e-10)
    scale = max(sigma.max(), 1e-300)
    np.testing.assert_allclose(matrix.conj().T @ u, v * s, atol=1e-10 * scale)


def check_triplets(
    matrix: np.ndarray,
    u: np.ndarray,
    s: np.ndarray,
    v: np.ndarray,
    expected: np.ndarray,
    tolerance: float,
) -> None:
    scale = max(expected.max(), 1e-300)
    np.testing.assert_allclose(s, expected, atol=tolerance * scale)
    np.testing.assert_allclose(matrix @ v, u * s, atol=tolerance * scale)
    eye = np.eye(len(s))
    np.testing.assert_allclose(u.conj().T @ u, eye, atol=tolerance)
    np.testing.assert_allclose(v.conj().T @ v, eye, atol=tolerance)


@pytest.mark.slow
@pytest.mark.parametrize("boundary", ["zeros", "circular"])
def test_iterated_triplets_and_a_warm_start(boundary: str) -> None:
    w = np.random.default_rng(0).standard_normal((6, 5, 3, 3))
    geometry = Conv((9, 8), boundary=boundary)
    sigma = oracle.spectrum(w, geometry)
    matrix = oracle.conv_matrix(w, geometry)
    start = np.random.default_rng(1).standard_normal((matrix.shape[1], 9))
    u, s, v = specops.top_singular_triplets(w, 4, geometry, start=start)
    check_triplets(matrix, u, s, v, sigma[:4], 1e-7)
    np.testing.assert_allclose(s, sigma[:4], rtol=1e-12)
    near = w + 1e-3 * np.random.default_rng(2).standard_normal(w.shape)
    _, again, _ = specops.top_singular_triplets(near, 4, geometry, start=v)
    np.testing.assert_allclose(again, oracle.spectrum(near, geometry)[:4], rtol=1e-10)


def test_triplets_on_every_backend(eager: Backend) -> None:
    w = np.random.default_rng(0).standard_normal((2, 6, 4)).astype(np.float32)
    geometry = Dense(out_axes=(1,), batch_axes=(0,))
    given = eager.array(w)
    u, s, v = specops.top_singular_triplets(given, 2, geometry)
    for array in (u, s, v):
        eager.same_kind(array, given)
    for i in range(2):
        parts = (eager.numpy(a)[i] for a in (u, s, v))
        expected = np.linalg.svd(w[i], compute_uv=False)[:2]
        check_triplets(w[i], *parts, expected, 1e-5)
    kernel = eager.array(np.random.default_rng(0).standard_normal((3, 2, 3)).astype(np.float32))
    conv = Conv((6,))
    start = eager.array(np.random.default_rng(1).standard_normal((12, 4)).astype(np.float32))
    u, s, v = specops.top_singular_triplets(kernel, 2, conv, start=start)
    host = eager.numpy(kernel)
    expected = oracle.spectrum(host.astype(float), conv)[:2]
    matrix = oracle.conv_matrix(host, conv)
    check_triplets(matrix, *(eager.numpy(a) for a in (u, s, v)), expected, 2e-3)
    circular = Conv((6,), boundary="circular")
    expected = oracle.spectrum(host.astype(float), circular)[:5]
    found = specops.top_singular_triplets(kernel, 5, circular)
    for array in found:
        eager.same_kind(array, kernel)
    matrix = oracle.conv_matrix(host, circular)
    check_triplets(matrix, *(eager.numpy(a) for a in found), expected, 1e-5)


def test_bad_counts_of_triplets() -> None:
    for k, error in [(0, errors.GeometryError), (4, ValueError), (1.5, errors.GeometryError)]:
        with pytest.raises(error, match="k"):
            specops.top_singular_triplets(np.ones((3, 5)), k)
    with pytest.raises(errors.UnsupportedGeometryError, match="each block"):
        specops.top_singular_triplets(np.ones((4, 5)), 1, Dense(splits=(2, 2)))


def test_effective_rank_and_condition_number(backend: Backend) -> None:
    w = backend.array(np.diag([4.0, 2.0, 2.0]).astype(np.float32))
    p = np.array([0.5, 0.25, 0.25])
    rank = backend.call(specops.effective_rank, w)
    assert float(rank) == pytest.approx(np.exp(-(p * np.log(p)).sum()), rel=1e-5)
    assert float(backend.call(specops.condition_number, w)) == pytest.approx(2.0, rel=1e-5)
    huge = backend.array((1e38 * np.eye(3)).astype(np.float32))
    assert float(backend.call(specops.effective_rank, huge)) == pytest.approx(3.0, rel=1e-5)
    zero = backend.array(np.zeros((2, 3), np.float32))
    assert float(backend.call(specops.effective_rank, zero)) == 0.0
    assert float(backend.call(specops.condition_number, zero)) == float("inf")
    # Neither depends on the scale, though the norm leaves the range.
    full = backend.array(np.float32(2.0**127) * np.array([[1, 1, 1], [1, 1, -1], [1, -1, 1]], "f"))
    small = backend.array(np.array([[1, 1, 1], [1, 1, -1], [1, -1, 1]], np.float32))
    for function in (specops.effective_rank, specops.condition_number):
        assert float(backend.call(function, full)) == float(backend.call(function, small))
    conv = Conv((4,), boundary="circular")
    kernel = backend.array(np.ones((1, 1, 1), np.float32))
    assert float(backend.call(lambda x: specops.effective_rank(x, conv), kernel)) == pytest.approx(
        4.0, rel=1e-5
    )
    assert float(backend.call(lambda x: specops.condition_number(x, conv), kernel)) == 1.0


@pytest.mark.parametrize("w", matrices(), ids=lambda w: f"{w.shape}")
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_dense_certificates(w: np.ndarray, dtype: type) -> None:
    scale = np.abs(w).max() or 1.0
    a = (w / scale).astype(dtype)
    sigma = np.linalg.svd(a.astype(np.float64), compute_uv=False)[0]
    upper = float(gram_iteration(np, a, 8))
    assert sigma <= upper <= 1.02 * sigma + 1e-30
    rng = np.random.default_rng(0)
    for width in (1, min(2, *a.shape)):
        exact = np.linalg.svd(a.astype(np.float64))[2][:width].T
        for noise in (0.0, 1e-3, 1.0):
            v, _ = np.linalg.qr(exact + noise * rng.standard_normal(exact.shape))
            lower, upper = (float(b) for b in enclosure(np, a, v.astype(dtype)))
            assert lower <= sigma <= upper
            if noise == 0.0:
                assert upper <= sigma * (1 + 2.5e-2)
    w32 = w.astype(dtype)
    truth = np.linalg.svd(w32.astype(np.float64), compute_uv=False)[0]
    start = rng.standard_normal((w.shape[1], 3))
    bounds = specops.spectral_norm_bounds(w32, start=start.astype(dtype))
    assert float(bounds.lower) <= truth <= float(bounds.upper)
    bounds = specops.spectral_norm_bounds(w32)
    assert float(bounds.lower) <= truth <= float(bounds.upper)


def test_warm_bounds_are_tight() -> None:
    rng = np.random.default_rng(0)
    w = rng.standard_normal((60, 40))
    _, _, v = specops.top_singular_triplets(w, 6)
    near = w + 1e-3 * rng.standard_normal(w.shape)
    bounds = specops.spectral_norm_bounds(near, start=v)
    truth = np.linalg.norm(near, 2)
    assert bounds.lower <= truth <= bounds.upper
    assert bounds.lower >= truth * (1 - 1e-6)
    assert bounds.upper <= truth * (1 + 1e-3)


@pytest.mark.parametrize("rtol", [1e-2, 1e-4, 1e-7])
def test_supremum_by_branch_and_bound(eager: Backend, rtol: float) -> None:
    rng = np.random.default_rng(0)
    for shape, options in [
        ((3, 2, 3), {}),
        ((2, 3, 4), {"stride": 2}),
        ((2, 2, 3, 3), {"dilation": 2}),
        ((4, 1, 3, 2), {"groups": 2, "stride": (2, 1)}),
    ]:
        w = rng.standard_normal(shape)
        geometry = Conv(None, **options)
        bounds = specops.spectral_norm_bounds(eager.array(w), geometry, rtol=rtol)
        lower, upper = float(bounds.lower), float(bounds.upper)
        assert upper <= lower * (1 + rtol + (5e-5 if "32" in str(bounds.upper.dtype) else 1e-9))
        ndim = len(shape) - 2
        fine = Conv((240,) * ndim if ndim == 1 else (48, 48), boundary="circular", **options)
        norm = float(specops.spectral_norm(w, fine))
        assert norm <= upper * (1 + 1e-12)
        assert norm >= lower * (1 - 5e-3)


def test_flat_symbols_stop_at_the_cap() -> None:
    delta = np.zeros((1, 1, 3, 3))
    delta[0, 0, 0, 0] = 1.0
    bounds = specops.spectral_norm_bounds(delta, Conv(None), rtol=1e-9, max_evaluations=3000)
    assert bounds.lower <= 1.0 <= bounds.upper <= 1.01


def test_larger_tori_tighten_a_zero_padded_bracket() -> None:
    rng = np.random.default_rng(1)
    for _ in range(10):
        w = rng.standard_normal((3, 3, 3, 3))
        geometry = Conv((6, 6))
        loose = specops.spectral_norm_bounds(w, geometry)
        tight = specops.spectral_norm_bounds(w, geometry, rtol=1e-6)
        truth = oracle.spectrum(w, geometry)[0]
        assert loose.lower <= truth <= tight.upper <= loose.upper
        assert tight.lower == pytest.approx(truth, rel=1e-12)
    with pytest.raises(ValueError, match="rtol"):
        specops.spectral_norm_bounds(w, geometry, rtol=0.0)


def test_supremum_between_the_grid_points() -> None:
    # taps exp(-ia) peak at the frequency 1, which is on no grid
    w = np.exp(-1j * np.arange(3.0)).reshape(1, 1, 3)
    for rtol in (1e-3, 1e-6):
        bounds = specops.spectral_norm_bounds(w, Conv(None), rtol=rtol)
        assert 3.0 * (1 - rtol) <= bounds.lower <= 3.0 <= bounds.upper <= 3.0 * (1 + 2 * rtol)


@pytest.mark.parametrize("turn", [1, 1j, -1j, np.exp(0.3j)])
@pytest.mark.parametrize("groups", [1, 2])
def test_a_phase_of_a_zero_padded_kernel_changes_nothing(turn: complex, groups: int) -> None:
    # too large to be decomposed; the real part of the leading wave may be zero
    w = np.ones((4, 1, 3))
    geometry = Conv((200,), groups=groups)
    expected = float(specops.spectral_norm(w.astype(complex), geometry))
    assert expected == pytest.approx(oracle.spectrum(w, geometry)[0], rel=1e-10)
    assert specops.spectral_norm(turn * w, geometry) == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize("dtype", ["float32", "complex64"])
@pytest.mark.parametrize("columns", [1, 0], ids=["one vector", "nothing"])
def test_a_start_of_dependent_vectors(eager: Backend, dtype: str, columns: int) -> None:
    # Some libraries' factors of such a start are NaN.
    w = eager.array(np.diag(np.arange(11.0, 0.0, -1.0)), dtype)
    start = np.repeat(np.random.default_rng(0).standard_normal((11, 1)), 9, axis=1) * columns
    _, s, _ = specops.top_singular_triplets(w, 7, start=eager.array(start, "float32"))
    np.testing.assert_allclose(eager.numpy(s), np.arange(11.0, 4.0, -1.0), rtol=1e-5)


def test_a_start_is_checked_cast_and_not_believed() -> None:
    a = np.diag([3.0, 2.0, 1.0, 0.5])
    for k, start in [(1, np.eye(4)[:, 1:2]), (2, np.eye(4)[:, 1:4])]:
        _, s, _ = specops.top_singular_triplets(a.astype(np.float32), k, start=start)
        assert s.dtype == np.float32
        np.testing.assert_allclose(s, [3.0, 2.0][:k], rtol=1e-5)
    with pytest.raises(ValueError, match=r"p of at least k=3"):
        specops.top_singular_triplets(a, 3, start=np.eye(4)[:, :2])
    with pytest.raises(ValueError, match="single matrix"):
        specops.spectral_norm_bounds(np.ones((2, 2, 3)), Conv((4,)), start=np.ones((8, 1)))
    for measure in (
        lambda start: specops.spectral_norm_bounds(a, start=start),
        lambda start: specops.top_singular_triplets(a, 1, start=start),
    ):
        for shape in ((5, 1), (4,), (4, 0)):
            with pytest.raises(ValueError, match=r"start must have shape \(4, p\)"):
                measure(np.ones(shape))
        with pytest.raises(ValueError, match="start is complex"):
            measure(np.ones((4, 1)) * 1j)
        with pytest.raises(errors.NonFiniteError, match="start holds NaN"):
            measure(np.full((4, 1), np.nan))


@pytest.mark.parametrize("most", [-1, 2.5, "many", True])
def test_the_most_evaluations_are_a_count(most: object) -> None:
    kernel = np.ones((1, 1, 3))
    with pytest.raises(ValueError, match="max_evaluations must be"):
        specops.spectral_norm_bounds(kernel, Conv(None), rtol=1e-3, max_evaluations=most)  # type: ignore[arg-type]
    assert specops.spectral_norm_bounds(kernel, Conv(None), rtol=0.9, max_evaluations=0).upper >= 3


def test_half_precision_operators_take_half_vectors() -> None:
    torch = pytest.importorskip("torch")
    w = torch.randn(2, 2, 3).half()
    y = specops.linear_operator(w, Conv((6,))).matvec(torch.ones(12).half())
    assert y.dtype == torch.float32


@pytest.mark.parametrize("n", [32, 200])
@pytest.mark.parametrize("gap", [1e-3, 1e-4])
def test_close_values_in_channels_that_do_not_mix(n: int, gap: float) -> None:
    w = np.zeros((2, 2, 2 * n + 1))
    w[0, 0, n] = w[0, 0, 0] = 1.0
    w[1, 1, n], w[1, 1, n + 1] = 0.5, 0.501
    geometry = Conv((n,), padding=((n, n),))
    alone = oracle.spectrum(w[1:, 1:], geometry)[0]
    w[1, 1] *= (1 + gap) / alone
    got = float(specops.spectral_norm(w.astype(np.float32), geometry))
    assert got == pytest.approx(1 + gap, rel=1e-5)


def test_small_transposed_operators_to_double_precision() -> None:
    geometry = Conv((6, 3), stride=3, dilation=2, transposed=True, padding=(2, 0))
    for seed in range(17):
        w = np.random.default_rng(seed).standard_normal((1, 1, 5, 4))
        truth = oracle.spectrum(w, geometry)[0]
        assert float(specops.spectral_norm(w, geometry)) == pytest.approx(truth, rel=1e-12)
