"""Every figure against brute force."""

from __future__ import annotations

import math
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from specops import Conv, Dense
from specops.inspection import Hints, figures, inspect_checkpoint
from specops.inspection.figures import exact_values, figures_of
from specops.inspection.spectrum import COLLAPSED_BELOW, Figures
from tests import oracle
from tests.inspection.files import model, written


def expected(values: np.ndarray) -> dict[str, float]:
    p = values / values.sum()
    return {
        "sigma_max": values.max(),
        "sigma_min": values.min(),
        "frobenius": math.sqrt(np.sum(values**2)),
        "stable_rank": np.sum(values**2) / values.max() ** 2,
        "effective_rank": math.exp(-np.sum(p * np.log(p))),
        "condition_number": values.max() / values.min(),
        "collapsed": np.mean(values < COLLAPSED_BELOW * values.max()),
    }


def check(found: Figures, values: np.ndarray, *but: str) -> None:
    for key, value in expected(values).items():
        if key not in but:
            assert getattr(found, key) == pytest.approx(value, rel=1e-9), key


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 40),
    st.integers(1, 40),
    st.sampled_from([1e-30, 1.0, 1e30]),
    st.sampled_from([np.float64, np.complex128]),
)
def test_values_of_any_shape_and_size(rows: int, columns: int, scale: float, dtype: Any) -> None:
    rng = np.random.default_rng(rows * 41 + columns)
    a = (rng.normal(size=(rows, columns)) * scale).astype(dtype)
    if dtype is np.complex128:
        a = a + 1j * rng.normal(size=a.shape) * scale
    values = np.linalg.svd(a, compute_uv=False)
    np.testing.assert_allclose(exact_values(a), values, rtol=1e-10, atol=1e-13 * values[0])


