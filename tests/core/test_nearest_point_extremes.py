"""Nearest points of extreme matrices and kernels, at every scale."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import specops
from specops import Conv, Dense
from tests.backends import Backend
from tests.core.nearest import (
    LAYERS,
    ROUNDING,
    SINGLE,
    certificate,
    clipped,
    norm,
    normal,
    orthogonal,
    slowly,
    squared,
)


def _delta(outputs: int, inputs: int, *kernel: int) -> np.ndarray:
    """The kernel of the identity."""
    w = np.zeros((outputs, inputs, *kernel))
    for channel in range(min(outputs, inputs)):
        w[(channel, channel, *(k // 2 for k in kernel))] = 1.0
    return w


STIFF = (orthogonal(8) * np.logspace(0, -12, 8)) @ orthogonal(8, 23)

MATRICES: dict[str, np.ndarray] = {
    "repeated": 2 * np.eye(6),
    "orthogonal": 3 * orthogonal(6),
    "rank one": np.outer(normal((6,), 24), normal((6,), 25)),
    "zero": np.zeros((6, 6)),
    "row": normal((1, 6), 26),
    "column": normal((6, 1), 27),
    "single": np.array([[-3.0]]),
    "stiff": STIFF,
}

KERNELS: dict[str, tuple[np.ndarray, Conv]] = {
    "delta": (2 * _delta(3, 3, 3), Conv((5,), boundary="circular")),
    "wide delta": (2 * _delta(2, 3, 3), Conv((5,))),
    "orthogonal": (orthogonal(3)[..., None] * _delta(1, 1, 3), Conv((4,))),
    "rank one": (np.einsum("o,i,a->oia", *(normal((n,), n) for n in (3, 2, 3))), Conv((6,))),
    "one output": (normal((1, 4, 3), 28), Conv((6,), boundary="circular")),
    "one input": (normal((4, 1, 3), 29), Conv((5,))),
    "single": (np.full((1, 1, 1), -3.0), Conv((1,))),
    "one tap": (normal((2, 2, 1, 1), 30), Conv((3, 2))),
    "stiff": (STIFF.reshape(8, 4, 2), Conv((4,), stride=2, boundary="circular")),
    "one of three": (normal((2, 2, 3), 31) * [1, 0, 0], Conv((4,))),
    "folded": (normal((2, 2, 5), 32), Conv((2,), boundary="circular")),
}

SCALES = {"float32": (1.0, 1e-18, 1e18), "float64": (1.0, 1e-20, 1e20, 1e-150, 1e150)}


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_extreme_matrices(eager: Backend, dtype: str) -> None:
    dtype = dtype if eager.doubles else "float32"
    for name in MATRICES:
        # One shape where each is compiled anew.
        if eager.name != "jax" or MATRICES[name].shape == (6, 6):
            check_extreme_matrix(eager, name, dtype)


def check_extreme_matrix(eager: Backend, name: str, dtype: str) -> None:
    """The clipped SVD at every scale and bound."""
    for scale in SCALES[dtype]:
        w = eager.array(MATRICES[name] * scale, dtype)
        exact = eager.numpy(w).astype(np.float64) / scale
        top = float(np.linalg.norm(exact, 2)) or 1.0
        for share in (1e-10, 1e-3, 0.4, 0.999, 1.0 + 1e-5, 1e10):
            got, info = specops.project_spectral_ball(
                w, share * top * scale, Dense(), return_info=True
            )
            result = eager.numpy(got).astype(np.float64) / scale
            eps = np.finfo(dtype).eps
            assert np.linalg.norm(result, 2) <= share * top * (1 + 2 * eps)
            np.testing.assert_allclose(result, clipped(exact, share * top), atol=40 * eps * top)
            error = squared(result - clipped(exact, share * top))
            gap = float(eager.numpy(info.gap))
            assert error <= (gap + 100 * eps**2) * squared(exact)
            assert gap <= 100 * eps
            if share > 1:
                assert got is w


@pytest.mark.slow
def test_extreme_kernels(eager: Backend) -> None:
    # Kernels are projected on the host: the other libraries add conversions and dtypes.
    for name in KERNELS if eager.name == "numpy" else ("delta", "one of three"):
        for dtype in ("float32", "float64") if eager.doubles else ("float32",):
            check_extreme_kernel(eager, name, dtype)


def check_extreme_kernel(eager: Backend, name: str, dtype: str) -> None:
    """Feasible at every scale and bound, and as near as the slow solver's point."""
    kernel, geometry = KERNELS[name]
    eps = float(np.finfo(dtype).eps)
    rounding = SINGLE if dtype == "float32" else ROUNDING
    for scale in SCALES[dtype][:3]:
        w = eager.array(kernel * scale, dtype)
        exact = eager.numpy(w).astype(np.float64) / scale
        top = norm(exact, geometry)
        for share in (1e-6, 1e-2, 0.4, 1.0 - 1e-3, 1.0 + 1e-5):
            got, info = specops.project_spectral_ball(
                w, share * top * scale, geometry, gap_tolerance=1e-9, return_info=True
            )
            result = eager.numpy(got).astype(np.float64) / scale
            # What wraps to nothing stays, and its rounding with it.
            silent = eps * np.sqrt(squared(exact)) if name == "folded" else 0.0
            assert norm(result, geometry) <= share * top * (1 + 4 * eps) + silent
            gap = float(eager.numpy(info.gap))
            if share > 1:
                assert got is w
                continue
            if share < 1e-2:
                assert norm(result, geometry) >= 0.5 * share * top
                continue
            truth, error = _slow_extreme(name, dtype, share, exact)
            error = np.sqrt(error) + np.sqrt((gap + rounding) * squared(exact))
            assert np.sqrt(squared(result - truth)) <= error
            assert gap <= max(1.1e-9, rounding)


