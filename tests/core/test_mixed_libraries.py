"""Arrays of two libraries, or on two devices, in one call."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

import specops
from specops import Conv, errors
from tests.backends import BACKENDS, Backend

EAGER = [b for b in BACKENDS if not b.traced]
PAIRS = [p for p in itertools.permutations(EAGER, 2) if all(b.doubles for b in p)]
MATRIX = np.random.default_rng(0).standard_normal((6, 4))
START = np.linspace(1.0, 2.0, 4)[:, None]


@pytest.mark.parametrize(("ours", "theirs"), PAIRS, ids=str)
def test_vectors_to_start_from_are_taken_over(ours: Backend, theirs: Backend) -> None:
    w = ours.array(MATRIX)
    _, s, _ = specops.top_singular_triplets(w, 1, start=theirs.array(START))
    bounds = specops.spectral_norm_bounds(w, start=theirs.array(START))
    expected = specops.spectral_norm_bounds(MATRIX, start=START)
    for found, value in (
        (s, [np.linalg.norm(MATRIX, 2)]),
        (bounds.lower, expected.lower),
        (bounds.upper, expected.upper),
    ):
        ours.same_kind(found, w)
        np.testing.assert_allclose(ours.numpy(found), value, rtol=1e-9)


@pytest.mark.parametrize(("ours", "theirs"), PAIRS, ids=str)
def test_vectors_of_an_operator_are_those_of_its_weight(ours: Backend, theirs: Backend) -> None:
    matrix = specops.linear_operator(ours.array(MATRIX))
    layer = specops.linear_operator(ours.array(MATRIX.reshape(6, 2, 2)), Conv((2,)))
    if {ours.name, theirs.name} == {"numpy", "jax"}:
        # JAX takes arrays of NumPy, and SciPy gives it some.
        np.testing.assert_allclose(matrix.matvec(theirs.array(START[:, 0])), MATRIX @ START[:, 0])
        return
    for operator in (matrix, layer, matrix.H):
        for product in (operator.matvec, operator.matmat):
            x = np.ones(operator.shape[1:] + (1,) * (product == operator.matmat))
            product(ours.array(x))
            with pytest.raises(errors.UnsupportedArrayError, match=r"`like`.*convert them first"):
                product(theirs.array(x))