def test_slices_of_a_tall_matrix_make_the_same_values(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("specops.inspection.figures._CHUNK", 40)
    a = np.random.default_rng(0).normal(size=(103, 5)).astype(np.float32)
    for matrix in (a, a.T):
        np.testing.assert_allclose(
            exact_values(matrix), np.linalg.svd(a.astype(float), compute_uv=False), rtol=1e-12
        )


def test_a_matrix_and_a_stack() -> None:
    rng = np.random.default_rng(0)
    a = rng.normal(size=(3, 6, 4))
    values = np.linalg.svd(a, compute_uv=False)
    check(figures_of(a[0], Dense()), values[0])
    stack = figures_of(a, Dense((1,), (2,), (0,)))
    each = [expected(v) for v in values]
    for key, over in [
        ("sigma_max", max),
        ("sigma_min", min),
        ("stable_rank", min),
        ("effective_rank", min),
        ("condition_number", max),
    ]:
        assert getattr(stack, key) == pytest.approx(over(e[key] for e in each))
    assert stack.frobenius == pytest.approx(np.linalg.norm(a))
    assert "3 matrices" in stack.method


def test_complex_kernels_keep_their_imaginary_part() -> None:
    w = np.random.default_rng(0).normal(size=(4, 3, 3, 3)) * 1j
    low, high = figures_of(w, Conv(None)).sigma_max  # type: ignore[misc]
    real = figures_of(w.imag, Conv(None)).sigma_max
    assert (low, high) == pytest.approx(real, rel=1e-5)


@pytest.mark.parametrize("scale", [1e-30, 1e30, 1e37])
@pytest.mark.parametrize("channels", [3, 130])
def test_scales_of_kernels_do_not_matter(scale: float, channels: int) -> None:
    w = np.random.default_rng(0).normal(size=(channels, channels, 1, 2)).astype(np.float32)
    one = figures_of(w, Conv(None))
    two = figures_of((w * np.float32(scale)).astype(np.float32), Conv(None))
    np.testing.assert_allclose(np.array(two.sigma_max) / scale, one.sigma_max, rtol=1e-5)


def test_many_taps_take_little_memory(tmp_path: Path) -> None:
    w = np.random.default_rng(0).normal(size=(2, 1, 31, 31)).astype(np.float32)
    tracemalloc.start()
    figures_of(w, Conv(None, groups=2))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 150e6


def test_figures_beyond_a_float_are_a_problem_of_that_tensor(tmp_path: Path) -> None:
    tensors = {
        "huge": np.full((4, 4), 1.7e308),
        "experts": np.full((3, 4, 4), 1e200),
        "fine": np.eye(3),
    }
    found = inspect_checkpoint(written(tmp_path / "m.safetensors", tensors))
    by_name = {w.name: w for w in found.weights}
    assert "beyond double precision" in by_name["huge"].skipped
    assert by_name["fine"].figures is not None
    assert by_name["experts"].figures is not None
    assert by_name["experts"].figures.frobenius == pytest.approx(1e200 * math.sqrt(48))
    assert len(found.problems) == 1


def test_vectors_that_are_not_finite_are_a_problem(tmp_path: Path) -> None:
    tensors = {"bn.weight": np.array([1.0, np.nan], np.float32), "w": np.eye(2)}
    found = inspect_checkpoint(written(tmp_path / "m.safetensors", tensors))
    assert found.problems == ["'bn.weight': holds NaN or infinity in 1 of 2 entries"]


def test_problems_of_one_kind_are_one_line(tmp_path: Path) -> None:
    tensors = {f"w{i}": np.full((2, 2), np.nan) for i in range(9)}
    (line,) = inspect_checkpoint(written(tmp_path / "m.safetensors", tensors)).problems
    assert line.startswith("'w0', 'w1', 'w2' and 6 more: holds NaN")


def test_special_matrices() -> None:
    zero = figures_of(np.zeros((3, 4)), Dense())
    assert (zero.sigma_max, zero.stable_rank, zero.effective_rank) == (0.0, 0.0, 0.0)
    assert zero.condition_number == math.inf
    singular = figures_of(np.diag([2.0, 1.0, 0.0]), Dense())
    assert singular.condition_number == math.inf
    noisy = np.outer(np.arange(1.0, 6.0), np.arange(1.0, 5.0) / 3)
    assert figures_of(noisy, Dense()).condition_number == math.inf
    assert figures_of(noisy, Dense()).sigma_min == 0.0
    assert singular.collapsed == pytest.approx(1 / 3)
    assert singular.effective_rank == pytest.approx(
        math.exp(-(2 / 3 * math.log(2 / 3) + 1 / 3 * math.log(1 / 3)))
    )


@pytest.mark.parametrize("shape", [(60, 50), (50, 200), (300, 40)])
@pytest.mark.parametrize("scale", [1.0, 1e-25, 1e-14, 1e-12, 1e10, 1e13])
def test_bounds_enclose_and_are_narrow(shape: tuple[int, int], scale: float) -> None:
    a = (np.random.default_rng(1).normal(size=shape) * scale).astype(np.float32)
    top = np.linalg.svd(a.astype(float), compute_uv=False)[0]
    found = figures_of(a, Dense(), "bounds")
    low, high = found.sigma_max  # type: ignore[misc]
    assert low <= top <= high <= low * 1.001
    assert found.frobenius == pytest.approx(np.linalg.norm(a.astype(float)), rel=1e-6)
    assert found.stable_rank == pytest.approx((found.frobenius / top) ** 2, rel=1e-3)
    assert found.sigma_min is None
    assert "bounds" in found.method
    zero = figures_of(np.zeros((3, 4), np.float32), Dense(), "bounds")
    assert zero.sigma_max == 0.0
    ones = figures_of(np.ones((3, 4), np.float32), Dense(), "bounds")
    assert ones.sigma_max == pytest.approx((math.sqrt(12),) * 2, rel=1e-4)


def test_large_matrices_get_bounds_by_themselves(monkeypatch: pytest.MonkeyPatch) -> None:
    a = np.random.default_rng(0).normal(size=(30, 20)).astype(np.float32)
    assert isinstance(figures_of(a, Dense()).sigma_max, float)
    monkeypatch.setattr("specops.inspection.figures._EXACT_UP_TO", 19)
    assert isinstance(figures_of(a, Dense()).sigma_max, tuple)
    assert isinstance(figures_of(a, Dense(), "exact").sigma_max, float)


CONVS = {
    "circular": Conv((5, 6), boundary="circular"),
    "zeros": Conv((5, 6)),
    "strided": Conv((5, 6), stride=2, padding=1),
}


@pytest.mark.parametrize("key", CONVS)
def test_convolutions_at_a_size_are_their_matrices(key: str) -> None:
    w = np.random.default_rng(0).normal(size=(4, 3, 3, 3)).astype(np.float32)
    values = oracle.spectrum(w.astype(float), CONVS[key])
    # A full set, zeros of the larger side left out.
    matrix = oracle.conv_matrix(w.astype(float), CONVS[key])
    values = np.linalg.svd(matrix, compute_uv=False)
    found = figures_of(w, CONVS[key])
    assert found.sigma_max == pytest.approx(values[0], rel=1e-9)
    assert found.sigma_min == pytest.approx(values[-1], rel=1e-6)
    assert found.frobenius == pytest.approx(np.linalg.norm(matrix), rel=1e-9)
    assert found.stable_rank == pytest.approx((np.linalg.norm(matrix) / values[0]) ** 2, rel=1e-9)


def test_large_convolutions_at_a_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(figures._EXPLICIT_UP_TO, "auto", 10)
    w = np.random.default_rng(0).normal(size=(4, 3, 3, 3))
    values = np.linalg.svd(oracle.conv_matrix(w, CONVS["zeros"]), compute_uv=False)
    found = figures_of(w, CONVS["zeros"])
    assert found.sigma_max == pytest.approx(values[0], rel=1e-6)
    assert found.frobenius == pytest.approx(math.sqrt(np.sum(values**2)), rel=1e-9)
    assert found.sigma_min is None
    circular = Conv((5, 6), boundary="circular")
    assert found.beside_of == "circular"
    assert found.beside is not None
    check(found.beside, np.linalg.svd(oracle.conv_matrix(w, circular), compute_uv=False))
    assert "120×90: 8e-05 GiB and about 0.1 minutes, which --method exact does" in found.cost
    low, high = figures_of(w, CONVS["zeros"], "bounds").sigma_max  # type: ignore[misc]
    assert low <= values[0] * (1 + 1e-9) <= high * (1 + 2e-9)


def test_convolutions_at_no_size_are_bracketed_over_all() -> None:
    w = np.random.default_rng(0).normal(size=(4, 3, 3, 3)).astype(np.float32)
    found = figures_of(w, Conv(None))
    low, high = found.sigma_max  # type: ignore[misc]
    assert low <= high <= low * 1.001
    for n in (3, 8, 15):
        circular = oracle.spectrum(w.astype(float), Conv((n, n), boundary="circular"))[0]
        assert circular <= high
    assert circular >= low * 0.98
    reshaped = np.linalg.svd(w.reshape(4, -1).astype(float), compute_uv=False)
    assert found.beside_of == "reshaped"
    assert found.beside is not None
    check(found.beside, reshaped)
    assert found.sigma_min is found.condition_number is found.stable_rank is None


@pytest.mark.parametrize("groups", [1, 2])
def test_kernels_of_one_tap_are_exact(groups: int) -> None:
    w = np.random.default_rng(0).normal(size=(6, 4 // groups, 1, 1))
    blocks = [np.linalg.svd(b[:, :, 0, 0], compute_uv=False) for b in np.split(w, groups)]
    values = np.sort(np.concatenate(blocks))[::-1]
    check(figures_of(w, Conv(None, groups=groups)), values)
    for stride in (1, 2):
        geometry = Conv((4, 6), groups=groups, stride=stride)
        sized = figures_of(w, geometry)
        matrix = oracle.conv_matrix(w, geometry)
        expected = np.linalg.svd(matrix, compute_uv=False)
        assert sized.sigma_max == pytest.approx(expected[0])
        np.testing.assert_allclose(sized.spectrum, expected, atol=1e-12)


def test_patches_that_do_not_overlap_are_exact() -> None:
    w = np.random.default_rng(0).normal(size=(5, 3, 2, 2))
    values = np.linalg.svd(w.reshape(5, -1), compute_uv=False)
    check(figures_of(w, Conv(None, stride=2)), values)
    geometry = Conv((4, 4), stride=2, padding="valid")
    expected = np.linalg.svd(oracle.conv_matrix(w, geometry), compute_uv=False)
    np.testing.assert_allclose(figures_of(w, geometry).spectrum, expected, atol=1e-12)


def test_blocks_of_a_fused_map_are_matrices_of_their_own() -> None:
    w = np.random.default_rng(0).normal(size=(9, 4))
    found = figures_of(w, Dense(splits=(2, 3, 4)))
    blocks = (w[:2], w[2:5], w[5:])
    np.testing.assert_allclose(found.each, [np.linalg.norm(b, 2) for b in blocks])
    assert found.sigma_max == pytest.approx(max(found.each))


def test_a_whole_file(tmp_path: Path) -> None:
    tensors = model()
    path = written(tmp_path / "m.safetensors", tensors, format="pt")
    seen: list[tuple[int, int, str]] = []
    found = inspect_checkpoint(path, progress=lambda *x: seen.append(x))
    assert [w.name for w in found.weights] == list(tensors)
    by_name = {w.name: w for w in found.weights}
    assert "1-d" in by_name["conv1.bias"].skipped
    assert "scalar" in by_name["bn1.num_batches_tracked"].skipped
    assert not found.problems
    for name in ("fc.weight", "half.weight"):
        values = np.linalg.svd(tensors[name].astype(float), compute_uv=False)
        figures = by_name[name].figures
        assert figures is not None
        check(figures, values)
    dw = by_name["dw.weight"]
    assert "6 groups" in dw.geometry
    assert "depthwise" in dw.why
    assert "stack" in by_name["experts.weight"].why
    assert seen[0] == (0, 10, "conv1.weight")
    assert seen[-1][:2] == (10, 10)
    totals = found.totals()
    assert (totals["tensors"], totals["measured"], totals["skipped"]) == (10, 8, 2)
    assert totals["parameters"] == sum(t.size for t in tensors.values())


def test_hints_are_those_of_the_last_pattern(tmp_path: Path) -> None:
    tensors = model()
    path = written(tmp_path / "m.safetensors", tensors, format="pt")
    hints = Hints(
        input_size={"*": (8, 8), "conv2*": (4, 4)},
        stride={"conv2*": 2},
        groups={"dw*": 6},
    )
    by_name = {w.name: w for w in inspect_checkpoint(path, hints).weights}
    figures = by_name["conv2.weight"].figures
    geometry = Conv((4, 4), stride=2, padding=1)
    matrix = oracle.conv_matrix(tensors["conv2.weight"].astype(float), geometry)
    assert figures is not None
    assert figures.sigma_max == pytest.approx(np.linalg.norm(matrix, 2), rel=1e-9)
    assert by_name["conv1.weight"].geometry.startswith("conv 8×8")
    with pytest.raises(ValueError, match=r"no tensor matches 'nine\*'"):
        inspect_checkpoint(path, Hints(stride={"nine*": 2}))


def test_interruptions_leave_what_was_done(tmp_path: Path) -> None:
    path = written(tmp_path / "m.safetensors", model(), format="pt")

    def stop(done: int, total: int, name: str) -> None:
        if done == 4:
            raise KeyboardInterrupt

    found = inspect_checkpoint(path, progress=stop)
    assert found.interrupted
    assert len(found.weights) == 4
    assert found.total == 10
