"""Empirical Lipschitz constants: of one set, of two, within classes."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest

from specops import measures
from tests.backends import Backend

MAP = np.random.default_rng(0).normal(size=(5, 4))


def test_ratios_of_all_pairs(backend: Backend, rng: np.random.Generator) -> None:
    x, y = rng.normal(size=(6, 2, 3)), rng.normal(size=(6, 4))
    x[5] = x[0]
    expected = sorted(
        np.linalg.norm(y[i] - y[j]) / np.linalg.norm(x[i] - x[j])
        for i, j in itertools.combinations(range(6), 2)
        if (i, j) != (0, 5)
    )
    got = measures.lipschitz_ratios(backend.array(x, "float32"), backend.array(y, "float32"))
    np.testing.assert_allclose(np.sort(backend.numpy(got)), expected, rtol=1e-5)


def test_ratios_of_random_pairs_are_below_the_norm_of_a_linear_map(
    rng: np.random.Generator,
) -> None:
    a, x = MAP, rng.normal(size=(300, 4))
    ratios = measures.lipschitz_ratios(x, x @ a.T, pairs=1000, seed=1)
    assert ratios.shape == (1000,)
    assert 0.5 * np.linalg.norm(a, 2) < ratios.max() <= np.linalg.norm(a, 2) * (1 + 1e-12)
    np.testing.assert_array_equal(ratios, measures.lipschitz_ratios(x, x @ a.T, pairs=1000, seed=1))
    with pytest.raises(ValueError, match="two or more"):
        measures.lipschitz_ratios(x[:1], x[:1])
    with pytest.raises(ValueError, match="same samples"):
        measures.lipschitz_ratios(x, x[:5])


def by_hand(x: Any, fx: Any, y: Any, fy: Any, pairs: Any) -> list[float]:
    return sorted(np.linalg.norm(fx[i] - fy[j]) / np.linalg.norm(x[i] - y[j]) for i, j in pairs)


def test_ratios_between_two_sets(backend: Backend, rng: np.random.Generator) -> None:
    x, y = rng.normal(size=(5, 2, 3)), rng.normal(size=(3, 2, 3))
    fx, fy = rng.normal(size=(5, 4)), rng.normal(size=(3, 4))
    y[1] = x[2]
    pairs = [p for p in itertools.product(range(5), range(3)) if p != (2, 1)]
    given = [backend.array(a, "float32") for a in (x, fx, y, fy)]
    got = measures.lipschitz_ratios(given[0], given[1], other=(given[2], given[3]))
    np.testing.assert_allclose(np.sort(backend.numpy(got)), by_hand(x, fx, y, fy, pairs), rtol=1e-5)


def test_ratios_within_classes(backend: Backend, rng: np.random.Generator) -> None:
    x, y = rng.normal(size=(6, 3)), rng.normal(size=(4, 3))
    fx, fy = rng.normal(size=(6, 2)), rng.normal(size=(4, 2))
    of_x, of_y = np.array([0, 2, 0, 1, 2, 0]), np.array([2, 0, 0, 7])
    within = [(i, j) for i, j in itertools.combinations(range(6), 2) if of_x[i] == of_x[j]]
    labels = backend.convert(of_x.astype(np.int32))
    got = measures.lipschitz_ratios(x, fx, labels=labels)
    np.testing.assert_allclose(np.sort(got), by_hand(x, fx, x, fx, within))
    between = [(i, j) for i in range(6) for j in range(4) if of_x[i] == of_y[j]]
    both = measures.lipschitz_ratios(x, fx, other=(y, fy), labels=(labels, of_y.tolist()))
    np.testing.assert_allclose(np.sort(both), by_hand(x, fx, y, fy, between))


@pytest.mark.parametrize("sets", [1, 2])
def test_random_pairs_are_of_one_class_and_classes_are_alike_often(sets: int) -> None:
    """A class of 90 and one of 10 samples, told apart by what their ratios are."""
    labels = np.repeat(["many", "few"], [90, 10])
    rng = np.random.default_rng(0)
    x = rng.normal(size=(100, 2))
    fx = x * np.where(labels == "many", 1.0, 3.0)[:, None]
    options: dict[str, Any] = {"labels": labels}
    if sets == 2:
        y = rng.normal(size=(100, 2))
        options = {
            "other": (y, y * np.where(labels == "many", 1.0, 3.0)[:, None]),
            "labels": (labels, labels),
        }
    ratios = measures.lipschitz_ratios(x, fx, pairs=400, seed=3, **options)
    assert ratios.shape == (400,)
    few = np.isclose(ratios, 3.0)
    assert np.isclose(ratios[~few], 1.0).all()
    assert 0.4 < few.mean() < 0.6
    np.testing.assert_array_equal(
        ratios, measures.lipschitz_ratios(x, fx, pairs=400, seed=3, **options)
    )


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"other": (np.zeros((2, 3)), np.zeros((3, 2)))}, "same samples"),
        ({"other": (np.zeros((2, 4)), np.zeros((2, 2)))}, "equal shapes"),
        ({"labels": [0, 1, 2]}, "one class"),
        ({"labels": [0, 1]}, "a label for each"),
        ({"other": (np.zeros((2, 3)), np.zeros((2, 2))), "labels": [0, 0, 0]}, "of both sets"),
        ({"other": (np.ones((2, 3)), np.zeros((2, 2))), "labels": ([1] * 3, [0] * 2)}, "one class"),
    ],
)
def test_sets_that_do_not_fit_are_refused(options: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        measures.lipschitz_ratios(np.zeros((3, 3)), np.zeros((3, 2)), **options)
