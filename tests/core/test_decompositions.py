"""Decompositions survive a solver that gives up."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import array_api_compat.numpy as xp
import numpy as np
import pytest

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