_TRUTHS: dict[Any, tuple[np.ndarray, float]] = {}


def _slow_extreme(
    name: str, dtype: str, share: float, exact: np.ndarray
) -> tuple[np.ndarray, float]:
    key = (name, dtype, share)
    if key not in _TRUTHS:
        geometry = KERNELS[name][1]
        _TRUTHS[key] = slowly(exact, geometry, share * norm(exact, geometry))
    return _TRUTHS[key]


def test_zero_kernels_stay(eager: Backend) -> None:
    for shape, geometry in LAYERS[:3]:
        zero = eager.array(np.zeros(shape), "float32")
        got, info = specops.project_spectral_ball(zero, 1e-30, geometry, return_info=True)
        assert got is zero
        assert (info.iterations, float(eager.numpy(info.gap))) == (0, 0.0)
        assert float(eager.numpy(info.norm_before)) == 0


@pytest.mark.parametrize("seed", range(3))
def test_delta_kernels_shrink_to_their_bound(seed: int) -> None:
    # Every block is the same orthogonal matrix: the nearest kernel is a multiple of it.
    w = orthogonal(3, seed)[:, :, None, None] * _delta(1, 1, 3, 3)
    for geometry in (Conv((5, 4), boundary="circular"), Conv((4, 4)), Conv(None)):
        got = specops.project_spectral_ball(w, 0.5, geometry, gap_tolerance=1e-12)
        factor = certificate(geometry, w.shape)
        np.testing.assert_allclose(got, 0.5 * factor * w, atol=1e-6)


@pytest.mark.parametrize("measure", [True, False])
@pytest.mark.parametrize(("entry", "bound"), [(1e-25, 1.0), (0.0, 1e30), (1.0, 1e20)])
def test_a_bound_out_of_reach_is_no_overflow(entry: float, bound: float, measure: bool) -> None:
    w = np.full((4, 4, 3, 3), entry, np.float32)
    for geometry in (Conv((8, 8), boundary="circular"), Conv((9, 9))):
        options = {"return_info": True, "measure_norms": measure}
        same, info = specops.project_spectral_ball(w, bound, geometry, **options)
        assert same is w
        expected = float(specops.spectral_norm(w, geometry))
        if measure and info.constrained == "layer":
            assert float(info.norm_after) == pytest.approx(expected, rel=1e-6, abs=0.0)
