"""The pool shares the cores with BLAS, and leaves the user's settings as they were."""

from __future__ import annotations

import itertools
import threading
from functools import lru_cache

import numpy as np
import pytest
import threadpoolctl

import specops
from specops import Conv
from specops.arrays import host, workers
from specops.linalg.rounding import CHOLESKY_MARGIN
from specops.maps.symbol import Symbol
from specops.spectra import torus
from tests import oracle


def blas_threads() -> list[int]:
    return [
        lib["num_threads"] for lib in threadpoolctl.threadpool_info() if lib["user_api"] == "blas"
    ]


@pytest.mark.parametrize("threads", [1, 2])
def test_chunks_run_in_order_with_one_blas_thread_each(threads: int) -> None:
    seen = []

    def work(chunk: slice) -> tuple[int, int]:
        seen.append((threading.get_ident(), max(blas_threads())))
        return chunk.start, chunk.stop

    with threadpoolctl.threadpool_limits(threads, user_api="blas"):
        before = blas_threads()
        parts = workers.map_chunks(work, 100, 2**20)
        assert blas_threads() == before
    assert parts[0][0] == 0
    assert parts[-1][1] == 100
    assert all(a[1] == b[0] for a, b in itertools.pairwise(parts))
    assert {count for _, count in seen} == {1}
    assert len({ident for ident, _ in seen}) <= threads


def test_settings_are_restored_after_an_error() -> None:
    def fail(chunk: slice) -> None:
        raise ZeroDivisionError

    with threadpoolctl.threadpool_limits(2, user_api="blas"):
        before = blas_threads()
        with pytest.raises(ZeroDivisionError):
            workers.map_chunks(fail, 100, 2**20)
        assert blas_threads() == before


@lru_cache(maxsize=1)
def of_kernel(shape: tuple[int, ...], geometry: Conv) -> tuple[np.ndarray, np.ndarray]:
    """A kernel and the singular values of its explicit matrix, which take a second."""
    w = np.random.default_rng(0).standard_normal(shape)
    return w, oracle.spectrum(w, geometry)


@pytest.mark.slow
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize(
    ("shape", "size", "groups"),
    [
        ((20, 20, 3, 3), (4, 6), 1),
        ((6, 40, 3, 3), (4, 6), 1),
        ((110, 100, 1, 3), (2, 6), 1),
        ((12, 6, 7, 7), (4, 6), 2),
    ],
)
def test_values_do_not_depend_on_threads(
    threads: int, dtype: str, shape: tuple[int, ...], size: tuple[int, int], groups: int
) -> None:
    geometry = Conv(size, boundary="circular", groups=groups)
    w, sigma = of_kernel(shape, geometry)
    tolerance = (1e-6 if dtype == "float32" else 1e-12) * sigma[0]
    with threadpoolctl.threadpool_limits(threads, user_api="blas"):
        values = specops.singular_values(w.astype(dtype), geometry)
        norm = specops.spectral_norm(w.astype(dtype), geometry)
    assert values.dtype == dtype
    assert np.abs(values - sigma).max() <= tolerance
    assert abs(norm - sigma[0]) <= tolerance


def test_without_private_lapack(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "_SINGLE", False)
    w = np.random.default_rng(0).standard_normal((5, 4, 3, 3)).astype(np.float32)
    geometry = Conv((5, 4), boundary="circular")
    sigma = oracle.spectrum(w.astype(float), geometry)
    np.testing.assert_allclose(specops.singular_values(w, geometry), sigma, atol=1e-6 * sigma[0])
    assert float(specops.spectral_norm(w, geometry)) == pytest.approx(sigma[0], rel=1e-6)


def test_flat_symbols_solve_every_doubtful_block() -> None:
    q = np.linalg.qr(np.random.default_rng(0).standard_normal((6, 6)))[0]
    w = np.zeros((6, 6, 3), np.float32)
    w[:, :, 1] = q
    assert float(specops.spectral_norm(w, Conv((12,), boundary="circular"))) == pytest.approx(1.0)


def test_a_bad_ranking_costs_time_and_no_accuracy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torus, "_RANKING_STEPS", {True: 0, False: 0})
    for seed, groups in [(0, 1), (1, 2)]:
        w = np.random.default_rng(seed).standard_normal((6, 6 // groups, 3, 3))
        geometry = Conv((6, 8), boundary="circular", groups=groups)
        truth = oracle.spectrum(w, geometry)[0]
        assert float(specops.spectral_norm(w, geometry)) == pytest.approx(truth, rel=1e-12)


def test_cholesky_tells_which_matrices_exceed() -> None:
    grams = np.stack([np.diag([1.0, c]) for c in (3.9, 4.1)]).astype(np.complex64)
    assert host.exceeds(grams, 2.0).tolist() == [False, True]


@pytest.mark.parametrize("private", [True, False])
def test_cholesky_tells_nothing_of_no_matrices(
    monkeypatch: pytest.MonkeyPatch, private: bool
) -> None:
    if not private:
        monkeypatch.setattr(host, "_SINGLE", False)
    told = host.exceeds(np.zeros((0, 3, 3), np.float32), 1.0)
    assert (told.shape, told.dtype) == ((0,), bool)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("expected", [0.2, 0.9, 1.0 - 1e-9, 1.0, 1.0 + 1e-9, 1.2, 5.0])
def test_a_norm_is_the_same_whatever_was_expected(dtype: type, expected: float) -> None:
    w = np.random.default_rng(2).standard_normal((5, 4, 3, 3)).astype(dtype)
    geometry = Conv((12, 10), boundary="circular")
    symbol = Symbol(geometry.sizes(w.shape), (12, 10), True)
    coefficients = symbol.coefficients(np, geometry.kernel(w))
    blocks = torus.host_blocks(coefficients.astype(float), symbol, slice(None))
    norms = np.linalg.norm(blocks, 2, axis=(-2, -1))
    top = float(norms.max())
    margin = CHOLESKY_MARGIN[np.dtype(dtype).name]
    found, near = torus.leading_norm(coefficients, symbol, margin, expected * top)
    assert found == pytest.approx(top, rel=1e-6 if dtype == np.float32 else 1e-13)
    listed = {tuple(index) for index in near.tolist()}

    def reach(share: float) -> set[tuple[int, ...]]:
        return {tuple(index) for index in np.argwhere(norms >= share * top).tolist()}

    # Every block near the norm, and near what was expected if that was below it.
    least, rounding = min(1.0, expected), 1e-12
    assert reach(least * (1 - rounding)) <= listed <= reach(least * (1 - 2 * margin - rounding))
