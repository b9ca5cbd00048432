"""Measures on arrays: closed forms on linear networks, definitions by brute force."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from specops import Conv, Dense, errors, measures, spectral_norm_bounds
from tests import oracle
from tests.backends import Backend

LAYERS = [
    np.random.default_rng(k).normal(size=size) for k, size in enumerate([(5, 4), (6, 5), (3, 6)])
]
CONVS = {
    "circular": ((4, 3, 3, 3), Conv((6, 5), boundary="circular")),
    "zeros, stride": ((4, 3, 3, 2), Conv((6, 5), stride=2, padding=1)),
    "grouped": ((4, 2, 3), Conv((7,), groups=2)),
    "wraps": ((2, 3, 5), Conv((3,), boundary="circular")),
    "transposed": ((3, 4, 3), Conv((5,), transposed=True, layout="IO*", stride=2, padding=1)),
}


def as_operator(a: np.ndarray) -> Any:
    return SimpleNamespace(shape=a.shape, like=a, matvec=lambda x: a @ x, rmatvec=lambda y: a.T @ y)


def test_margins(backend: Backend, rng: np.random.Generator) -> None:
    logits = rng.normal(size=(7, 4))
    labels = rng.integers(0, 4, 7)
    expected = [
        row[y] - max(row[j] for j in range(4) if j != y)
        for row, y in zip(logits, labels, strict=True)
    ]
    got = backend.call(
        lambda z: measures.margins(z, backend.convert(labels.astype(np.int32))),
        backend.array(logits, "float32"),
    )
    np.testing.assert_allclose(backend.numpy(got), expected, rtol=1e-5)


@pytest.mark.parametrize(
    ("logits", "labels"),
    [((3, 1), (3,)), ((3,), (3,)), ((3, 4), (2,))],
    ids=["one class", "no classes", "lengths"],
)
def test_margins_refuse_shapes(logits: Any, labels: Any) -> None:
    with pytest.raises(ValueError, match="two classes"):
        measures.margins(np.zeros(logits), np.zeros(labels, int))


def test_margins_refuse_labels_that_are_no_class() -> None:
    with pytest.raises(ValueError, match="0 … 2"):
        measures.margins(np.zeros((2, 3)), np.array([0, 3]))


@pytest.mark.parametrize("labels", [np.array([0.9, 1.2], np.float32), np.array([True, False])])
def test_margins_refuse_labels_that_are_no_integers(backend: Backend, labels: Any) -> None:
    logits = backend.array(np.zeros((2, 3)), "float32")
    for wrong in (labels.tolist(), labels, backend.convert(labels)):
        with pytest.raises(ValueError, match="labels must be integers"):
            measures.margins(logits, wrong)


def brute_spec_fro(matrices: list[np.ndarray], margin: float) -> float:
    norms = [np.linalg.norm(a, 2) for a in matrices]
    ranks = [np.sum(a**2) / n**2 for a, n in zip(matrices, norms, strict=True)]
    return float(np.prod(norms) ** 2 * sum(ranks) / margin**2)


def brute_spec_l1(matrices: list[np.ndarray], margin: float) -> float:
    norms = [np.linalg.norm(a, 2) for a in matrices]
    shares = [
        (np.sum(np.linalg.norm(a, axis=1)) / n) ** (2 / 3)
        for a, n in zip(matrices, norms, strict=True)
    ]
    return float(np.prod(norms) ** 2 * sum(shares) ** 3 / margin**2)


@pytest.mark.parametrize(
    ("log_of", "brute"),
    [(measures.log_spec_fro, brute_spec_fro), (measures.log_spec_l1, brute_spec_l1)],
    ids=["spec-fro", "spec-l1"],
)
def test_complexities_of_matrices(log_of: Any, brute: Any) -> None:
    assert log_of(LAYERS, 0.3) == pytest.approx(math.log(brute(LAYERS, 0.3)), rel=1e-10)
    many = log_of(LAYERS, np.array([0.3, 2.0, 0.0, -1.0]))
    np.testing.assert_allclose(many[:2], np.log([brute(LAYERS, 0.3), brute(LAYERS, 2.0)]))
    assert np.isinf(many[2:]).all()
    # Far beyond what a product of floats holds, and through a layer of zeros.
    huge = [np.eye(2) * 1e150] * 10
    assert log_of(huge, 1.0) == pytest.approx(20 * 150 * math.log(10), rel=1e-2)
    assert log_of([np.eye(2), np.zeros((2, 2))], 1.0) == -math.inf


@pytest.mark.parametrize("key", CONVS)
def test_complexities_of_convolutions_are_those_of_their_matrices(
    key: str, rng: np.random.Generator
) -> None:
    shape, geometry = CONVS[key]
    w = rng.normal(size=shape)
    matrices = [oracle.conv_matrix(w, geometry), LAYERS[0]]
    for log_of, brute in (
        (measures.log_spec_fro, brute_spec_fro),
        (measures.log_spec_l1, brute_spec_l1),
    ):
        got = log_of([w, LAYERS[0]], 0.7, [geometry, None])
        assert got == pytest.approx(math.log(brute(matrices, 0.7)), rel=1e-6)


def test_complexities_refuse_what_has_no_single_norm() -> None:
    with pytest.raises(errors.GeometryError, match=r"weights\[1\] is a stack"):
        measures.log_spec_fro([np.eye(2), np.ones((3, 2, 2))], 1.0, [None, Dense((1,), (2,), (0,))])
    with pytest.raises(errors.GeometryError, match=r"weights\[0\] is a stack"):
        measures.log_spec_l1([np.eye(4)], 1.0, [Dense(splits=(2, 2))])
    with pytest.raises(errors.GeometryError, match="input_shape"):
        measures.log_spec_l1([np.ones((2, 2, 3))], 1.0, [Conv(None)])
    with pytest.raises(ValueError, match="empty"):
        measures.log_spec_fro([], 1.0)
    with pytest.raises(ValueError, match="2 weights and 1"):
        measures.log_spec_fro(LAYERS[:2], 1.0, [None])


def test_margins_that_are_no_number_stay_none() -> None:
    found = measures.log_spec_fro(LAYERS, np.array([1.0, np.nan, -1.0]))
    assert np.isfinite(found[0])
    assert np.isnan(found[1])
    assert np.isinf(found[2])
    assert math.isnan(measures.log_spec_l1(LAYERS, math.nan))
    whole = measures.log_spec_fro(LAYERS, np.array([1, 2]))
    assert whole[0] == pytest.approx(measures.log_spec_fro(LAYERS, 1.0))


def test_jac_norm(backend: Backend, rng: np.random.Generator) -> None:
    h, j, margin = rng.uniform(0, 3, (3, 5)), rng.uniform(0, 2, (3, 5)), rng.normal(size=5)
    h[:, 1] = 0.0
    with np.errstate(divide="ignore"):
        expected = np.where(margin > 0, np.log((h * j).sum(0) / np.abs(margin)), np.inf)
    arrays = [backend.array(x, "float64") for x in (h, j, margin)]
    got = backend.numpy(measures.log_jac_norm(*arrays))
    np.testing.assert_allclose(got, expected, rtol=1e-6)
    with pytest.raises(ValueError, match="margins"):
        measures.log_jac_norm(h, j[:2], margin)


def test_generalization_gap() -> None:
    train, test = [0.6, 0.9, 0.99, 1.0], [0.5, 0.7, 0.88, 0.86]
    assert measures.generalization_gap(train, test, 0.6) == pytest.approx(0.11)
    assert measures.generalization_gap(train, test, 0.4) == pytest.approx(0.1)
    assert math.isnan(measures.generalization_gap(train, test, 0.88))
    with pytest.raises(ValueError, match="as many"):
        measures.generalization_gap(train, test[:2], 0.5)


def test_gradient_norms(backend: Backend, rng: np.random.Generator) -> None:
    values = {"a": rng.normal(size=(3, 4)), "b": rng.normal(size=6) * 1e-30}
    given_ = {k: backend.array(v, "float32") for k, v in values.items()} | {"none": None}
    got = measures.gradient_norms(given_)
    assert set(got) == {"a", "b"}
    for name, value in values.items():
        assert got[name] == pytest.approx(np.linalg.norm(value), rel=1e-5)


def test_the_lipschitz_bound_is_the_product(rng: np.random.Generator) -> None:
    shape, geometry = CONVS["circular"]
    w = rng.normal(size=shape)
    bound = measures.lipschitz_upper_bound([(w, geometry), 1.0, (LAYERS[0], None), 0.25])
    expected = oracle.spectrum(w, geometry)[0] * np.linalg.norm(LAYERS[0], 2) * 0.25
    assert expected <= bound.value * (1 + 1e-12)
    assert bound.value == pytest.approx(expected, rel=1e-5)
    assert bound.factors[1::2] == (1.0, 0.25)
    for kernel_shape, conv in CONVS.values():
        kernel = rng.normal(size=kernel_shape)
        upper = spectral_norm_bounds(kernel, conv).upper
        assert measures.lipschitz_upper_bound([(kernel, conv)]).factors == (float(upper),)
    assert measures.lipschitz_upper_bound([0.0, 2.0]).value == 0.0
    assert measures.lipschitz_upper_bound([1e200] * 3).value == math.inf
    assert measures.lipschitz_upper_bound([1e200] * 3).log == pytest.approx(600 * math.log(10))
    for bad in ([], [-1.0], [math.nan], [(np.ones((3, 2, 2)), Dense((1,), (2,), (0,)))]):
        with pytest.raises(ValueError, match="layers"):
            measures.lipschitz_upper_bound(bad)


@pytest.mark.parametrize("shape", [(40, 7), (7, 40), (30, 30), (1, 5), (5, 1)])
def test_the_local_constant_of_a_linear_map_is_its_norm(shape: tuple[int, int]) -> None:
    a = np.random.default_rng(1).normal(size=shape)
    found = measures.local_lipschitz(as_operator(a), tolerance=1e-8)
    assert found.value == pytest.approx(np.linalg.norm(a, 2), rel=1e-7)
    loose = measures.local_lipschitz(as_operator(a), tolerance=0.3)
    assert loose.steps <= found.steps
    assert loose.value <= np.linalg.norm(a, 2) * (1 + 1e-12)
    values = np.linalg.svd(a, compute_uv=False)
    assert np.abs(values - loose.value).min() <= loose.error * (1 + 1e-9) + 1e-12


@pytest.mark.parametrize("scale", [1e-22, 1e-12, 1e12, 1e22])
def test_scales_do_not_matter(scale: float) -> None:
    rng = np.random.default_rng(3)
    a = (rng.normal(size=(40, 30)) * scale).astype(np.float32)
    top = np.linalg.norm(a.astype(float), 2)
    found = measures.local_lipschitz(as_operator(a))
    assert found.value == pytest.approx(top, rel=1e-2)
    assert 0 < found.error < 0.01 * top
    square = (a[:30] + a[:30].T) / 2
    ends = measures.spectrum_ends(as_operator(square))
    assert ends.largest == pytest.approx(np.linalg.eigvalsh(square.astype(float))[-1], rel=1e-2)
    x = (rng.normal(size=(9, 30)) * scale).astype(np.float32)
    ratios = measures.lipschitz_ratios(x, x * np.float32(2.0))
    np.testing.assert_allclose(ratios, 2.0, rtol=1e-5)
    noise = measures.noise_sensitivity(lambda x: x * np.float32(3.0), x, samples=200)
    np.testing.assert_allclose(noise, 30.0, rtol=0.2)
    kernel = (rng.normal(size=(4, 3, 3)) * scale).astype(np.float32)
    one = measures.log_spec_l1([a, kernel], 1.0, [None, Conv((7,))])
    two = measures.log_spec_l1([a / scale, kernel / scale], 1.0, [None, Conv((7,))])
    assert one == pytest.approx(two + 4 * math.log(scale), abs=1e-3)


def test_complexities_of_norms_beyond_single_precision() -> None:
    huge, small = np.full((8, 8), 2.0**127, np.float32), np.ones((8, 8), np.float32)
    for function in (measures.log_spec_fro, measures.log_spec_l1):
        assert function([huge], 1.0) == pytest.approx(function([small], 1.0) + 254 * math.log(2.0))


def test_the_local_constant_of_nothing_is_zero() -> None:
    found = measures.local_lipschitz(as_operator(np.zeros((4, 3))))
    assert (found.value, found.error) == (0.0, 0.0)
    with pytest.raises(errors.NonFiniteError, match="NaN or infinity"):
        measures.local_lipschitz(as_operator(np.full((4, 3), np.nan)))


def symmetric(values: Any, seed: int = 0) -> np.ndarray:
    q = np.linalg.qr(np.random.default_rng(seed).normal(size=(len(values),) * 2))[0]
    return (q * np.asarray(values, float)) @ q.T


@pytest.mark.parametrize(
    "values",
    [
        np.linspace(-3, 10, 60),
        [2.0],
        [-1.0, -1.0, -1.0],
        np.zeros(5),
        [0.0, 0.0, 0.0, 5.0],
        np.r_[np.zeros(40), -2.0, 7.0],
        np.linspace(-3, 10, 40) * 1e-12,
    ],
    ids=["spread", "one", "multiple", "zero", "rank one", "low rank", "small"],
)
def test_both_ends_of_a_spectrum(values: Any) -> None:
    values = np.asarray(values, float)
    a = symmetric(values)
    ends = measures.spectrum_ends(as_operator(a), tolerance=1e-9)
    size = np.abs(values).max()
    assert ends.largest == pytest.approx(values.max(), rel=1e-8, abs=1e-10 * size + 1e-300)
    assert ends.smallest == pytest.approx(values.min(), rel=1e-8, abs=1e-10 * size + 1e-300)
    assert ends.steps <= len(values)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.floats(-10, 10), min_size=3, max_size=30), st.integers(1, 8), st.integers(0, 50))
def test_the_error_bounds_hold_wherever_it_stops(values: Any, steps: int, seed: int) -> None:
    a = symmetric(values, seed)
    ends = measures.spectrum_ends(as_operator(a), max_steps=steps, tolerance=1e-6, seed=seed)
    slack = 1e-9 * (1 + np.abs(values).max())
    true = np.linalg.eigvalsh(a)
    assert np.abs(true - ends.largest).min() <= ends.largest_error + slack
    assert np.abs(true - ends.smallest).min() <= ends.smallest_error + slack
    assert true[0] - slack <= ends.smallest <= ends.largest <= true[-1] + slack


def test_density_is_that_of_the_eigenvalues() -> None:
    values = np.r_[np.linspace(0, 1, 300), np.full(100, 6.0)]
    found = measures.spectral_density(
        as_operator(symmetric(values)), steps=40, probes=16, points=2000
    )
    unit = found.grid[1] - found.grid[0]
    assert np.sum(found.density) * unit == pytest.approx(1.0, abs=1e-3)
    assert np.sum(found.density[found.grid > 4]) * unit == pytest.approx(0.25, abs=0.05)
    assert found.grid[0] < values.min() < values.max() < found.grid[-1]
    one = measures.spectral_density(as_operator(np.eye(3)), steps=3)
    assert one.grid[np.argmax(one.density)] == pytest.approx(1.0, abs=0.01)


def test_noise_sensitivity_of_a_linear_map(backend: Backend, rng: np.random.Generator) -> None:
    if backend.traced:
        pytest.skip("as eager")
    a, x = LAYERS[0], rng.normal(size=(3, 4))
    matrix, given_ = (backend.array(values, "float32") for values in (a.T, x))

    def found(samples: int) -> np.ndarray:
        got = measures.noise_sensitivity(lambda z: z @ matrix, given_, samples=samples)
        return backend.numpy(got)

    # The noise is the same everywhere: on the other backends a few draws tell.
    same = measures.noise_sensitivity(lambda z: z @ a.T, x, samples=50)
    np.testing.assert_allclose(found(50), same, rtol=1e-5)
    if backend.name == "numpy":
        got = found(2000)
        lengths = np.linalg.norm(x, axis=1) / np.linalg.norm(x @ a.T, axis=1)
        np.testing.assert_allclose(got, np.sum(a**2) * lengths**2, rtol=0.1)
        ranks = np.sum(a**2) / np.linalg.norm(a, 2) ** 2
        assert got.min() >= ranks * 0.9


def test_noise_sensitivity_by_its_definition_on_a_relu_network(rng: np.random.Generator) -> None:
    a, b = LAYERS[0], LAYERS[1]

    def f(x: np.ndarray) -> np.ndarray:
        return np.maximum(x @ a.T, 0) @ b.T

    x = rng.normal(size=(2, 4))
    got = measures.noise_sensitivity(f, x, samples=4000, seed=3)
    rng = np.random.default_rng(5)
    for row, value in zip(x, got, strict=True):
        noise = rng.normal(size=(4000, 4)) * np.linalg.norm(row)
        moved = f(row + noise) - f(row[None])
        expected = np.mean(np.sum(moved**2, 1)) / np.sum(f(row[None]) ** 2)
        assert value == pytest.approx(expected, rel=0.15)
    with pytest.raises(ValueError, match="samples apart"):
        measures.noise_sensitivity(lambda x: x[:1], x)
    assert measures.noise_sensitivity(f, x[:0]).shape == (0,)


@pytest.mark.parametrize("scale", [1.0, 1e-30, 1e30])
def test_noise_sensitivity_of_samples_without_an_output(backend: Backend, scale: float) -> None:
    """One that some draws move and others leave, one that none can move, and a live one."""
    if backend.traced:
        pytest.skip("as eager")
    x = backend.array([[-1.0], [0.0], [1.0]], "float32")
    got = backend.numpy(measures.noise_sensitivity(lambda z: scale * (z + abs(z)), x, samples=64))
    assert got[0] == math.inf
    assert np.isnan(got[1])
    assert 0 < got[2] < math.inf
