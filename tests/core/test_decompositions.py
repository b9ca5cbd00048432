"""Decompositions survive a solver that gives up."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import array_api_compat.numpy as xp
import numpy as np
import pytest

import specops
from specops.arrays.solvers import svd, svdvals


class Failing:
    """NumPy, whose SVD fails for the dtypes named."""

    def __init__(self, *dtypes: str) -> None:
        def unless(function: Any) -> Any:
            def solve(a: Any, **options: Any) -> Any:
                if str(a.dtype) in dtypes:
                    raise np.linalg.LinAlgError("SVD did not converge")
                return function(a, **options)

            return solve

        names = {n: getattr(xp.linalg, n) for n in ("eigh", "qr", "diagonal")}
        self.linalg = SimpleNamespace(
            svd=unless(xp.linalg.svd), svdvals=unless(xp.linalg.svdvals), **names
        )

    def __getattr__(self, name: str) -> Any:
        return getattr(xp, name)


@pytest.mark.parametrize("failing", [("float32",), ("float32", "float64")])
@pytest.mark.parametrize("shape", [(5, 3), (3, 5), (4, 4), (2, 6, 3)])
def test_falls_back_to_double_and_then_to_the_gram_matrix(
    failing: tuple[str, ...], shape: tuple[int, ...]
) -> None:
    a = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    a[..., 0, :] = 0.0
    expected = np.linalg.svd(a, compute_uv=False)
    namespace = Failing(*failing)
    s = svdvals(namespace, a)
    assert s.dtype == np.float32
    np.testing.assert_allclose(s, expected, atol=1e-5)
    u, s, vh = svd(namespace, a)
    assert u.dtype == s.dtype == vh.dtype == np.float32
    np.testing.assert_allclose((u * s[..., None, :]) @ vh, a, atol=1e-5)
    np.testing.assert_allclose(
        vh @ vh.swapaxes(-1, -2), np.eye(vh.shape[-2]) + 0 * vh[..., :1, :1], atol=1e-5
    )


def test_other_errors_pass() -> None:
    broken = SimpleNamespace(
        linalg=SimpleNamespace(svdvals=lambda a: 1 / 0, svd=lambda *_, **__: 1 / 0)
    )
    with pytest.raises(ZeroDivisionError):
        svdvals(broken, np.eye(2))
    with pytest.raises(ZeroDivisionError):
        svd(broken, np.eye(2))


SPOILED = {
    "nan": lambda s: s * np.nan,
    "nan for one": lambda s: s * np.array([[1.0], [np.nan]]),
    "negative": lambda s: s * [1.0, 1.0, -1.0],
    "ascending": lambda s: s[..., ::-1],
    "too small": lambda s: s * 0.9,
}
"""What solvers of accelerators have returned without a word, for two matrices of three values."""


@pytest.mark.parametrize("wrong", SPOILED)
@pytest.mark.parametrize("dtypes", [("float32",), ("float32", "float64")])
def test_values_that_cannot_be_the_matrixs_are_a_failure(
    wrong: str, dtypes: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    strict = pytest.importorskip("array_api_strict")
    solve, solve_values = strict.linalg.svd, strict.linalg.svdvals

    def spoiled(s: Any) -> Any:
        if s.dtype not in [getattr(strict, name) for name in dtypes]:
            return s
        return strict.asarray(np.asarray(SPOILED[wrong](np.asarray(s))), dtype=s.dtype, copy=True)

    def spoiled_svd(a: Any, **options: Any) -> Any:
        u, s, vh = solve(a, **options)
        return u, spoiled(s), vh

    monkeypatch.setattr(strict.linalg, "svd", spoiled_svd)
    monkeypatch.setattr(strict.linalg, "svdvals", lambda a: spoiled(solve_values(a)))
    values = np.random.default_rng(0).standard_normal((2, 5, 3)).astype(np.float32)
    # Their squares leave the range of single precision.
    for scale in (1.0, np.float32(2.0**100), np.float32(2.0**-100)):
        w = strict.asarray(values * scale)
        stack = specops.Dense(out_axes=(1,), batch_axes=(0,))
        expected = np.linalg.svd((values * scale).astype(np.float64), compute_uv=False)
        found = np.asarray(specops.singular_values(w, stack))
        np.testing.assert_allclose(found, expected, rtol=1e-5)
        _, leading, _ = specops.top_singular_triplets(w, 1, stack)
        np.testing.assert_allclose(np.asarray(leading), expected[:, :1], rtol=1e-5)
        np.testing.assert_allclose(
            np.asarray(specops.stable_rank(w, stack)),
            np.sum((expected / expected[:, :1]) ** 2, axis=-1),
            rtol=1e-5,
        )


def test_values_that_no_solver_finds_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    strict = pytest.importorskip("array_api_strict")
    solve = strict.linalg.svdvals
    monkeypatch.setattr(strict.linalg, "svdvals", lambda a: solve(a) * 0.5)
    monkeypatch.setattr(strict.linalg, "eigh", lambda a: (a[..., 0], strict.zeros_like(a)))
    with pytest.raises(np.linalg.LinAlgError, match="singular values are not those"):
        specops.singular_values(strict.asarray(np.eye(3)))
