"""Variances of weights beside their bounds."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from specops import Conv, Dense, errors, measures
from tests import oracle
from tests.backends import Backend


@pytest.mark.parametrize("norm", ["reshaped", "bidirectional"])
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_variance_never_exceeds_its_bound(norm: Any, data: Any) -> None:
    shape = tuple(data.draw(st.lists(st.integers(1, 6), min_size=2, max_size=4)))
    seed = data.draw(st.integers(0, 100))
    w = np.random.default_rng(seed).choice([-1.0, 1.0], size=shape)
    geometry = Dense() if len(shape) == 2 else Conv(None)
    found = measures.parameter_variance(w, geometry, norm=norm)
    first = np.linalg.norm(w.reshape(shape[0], -1), 2)
    second = np.linalg.norm(np.moveaxis(w, 1, 0).reshape(shape[1], -1), 2)
    sigma = first if norm == "reshaped" else (first + second) / 2
    assert found.measured == pytest.approx(np.var(w / sigma), rel=1e-9, abs=1e-15)
    assert found.measured <= found.bound * (1 + 1e-9)


def test_variance_bounds_are_met(rng: np.random.Generator) -> None:
    """Flat spectra and entries of one size: nothing tighter holds."""
    hadamard = np.array([[1.0, 1.0], [1.0, -1.0]])
    found = measures.parameter_variance(np.kron(hadamard, [[1.0, -1.0]])[:, :4], norm="reshaped")
    assert found.measured == pytest.approx(0.25)
    assert found.bound == 0.25
    kernel = rng.choice([-1.0, 1.0], size=(1, 100, 10, 10))
    both = measures.parameter_variance(kernel, Conv(None), norm="bidirectional")
    # The printed theorem's bound.
    assert both.bound > 2 / (100 * 100 + 100)
    with pytest.raises(ValueError, match="zero"):
        measures.parameter_variance(np.zeros((2, 2)), norm="reshaped")
    with pytest.raises(ValueError, match="norm"):
        measures.parameter_variance(np.eye(2), norm="spectral")  # type: ignore[arg-type]


OPERATORS = {
    "circular": ((4, 3, 3, 3), Conv((6, 5), boundary="circular")),
    "zeros, stride": ((4, 3, 3, 2), Conv((6, 5), stride=2, padding=1)),
    "valid, one output": ((3, 2, 4), Conv((4,), padding="valid")),
    "grouped": ((4, 2, 3), Conv((7,), groups=2)),
    "transposed": ((3, 4, 3), Conv((5,), transposed=True, layout="IO*", stride=2, padding=1)),
}


@pytest.mark.parametrize("key", OPERATORS)
def test_variance_under_the_operators_norm(key: str, rng: np.random.Generator) -> None:
    shape, geometry = OPERATORS[key]
    for w in (rng.normal(size=shape), rng.choice([-1.0, 1.0], size=shape)):
        found = measures.parameter_variance(w, geometry, norm="operator", scale=1.75)
        matrix = oracle.conv_matrix(w, geometry)
        sigma = np.linalg.norm(matrix, 2)
        assert found.measured == pytest.approx(np.var(1.75 * w / sigma), rel=1e-6)
        assert found.measured <= found.bound * (1 + 1e-9)
        # The bound's own derivation, on the explicit matrix.
        taps = np.eye(math.prod(shape[2:])).reshape(-1, 1, 1, *shape[2:])
        one = dataclasses.replace(geometry, groups=1)
        uses = [np.count_nonzero(oracle.conv_matrix(tap, one)) for tap in taps]
        expected = 1.75**2 * min(matrix.shape) / (w.size * min(uses))
        assert found.bound == pytest.approx(expected, rel=1e-12)


def test_the_bound_under_the_operators_norm_is_met() -> None:
    """A convolution with one tap of an orthogonal matrix is a flat spectrum of its own."""
    hadamard = np.array([[1.0, 1.0], [1.0, -1.0]])[..., None]
    found = measures.parameter_variance(
        np.concatenate([hadamard, -hadamard]), Conv((5,), padding="valid"), norm="operator"
    )
    assert found.measured == pytest.approx(found.bound, rel=1e-9)


def test_what_no_operators_norm_bounds() -> None:
    wraps = measures.parameter_variance(
        np.arange(5.0)[None, None], Conv((3,), boundary="circular"), norm="operator"
    )
    unread = measures.parameter_variance(
        np.arange(1.0, 6.0)[None, None], Conv((1,), padding=2), norm="operator"
    )
    assert (wraps.bound, unread.bound) == (math.inf, math.inf)
    with pytest.raises(errors.GeometryError, match="input_shape"):
        measures.parameter_variance(np.ones((2, 2, 3)), Conv(None), norm="operator")


def test_variance_as_it_is_and_scaled(backend: Backend, rng: np.random.Generator) -> None:
    if backend.traced:
        pytest.skip("as eager")
    w = rng.normal(size=(4, 6)) * 1e-25
    array = backend.array(w, "float32")
    plain = measures.parameter_variance(array, norm=None, scale=1e25)
    assert plain.measured == pytest.approx(np.var(w) * 1e50, rel=1e-5)
    assert plain.bound == math.inf
    zero = measures.parameter_variance(backend.array(np.zeros((4, 6)), "float32"), norm=None)
    assert zero.measured == 0.0
    sigma = np.linalg.norm(w, 2)
    found = measures.parameter_variance(array, norm="operator", scale=0.7)
    assert found.measured == pytest.approx(np.var(0.7 * w / sigma), rel=1e-5)
    assert found.bound == pytest.approx(0.49 / 6)


def test_variances_that_mean_nothing_are_refused() -> None:
    for scale in (0.0, -1.0, math.inf):
        with pytest.raises(ValueError, match="scale"):
            measures.parameter_variance(np.eye(2), norm=None, scale=scale)
    with pytest.raises(errors.NonFiniteError):
        measures.parameter_variance(np.array([[1.0, math.nan]]), norm=None)
    with pytest.raises(errors.GeometryError, match="several norms"):
        measures.parameter_variance(np.eye(4), Dense(splits=(2, 2)), norm=None)


@pytest.mark.parametrize("norm", ["reshaped", "bidirectional", "operator", None])
def test_nothing_is_guessed_from_the_shape_of_a_kernel(norm: Any) -> None:
    with pytest.raises(errors.GeometryError, match="needs a geometry"):
        measures.parameter_variance(np.ones((2, 2, 3)), norm=norm)
