"""Gram matrices, factorisations and scans in place: the numbers of the plain operations."""

from __future__ import annotations

import math
import tracemalloc
from fractions import Fraction
from typing import Any

import array_api_compat as compat
import numpy as np
import pytest

import specops
from specops import Conv, Dense, arrays, project_spectral_ball
from specops.arrays.gram import below, gram
from specops.arrays.solvers import has_cholesky
from specops.linalg.inside import inside
from tests import oracle

torch = pytest.importorskip("torch")

SHAPES = [(520, 530), (700, 515), (513, 1300), (40, 30)]


def matrix(shape: tuple[int, ...], dtype: str) -> Any:
    rng = np.random.default_rng(0)
    values = rng.standard_normal(shape)
    if "complex" in dtype:
        values = values + 1j * rng.standard_normal(shape)
    return torch.asarray(values.astype(dtype))


@pytest.mark.parametrize("dtype", ["float32", "float64", "complex64", "complex128"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_lower_triangles_are_those_of_the_gram_matrix(shape: tuple[int, int], dtype: str) -> None:
    a = matrix(shape, dtype)
    xp = compat.array_namespace(a)
    values = a.numpy().astype(np.result_type(dtype, np.float64))
    adjoint = values.conj().T
    exact = values @ adjoint if shape[0] <= shape[1] else adjoint @ values
    tolerance = 20 * np.finfo(dtype).eps * shape[0] * shape[1] ** 0.5
    assert np.abs(np.tril(gram(xp, a).numpy() - exact)).max() < tolerance
    limit = torch.asarray(3.0, dtype=arrays.real_dtype(xp, a.dtype))
    for double in {a.dtype, arrays.double_dtype(xp, a)}:
        shifted = below(xp, a, limit, double)
        assert shifted.dtype == double
        expected = 9.0 * np.eye(len(exact)) - exact
        close = 20 * torch.finfo(double).eps * shape[0] * shape[1] ** 0.5
        assert np.abs(np.tril(shifted.numpy()) - np.tril(expected)).max() < close


@pytest.mark.parametrize("dtype", ["float32", "float64", "complex128"])
@pytest.mark.parametrize("size", [30, 256, 299, 640])
@pytest.mark.parametrize("at", [0.0, 0.4, 1.0], ids=["first", "middle", "last"])
def test_only_positive_definite_matrices_have_a_factor(dtype: str, size: int, at: float) -> None:
    a = matrix((size, size), dtype)
    xp = compat.array_namespace(a)
    positive = a @ arrays.adjoint(xp, a) / size + torch.eye(size, dtype=a.dtype)
    factor = torch.linalg.cholesky(positive)
    row = round(at * (size - 1))
    # Up to its row the matrix is L D Lᴴ with ones but for one number in D.
    for number, expected in ((1e-3, True), (-1e-3, False)):
        d = torch.ones(size, dtype=a.dtype)
        d[row] = number
        middle = (factor * d) @ arrays.adjoint(xp, factor)
        above = torch.full_like(middle, math.nan).triu(1)
        poisoned = torch.where(torch.isnan(above.real), above, middle)
        assert bool(has_cholesky(xp, poisoned)) is expected


@pytest.mark.parametrize("shape", [(520, 600), (600, 520)], ids=str)
@pytest.mark.parametrize("dtype", ["float32", "complex64"])
def test_inside_is_sharp_to_double_precision(shape: tuple[int, int], dtype: str) -> None:
    a = matrix(shape, dtype)
    xp = compat.array_namespace(a)
    largest = float(torch.linalg.matrix_norm(a.to(arrays.double_dtype(xp, a)), 2))
    for factor, expected in ((1 + 1e-10, True), (1 - 1e-10, False)):
        limit = torch.asarray(largest * factor, dtype=torch.float64)
        for sharp in (True, False):
            assert bool(inside(xp, a, limit, sharp=sharp)) is expected
    kept = a.clone()
    inside(xp, a, torch.asarray(largest, dtype=torch.float64))
    assert torch.equal(a, kept)


@pytest.mark.parametrize("bad", [None, math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("axis", [None, (-2, -1), -1])
def test_scans_of_torch_tensors_are_those_of_numpy(bad: float | None, axis: Any) -> None:
    values = np.random.default_rng(0).standard_normal((3, 4, 5)).astype(np.float32)
    if bad is not None:
        values[1, 2, 3] = bad
    tensor = torch.asarray(values)
    xp = compat.array_namespace(tensor)
    host = compat.array_namespace(values)
    for keepdims in (False, True):
        ours = arrays.largest_entry(xp, tensor, axis, keepdims=keepdims).numpy()
        theirs = np.max(np.abs(values), axis=axis, keepdims=keepdims)
        np.testing.assert_array_equal(ours, theirs)
    ours = arrays.all_finite(xp, tensor, axis).numpy()
    np.testing.assert_array_equal(ours, arrays.all_finite(host, values, axis))
    assert bool(arrays.all_finite(xp, tensor[:0]))
    half = tensor.to(torch.bfloat16)
    assert bool(arrays.all_finite(xp, half)) is (bad is None)


@pytest.mark.slow
@pytest.mark.parametrize("library", [np, torch], ids=["numpy", "torch"])
@pytest.mark.parametrize("shape", [(1, 4_000_000), (2_000_000, 3), (30_000, 3)], ids=str)
def test_long_rows_are_summed_without_drift(library: Any, shape: tuple[int, int]) -> None:
    for entry in (1.1, 1.45, 1.9):
        w = library.full(shape, entry, dtype=library.float32)
        norm = float(np.float32(entry)) * math.prod(shape) ** 0.5
        projected = project_spectral_ball(w, norm * (1 - 1e-6))
        assert projected is not w
        stored = np.asarray(projected, np.float64)
        assert 1 - 5e-5 < np.linalg.norm(stored) / norm < 1 - 1e-6


def test_matrices_are_certified_in_few_copies() -> None:
    a = np.random.default_rng(7).standard_normal((20_000, 16)).astype(np.float32)
    limit = np.asarray(float(np.linalg.norm(a, 2)) * (1 + 1e-9), np.float32)
    inside(np, a, limit, sharp=True)
    tracemalloc.start()
    try:
        inside(np, a, limit, sharp=True)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    # One in double precision.
    assert peak < 2.2 * a.nbytes


def test_limits_out_of_sight_raise_no_warning() -> None:
    stack = np.zeros((2, 150, 150), np.float32)
    stack[0] = 1e19 * np.eye(150, dtype=np.float32)
    stack[0, 0, 0] = 3e20
    projected = project_spectral_ball(stack, 1e20, Dense(out_axes=(1,), batch_axes=(0,)))
    assert np.array_equal(projected[1], stack[1])
    np.testing.assert_allclose(np.diag(projected[0]), [1e20] + [1e19] * 149, rtol=1e-5)


def test_the_default_device_does_not_matter() -> None:
    w = torch.asarray(np.random.default_rng(0).standard_normal((300, 300)))
    expected = project_spectral_ball(w, 9.0)
    with torch.device("meta"):
        torch.testing.assert_close(project_spectral_ball(w, 9.0), expected)


def test_autocast_changes_no_number() -> None:
    rng = np.random.default_rng(0)
    w = torch.asarray(rng.standard_normal((64, 70)).astype(np.float32))
    kernel = torch.asarray(rng.standard_normal((5, 4, 3, 3)).astype(np.float32))
    conv = Conv((6, 6), boundary="circular")
    calls = [
        lambda: project_spectral_ball(w, 9.0),
        lambda: project_spectral_ball(kernel, 4.0, conv),
        lambda: specops.clip_singular_values(w, 1.0, 9.0),
        lambda: specops.project_stable_rank(w, ratio=0.5),
        lambda: specops.project_schatten_ball(w, 50.0, p=1),
        lambda: specops.polar_factor(w),
        lambda: specops.singular_values(w),
        lambda: specops.spectral_norm(kernel, conv),
        lambda: specops.spectral_norm_bounds(kernel, Conv((6, 6))).upper,
        lambda: specops.stable_rank(w),
        lambda: specops.effective_rank(w),
        lambda: specops.condition_number(w),
        lambda: specops.top_singular_triplets(w, 2)[1],
    ]
    for call in calls:
        expected = call()
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(call(), expected)


def test_taps_that_wrap_onto_each_other_are_summed_exactly() -> None:
    conv = Conv((3, 3), boundary="circular")
    for seed in range(6):
        kernel = np.random.default_rng(seed).standard_normal((5, 5, 5, 5)).astype(np.float32)
        norm = float(specops.spectral_norm(kernel.astype(np.float64), conv))
        for limit in (norm * (1 - 1e-8), norm * 0.8):
            projected = project_spectral_ball(kernel, limit, conv)
            assert projected is not kernel
            found = float(specops.spectral_norm(projected.astype(np.float64), conv))
            assert found <= limit * (1 + 1e-12)
        assert project_spectral_ball(kernel, norm * (1 + 1e-8), conv) is kernel


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_bounds_hold_where_taps_that_wrap_onto_each_other_cancel(dtype: Any) -> None:
    for seed in range(20):
        kernel = np.random.default_rng(seed).standard_normal((2, 2, 7)).astype(dtype)
        kernel[..., -1] = -kernel[..., :-1].sum(axis=-1)  # But for its rounding.
        taps = kernel.reshape(4, 7).tolist()
        sums = [float(sum(map(Fraction, row))) for row in taps]
        exact = np.linalg.norm(np.reshape(sums, (2, 2)), 2)
        bounds = specops.spectral_norm_bounds(kernel, Conv((1,), boundary="circular"))
        assert bounds.lower <= exact <= bounds.upper


@pytest.mark.parametrize("times", [1e-3, 1e-6, 1e-25])
def test_taps_that_wrap_stay_certified_far_below_the_weight(times: float) -> None:
    conv = Conv((3, 1), dilation=(1, 2), groups=3, boundary="circular")
    for seed in range(10):
        kernel = np.random.default_rng(seed).standard_normal((3, 2, 2, 3)).astype(np.float32)
        limit = times * float(specops.spectral_norm(kernel, conv))
        projected, info = project_spectral_ball(kernel, limit, conv, return_info=True)
        double = projected.astype(np.float64)
        norm = oracle.spectrum(double, conv)[0]
        assert norm <= limit * (1 + 1e-9)
        np.testing.assert_allclose(info.norm_after, norm, rtol=1e-4)
        # Of what is not seen all would stay in exact arithmetic.
        nearest = project_spectral_ball(kernel.astype(np.float64), limit, conv)
        moved = np.linalg.norm(double - nearest) / np.linalg.norm(kernel)
        assert moved <= float(info.gap) ** 0.5 + 1e-3


def test_kernels_whose_taps_cancel_raise_no_warning() -> None:
    g = np.random.default_rng(0).standard_normal((256, 256)).astype(np.float32) / 32
    kernel = np.zeros((256, 256, 2, 2), np.float32)
    conv = Conv((4, 4), boundary="circular")
    assert project_spectral_ball(kernel, 1.0, conv) is kernel
    kernel[:, :, 0, 0], kernel[:, :, 0, 1] = g, -g
    norm = 2.0 * float(np.linalg.norm(g.astype(np.float64), 2))
    assert project_spectral_ball(kernel, 1.001 * norm, conv) is kernel
    assert project_spectral_ball(kernel, 0.999 * norm, conv) is not kernel
    zeros = np.zeros((256, 256), np.float32)
    assert project_spectral_ball(zeros, 1.0) is zeros


@pytest.mark.parametrize("turn", [(0.0, 0.0), (0.5, 0.0), (0.0, 0.5), (0.3, 0.8), (0.9, 0.6)])
def test_the_supremum_is_found_at_every_frequency(turn: tuple[float, float]) -> None:
    waves = [np.exp(2j * np.pi * t * np.arange(k)) for t, k in zip(turn, (3, 4), strict=True)]
    kernel = waves[0][:, None] * waves[1]
    kernel = (kernel.real if max(turn) == 0.5 else kernel)[None, None]
    # At one frequency all taps of a phase add up: 3 taps at stride 2 are 2 and 1, 4 are 2 and 2.
    for stride, norm in [(1, 12.0), ((2, 1), 4.0 * 5**0.5), ((1, 2), 3.0 * 8**0.5)]:
        for rtol in (None, 1e-3):
            bounds = specops.spectral_norm_bounds(kernel, Conv(None, stride=stride), rtol=rtol)
            assert bounds.lower * (1 - 1e-12) <= norm <= bounds.upper * (1 + 1e-12)
            assert bounds.upper <= norm * (1 + (rtol or 0.1)) * (1 + 1e-9)
