"""Solvers that fail without a word unless they are asked to raise, as CuPy's do."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType, SimpleNamespace
from typing import Any

import array_api_compat as compat
import array_api_strict as strict
import numpy as np
import pytest

from specops import arrays
from specops.arrays import libraries
from specops.arrays.cupy import CuPy
from specops.arrays.solvers import eigh, svd, svdvals
from tests.cupy_adapter.libraries import CUPY, needs_device


class Silent:
    """The strict library under CuPy's name, with solvers that fail in single precision."""

    __name__ = "cupy"

    def __init__(self) -> None:
        self.raising = False
        self.calls = 0
        self.linalg = SimpleNamespace(
            **{k: getattr(strict.linalg, k) for k in ("vector_norm", "qr", "diagonal")},
            cholesky=self._cholesky,
            svd=self._failing(strict.linalg.svd),
            svdvals=self._failing(strict.linalg.svdvals),
            eigh=self._failing(strict.linalg.eigh),
        )

    def __getattr__(self, name: str) -> Any:
        return getattr(strict, name)

    @contextmanager
    def errstate(self, *, linalg: str) -> Iterator[None]:
        before, self.raising = self.raising, linalg == "raise"
        try:
            yield
        finally:
            self.raising = before

    def _fail(self) -> None:
        if self.raising:
            raise np.linalg.LinAlgError("devInfo != 0")

    def _failing(self, solver: Any) -> Any:
        def solve(a: Any, **options: Any) -> Any:
            if a.dtype == strict.float32:
                self._fail()
                a = strict.zeros_like(a)
            return solver(a, **options)

        return solve

    def _cholesky(self, a: Any) -> Any:
        self.calls += 1
        try:
            return strict.linalg.cholesky(a)
        except np.linalg.LinAlgError:
            self._fail()
            return a  # what LAPACK leaves where it broke off


@pytest.fixture
def xp(monkeypatch: pytest.MonkeyPatch) -> Silent:
    silent = Silent()
    cupyx: Any = ModuleType("cupyx")
    cupyx.errstate = silent.errstate
    monkeypatch.setitem(sys.modules, "cupyx", cupyx)
    monkeypatch.setitem(libraries._BY_TYPE, type(strict.zeros(1)), libraries.library_of(silent))
    assert type(libraries.library(strict.zeros(1))) is CuPy
    return silent


def stack(rng: np.random.Generator) -> np.ndarray:
    return rng.standard_normal((3, 6, 4)).astype(np.float32)


def test_decompositions_fall_back(xp: Silent, rng: np.random.Generator) -> None:
    a = stack(rng)
    given = strict.asarray(a)
    expected = np.linalg.svd(a, compute_uv=False)
    assert np.allclose(np.asarray(svdvals(xp, given)), expected, atol=1e-6)
    u, s, vh = (np.asarray(x) for x in svd(xp, given))
    assert np.allclose((u * s[:, None, :]) @ vh, a, atol=1e-5)
    assert u.dtype == np.float32
    gram = a.swapaxes(1, 2) @ a
    values, vectors = (np.asarray(x) for x in eigh(xp, strict.asarray(gram)))
    assert np.allclose(values, np.linalg.eigvalsh(gram), atol=1e-4)
    assert values.dtype == vectors.dtype == np.float32
    assert not xp.raising


def test_what_double_precision_cannot_solve_is_an_error(
    xp: Silent, rng: np.random.Generator
) -> None:
    def fail(a: Any, **options: Any) -> Any:
        raise np.linalg.LinAlgError

    xp.linalg.eigh = fail
    with pytest.raises(np.linalg.LinAlgError):
        eigh(xp, strict.asarray(np.eye(2)))
    assert not xp.raising


@pytest.mark.parametrize("bad", [(), (0,), (2, 5), (0, 1, 2, 3, 4, 5, 6)])
def test_a_missing_factor_is_noticed(xp: Silent, bad: tuple[int, ...]) -> None:
    a = np.broadcast_to(np.eye(3), (7, 3, 3)).copy()
    a[list(bad), 2, 2] = -1.0
    factor, exists = arrays.try_cholesky(xp, strict.asarray(a))
    assert [i for i, there in enumerate(np.asarray(exists)) if not there] == list(bad)
    good = np.asarray(exists)
    assert np.array_equal(np.asarray(factor)[good], a[good])
    assert xp.calls <= 1 + 2 * len(bad) * 4
    shaped = strict.asarray(a.reshape(7, 1, 3, 3))
    assert np.array_equal(np.asarray(arrays.try_cholesky(xp, shaped)[1])[:, 0], good)


def test_products_are_not_shortened(xp: Silent, cupy: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    types = {np.dtype(np.float32): "tf32"}
    cupy._core = SimpleNamespace(
        _routines_linalg=SimpleNamespace(
            COMPUTE_TYPE_FP32="fp32",
            get_compute_type=types.__getitem__,
            set_compute_type=types.__setitem__,
        )
    )
    with arrays.ieee_products(xp):
        assert types == {np.dtype(np.float32): "fp32"}
    assert types == {np.dtype(np.float32): "tf32"}


@needs_device
def test_on_a_device(rng: np.random.Generator) -> None:
    import cupyx

    xp = compat.array_namespace(CUPY.zeros(1))
    a = np.broadcast_to(np.eye(40, dtype=np.float32), (9, 40, 40)).copy()
    a[[3, 7], 5, 5] = -1.0
    for shape in ((9, 40, 40), (3, 3, 40, 40)):
        exists = arrays.try_cholesky(xp, CUPY.asarray(a.reshape(shape)))[1]
        assert np.flatnonzero(~exists.get().ravel()).tolist() == [3, 7]
    assert not bool(arrays.try_cholesky(xp, CUPY.asarray(a[3]))[1])
    values = eigh(xp, CUPY.asarray(a))[0]
    assert np.allclose(values.get(), np.linalg.eigvalsh(a), atol=1e-5)
    for shape in ((9, 6, 4), (5, 70, 50), (70, 50)):
        w = rng.standard_normal(shape).astype(np.float32)
        u, s, vh = (x.get() for x in svd(xp, CUPY.asarray(w)))
        assert np.allclose((u * s[..., None, :]) @ vh, w, atol=1e-4)
    assert cupyx.geterr()["linalg"] == "ignore"
