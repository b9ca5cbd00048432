"""`nonnegative_qp` against the KKT conditions and every active set."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from specops.linalg.nonnegative_qp import nonnegative_qp


def value(h: np.ndarray, b: np.ndarray, x: np.ndarray) -> float:
    """½ xᵀHx − bᵀx."""
    return float(0.5 * x @ h @ x - b @ x)


def best_value(h: np.ndarray, b: np.ndarray) -> float:
    """The least value over all faces of the orthant."""
    best = 0.0
    for size in range(1, len(b) + 1):
        for face in itertools.combinations(range(len(b)), size):
            own = np.ix_(face, face)
            x = np.zeros(len(b))
            x[list(face)] = np.linalg.lstsq(h[own], b[list(face)], rcond=None)[0]
            if (x >= 0).all():
                best = min(best, value(h, b, x))
    return best


def check(h: np.ndarray, b: np.ndarray, start: np.ndarray, *, slack: float = 1e-9) -> np.ndarray:
    """Non-negative, stationary, complementary, and as good as the best face."""
    given = h.copy(), b.copy(), start.copy()
    x = nonnegative_qp(h, b, start)
    for before, after in zip(given, (h, b, start), strict=True):
        np.testing.assert_array_equal(before, after)
    size = float(np.abs(b).max(initial=0.0)) + 1e-300
    gradient = h @ x - b
    assert x.shape == b.shape
    assert (x >= 0).all()
    assert (gradient >= -slack * size).all()
    assert (np.abs(gradient[x > 0]) <= slack * size).all()
    if len(b) <= 6:
        assert abs(value(h, b, x) - best_value(h, b)) <= slack * max(1.0, abs(best_value(h, b)))
    return x


def starts(n: int, rng: np.random.Generator) -> list[np.ndarray]:
    """Nothing, everything, and a random face."""
    return [np.zeros(n), np.ones(n), rng.random(n) * (rng.random(n) < 0.5)]


@pytest.mark.parametrize("n", range(1, 7))
def test_random_definite(n: int) -> None:
    rng = np.random.default_rng(n)
    for _ in range(12):
        a = rng.standard_normal((n + 1, n))
        for start in starts(n, rng):
            check(a.T @ a, rng.standard_normal(n), start)


@pytest.mark.parametrize("n", range(2, 7))
def test_singular(n: int) -> None:
    # b in the range of Aᵀ keeps the minimum finite; the minimiser is not unique.
    rng = np.random.default_rng(10 + n)
    for rank in range(1, n):
        for _ in range(4):
            a = rng.standard_normal((rank, n))
            for start in starts(n, rng):
                check(a.T @ a, a.T @ rng.standard_normal(rank), start)


@pytest.mark.parametrize("n", range(2, 7))
def test_duplicate_columns(n: int) -> None:
    rng = np.random.default_rng(20 + n)
    for _ in range(8):
        a = rng.standard_normal((n, n))
        a[:, n // 2 :] = a[:, : n - n // 2]
        b = a.T @ rng.standard_normal(n)
        for start in starts(n, rng):
            check(a.T @ a, b - 0.1, start)
            check(a.T @ a, b, start)


def test_nearly_equal_columns() -> None:
    rng = np.random.default_rng(30)
    for noise in (1e-4, 1e-7, 1e-10):
        a = np.repeat(rng.standard_normal((8, 2)), 3, axis=1)
        a += noise * rng.standard_normal(a.shape)
        b = a.T @ rng.standard_normal(8) - 0.2
        for start in starts(6, rng):
            check(a.T @ a, b, start, slack=1e-7)


def test_nothing_to_gain() -> None:
    rng = np.random.default_rng(31)
    for n in (1, 3, 6):
        a = rng.standard_normal((n, n))
        for b in (-rng.random(n) - 0.1, np.zeros(n)):
            for start in starts(n, rng):
                x = check(np.abs(a.T @ a), b, start, slack=1e-12)
                np.testing.assert_allclose(x, 0.0, atol=1e-12)


def test_diagonal_is_the_positive_part() -> None:
    rng = np.random.default_rng(32)
    d, b = rng.random(40) + 0.5, rng.standard_normal(40)
    for start in starts(40, rng):
        x = nonnegative_qp(np.diag(d), b, start)
        np.testing.assert_allclose(x, np.maximum(b / d, 0.0), atol=1e-10)


def test_zero_columns_are_harmless() -> None:
    rng = np.random.default_rng(33)
    a = rng.standard_normal((4, 5))
    a[:, 2] = 0.0
    b = a.T @ rng.standard_normal(4)
    b[2] = -1.0
    for start in starts(5, rng):
        assert check(a.T @ a, b, start)[2] == 0


def test_no_variables() -> None:
    empty = np.zeros(0)
    assert nonnegative_qp(np.zeros((0, 0)), empty, empty).shape == (0,)


def test_zero_hessian() -> None:
    for n in (1, 3):
        x = nonnegative_qp(np.zeros((n, n)), -np.ones(n), np.ones(n))
        np.testing.assert_array_equal(x, np.zeros(n))


@pytest.mark.parametrize("scale", [1e-12, 1e-6, 1e6, 1e12])
def test_scale_of_either_argument(scale: float) -> None:
    rng = np.random.default_rng(34)
    a = rng.standard_normal((5, 5))
    h, b = a.T @ a, rng.standard_normal(5)
    plain = nonnegative_qp(h, b, np.zeros(5))
    for x in (
        nonnegative_qp(h, b * scale, np.zeros(5)) / scale,
        nonnegative_qp(h * scale, b, np.zeros(5)) * scale,
    ):
        np.testing.assert_allclose(x, plain, atol=1e-8 * np.abs(plain).max())


@pytest.mark.parametrize(("n", "rank"), [(60, 80), (120, 40), (200, 200)])
def test_many_variables(n: int, rank: int) -> None:
    rng = np.random.default_rng(35)
    a = rng.standard_normal((rank, n))
    a /= np.linalg.norm(a, axis=0)
    b = a.T @ (3.0 * rng.standard_normal(rank)) - 0.5
    found = [check(a.T @ a, b, start) for start in starts(n, rng)]
    values = [value(a.T @ a, b, x) for x in found]
    np.testing.assert_allclose(values, values[0], rtol=1e-9)
    again = check(a.T @ a, b, found[0])
    np.testing.assert_allclose(again, found[0], atol=1e-9)
