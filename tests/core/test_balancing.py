"""Chains rescaled to equal norms compute what they computed before."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from specops import Conv, Dense, balance_norms, errors
from specops.geometry import Geometry
from tests import oracle
from tests.backends import Backend

CHAINS: dict[str, tuple[list[tuple[int, ...]], list[Geometry | None], list[int]]] = {
    "matrices": ([(7, 5), (6, 7), (3, 6)], [None, Dense(), None], [7, 6, 3]),
    "convolutions": (
        [(4, 2, 3), (4, 2, 4), (3, 4, 2), (8, 3)],
        [
            Conv((8,)),
            Conv((8,), stride=2, padding=1, groups=2),
            Conv((4,), boundary="circular", layout="*IO"),
            Dense(out_axes=(-1,)),
        ],
        [4, 4, 2, 3],
    ),
}


def matrices(weights: list[Any], geometries: list[Any]) -> list[np.ndarray]:
    """What the layers do, in double precision."""
    return [
        oracle.conv_matrix(w.astype(np.float64), g)
        if isinstance(g, Conv)
        else oracle.dense_matrix(w.astype(np.float64), g or Dense())
        for w, g in zip(weights, geometries, strict=True)
    ]


def forward(layers: list[np.ndarray], biases: list[Any], x: np.ndarray) -> np.ndarray:
    """A ReLU network; x in columns, biases by channel."""
    for i, (w, b) in enumerate(zip(layers, biases, strict=True)):
        x = w @ x
        if b is not None:
            x = x + np.repeat(b, len(x) // len(b))[:, None]
        x = np.maximum(x, 0.0) if i < len(layers) - 1 else x
    return x


@pytest.mark.parametrize("name", CHAINS)
@pytest.mark.parametrize("without", [None, 1])
def test_equal_norms_and_the_same_function(
    eager: Backend, name: str, without: int | None, rng: np.random.Generator
) -> None:
    if eager.name == "jax" and name == "convolutions":
        pytest.skip("compiles for seconds")
    shapes, geometries, channels = CHAINS[name]
    hosts = [9.0 ** (1 - i) * rng.standard_normal(shape) for i, shape in enumerate(shapes)]
    biases = [None if i == without else rng.standard_normal(n) for i, n in enumerate(channels)]
    given = [eager.array(w) for w in hosts]
    offsets = [None if b is None else eager.array(b) for b in biases]
    done = balance_norms(given, geometries, offsets)
    for before, after in zip([*given, *offsets], [*done.weights, *done.biases], strict=True):
        assert (before is None) == (after is None)
        if before is not None:
            eager.same_kind(after, before)
            assert after.shape == before.shape
    new = [eager.numpy(w) for w in done.weights]
    shifts = [None if b is None else eager.numpy(b) for b in done.biases]
    norms = [np.linalg.norm(m, 2) for m in matrices(hosts, geometries)]
    mean = np.prod(norms) ** (1 / len(norms))
    got = [np.linalg.norm(m, 2) for m in matrices(new, geometries)]
    np.testing.assert_allclose(got, mean, rtol=2e-6)
    np.testing.assert_allclose(done.factors, mean / norms, rtol=2e-6)
    assert np.prod(done.factors) == pytest.approx(1.0, rel=1e-12)
    for w, factor, host, before in zip(new, done.factors, hosts, given, strict=True):
        np.testing.assert_allclose(w, factor * host, rtol=1e-6)
        np.testing.assert_allclose(eager.numpy(before), host, rtol=1e-6)  # left as it was
    layers = matrices(hosts, geometries)
    x = rng.standard_normal((layers[0].shape[1], 40))
    expected = forward(layers, biases, x)
    assert np.abs(expected - forward(layers, [None] * len(biases), x)).max() > 0.1
    atol = 1e-5 * np.abs(expected).max()
    np.testing.assert_allclose(
        forward(matrices(new, geometries), shifts, x), expected, rtol=0, atol=atol
    )


def test_twice_is_once_and_one_layer_is_left() -> None:
    rng = np.random.default_rng(0)
    weights = [rng.standard_normal((4, 3)), 50.0 * rng.standard_normal((2, 4))]
    done = balance_norms(weights)
    assert done.biases == [None, None]
    np.testing.assert_allclose(balance_norms(done.weights).factors, 1.0, rtol=1e-12)
    alone = balance_norms(weights[:1])
    assert alone.factors == [1.0]
    np.testing.assert_array_equal(alone.weights[0], weights[0])


def test_norms_far_apart_and_half_precision() -> None:
    torch = pytest.importorskip("torch")
    sizes = (1e20, 1.0, 1e-20)
    for dtype in (torch.float32, torch.bfloat16):
        weights = [(size * torch.eye(2)).to(dtype) for size in sizes]
        done = balance_norms(weights, biases=[torch.ones(2, dtype=dtype), None, None])
        for w in done.weights:
            assert w.dtype == dtype
            np.testing.assert_allclose(w.float(), np.eye(2), rtol=1e-2)
        first: Any = done.biases[0]
        assert first.dtype == dtype
        np.testing.assert_allclose(first.float() * 1e20, 1.0, rtol=1e-2)


@pytest.mark.parametrize(
    ("dtype", "sizes"), [("f", (2.0**-140, 2.0**124)), ("d", (2.0**-1070, 1e308))]
)
def test_factors_may_leave_the_range(dtype: str, sizes: tuple[float, ...]) -> None:
    done = balance_norms([(size * np.eye(2)).astype(dtype) for size in sizes])
    wanted = np.sqrt(sizes[0]) * np.sqrt(sizes[1]) * np.eye(2)
    for w in done.weights:
        np.testing.assert_allclose(w, wanted, rtol=1e-4)


ONE = np.eye(2)


@pytest.mark.parametrize(
    ("weights", "options", "error", "message"),
    [
        ([], {}, ValueError, "at least one"),
        ([ONE], {"biases": []}, ValueError, "as many"),
        ([ONE], {"geometries": [Dense(), Dense()]}, ValueError, "as many"),
        ([ONE, 0.0 * ONE], {}, ValueError, r"weights\[1\] is zero"),
        ([np.full((2, 2), np.nan)], {}, errors.NonFiniteError, "NaN"),
        ([np.full((2, 2), np.inf)], {}, errors.NonFiniteError, "infinity"),
        ([np.ones((2, 2, 2))], {}, errors.GeometryError, "axes"),
        (
            [np.ones((2, 2, 2))],
            {"geometries": [Dense(batch_axes=(0,), out_axes=(1,))]},
            errors.GeometryError,
            r"weights\[0\].*several norms",
        ),
        ([ONE], {"geometries": [Dense(splits=(1, 1))]}, errors.GeometryError, "several norms"),
        ([np.ones((2, 2, 3))], {"geometries": [Conv(None)]}, errors.GeometryError, "input_shape"),
        ([np.eye(2, dtype=int)], {}, errors.UnsupportedArrayError, "cannot be measured"),
    ],
)
def test_what_cannot_be_balanced(
    weights: Any, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        balance_norms(weights, **options)
