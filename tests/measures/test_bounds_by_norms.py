"""Bounds of gradients, Hessians and convolutions by norms, against explicit derivatives."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from specops import Conv, Dense, errors, measures
from tests import oracle
from tests.backends import Backend

torch = pytest.importorskip("torch")


def network(seed: int, sizes: tuple[int, ...]) -> list[Any]:
    rng = np.random.default_rng(seed)
    shapes = [(b, a) for a, b in zip(sizes, (*sizes[1:], 1), strict=True)]
    return [torch.tensor(rng.normal(size=shape)) for shape in shapes]


def value(weights: list[Any], x: Any, last: Any) -> Any:
    for w in weights[:-1]:
        x = torch.nn.functional.leaky_relu(w @ x, 0.2)
    return last(weights[-1] @ x).squeeze()


def gradients(weights: list[Any], x: Any, last: Any) -> list[float]:
    leaves = [w.clone().requires_grad_() for w in weights]
    found = torch.autograd.grad(value(leaves, x, last), leaves)
    return [float(g.norm()) for g in found]


@pytest.mark.parametrize("seed", range(3))
def test_gradients_never_exceed_their_bounds(seed: int) -> None:
    weights = network(seed, (5, 4, 6))
    norms = [float(torch.linalg.matrix_norm(w, 2)) for w in weights]
    x = torch.randn(5, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    for last, slope in ((torch.sigmoid, 0.25), (torch.nn.Identity(), 1.0)):
        bounds = measures.gradient_norm_bounds(norms, float(x.norm()), activations=slope)
        found = gradients(weights, x, last)
        assert all(g <= b for g, b in zip(found, bounds.layers, strict=True))
        assert math.hypot(*found) <= bounds.total <= math.hypot(*bounds.layers) * (1 + 1e-12)


def test_gradients_meet_their_bounds_where_leading_directions_do() -> None:
    weights = [torch.diag(torch.tensor([a, 0.5], dtype=torch.float64)) for a in (2.0, 3.0)]
    weights.append(torch.tensor([[5.0, 0.0]], dtype=torch.float64))
    x = torch.tensor([7.0, 0.0], dtype=torch.float64)
    bounds = measures.gradient_norm_bounds([2.0, 3.0, 5.0], 7.0)
    assert gradients(weights, x, torch.nn.Identity()) == pytest.approx(bounds.layers)
    assert bounds.layers == (105.0, 70.0, 42.0)
    normalised = measures.gradient_norm_bounds([1.0] * 4, 7.0)
    assert normalised.layers == (7.0,) * 4
    assert normalised.total == pytest.approx(2.0 * 7.0)  # √L ‖x‖


@pytest.mark.parametrize("seed", range(3))
def test_hessians_never_exceed_their_bounds(seed: int) -> None:
    weights = network(seed, (3, 4, 2))
    norms = [float(torch.linalg.matrix_norm(w, 2)) for w in weights]
    x = torch.randn(3, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    curvature = 1.0 / (6.0 * math.sqrt(3.0))
    bounds = measures.hessian_norm_bounds(norms, float(x.norm()), output_curvature=curvature)
    for t, bound in enumerate(bounds):

        def of_layer(w: Any, t: int = t) -> Any:
            return value([*weights[:t], w, *weights[t + 1 :]], x, torch.sigmoid)

        hessian = torch.autograd.functional.hessian(of_layer, weights[t])
        size = weights[t].numel()
        assert float(torch.linalg.matrix_norm(hessian.reshape(size, size), 2)) <= bound
    # A parabola behind one output: the bound is the Hessian.
    (bound,) = measures.hessian_norm_bounds([9.0], float(x.norm()), output_curvature=2.0)
    hessian = torch.autograd.functional.hessian(lambda w: (w @ x).square(), weights[0][0])
    assert float(torch.linalg.matrix_norm(hessian, 2)) == pytest.approx(bound)


def test_bounds_of_many_samples(backend: Backend) -> None:
    x = backend.array([1.0, 2.0, 0.0], "float32")
    bounds = measures.gradient_norm_bounds([2.0, 3.0], x)
    np.testing.assert_allclose(backend.numpy(bounds.layers[0]), [3.0, 6.0, 0.0])
    np.testing.assert_allclose(
        backend.numpy(bounds.total), math.sqrt(13) * np.array([1, 2, 0]), 1e-6
    )
    curved = measures.hessian_norm_bounds([2.0, 3.0], x, output_curvature=0.5)
    np.testing.assert_allclose(backend.numpy(curved[1]), [2.0, 8.0, 0.0])
    backend.same_kind(bounds.total, x)


@pytest.mark.parametrize("bad", [-1.0, math.nan, math.inf])
def test_norms_of_many_samples_are_checked(backend: Backend, bad: float) -> None:
    x = backend.array([1.0, bad], "float32")
    for bound in (
        lambda x: measures.gradient_norm_bounds([2.0, 3.0], x).total,
        lambda x: measures.hessian_norm_bounds([2.0, 3.0], x, output_curvature=0.5)[0],
    ):
        if backend.traced:
            found = backend.numpy(backend.call(bound, x))
            assert np.isnan(found).tolist() == [False, True]
        else:
            with pytest.raises(ValueError, match="input_norm"):
                bound(x)


def test_dead_layers_and_overflow() -> None:
    assert measures.gradient_norm_bounds([0.0, 3.0], 1.0).layers == (3.0, 0.0)
    huge = [1e200] * 3
    assert measures.gradient_norm_bounds(huge, 1.0).layers == (math.inf,) * 3
    assert measures.hessian_norm_bounds(huge[:2], 1.0, output_curvature=1.0) == (math.inf,) * 2
    # What is in range is told, whatever its parts are.
    deep = measures.gradient_norm_bounds([*[0.1] * 400, *[10.0] * 400], 1.0)
    assert deep.layers[0] == pytest.approx(10.0)
    assert deep.layers[-1] == pytest.approx(0.1)
    assert deep.total == pytest.approx(math.hypot(*deep.layers))
    assert measures.gradient_norm_bounds([1e200, 0.0, 1e200], 1e-300).layers[1] == pytest.approx(
        1e100
    )
    curved = measures.hessian_norm_bounds([1e200, 1e200], 1e-300, output_curvature=1.0)
    assert curved[0] == pytest.approx(1e-200)
    # Of many samples the same, and zero stays zero.
    x = np.array([0.0, 1e-300, 1.0])
    many = measures.gradient_norm_bounds([1e200, 0.0, 1e200], x)
    assert many.layers[1] == pytest.approx([0.0, 1e100, math.inf])
    assert many.total == pytest.approx([0.0, 1e100, math.inf])
    (curved, _) = measures.hessian_norm_bounds([3.0, 1e200], x, output_curvature=0.25)
    assert curved == pytest.approx([0.0, 2.5e-201, math.inf], rel=1e-9, abs=1e-300)
    small = measures.gradient_norm_bounds([1.0, 1e-50], np.array([1e30], np.float32))
    assert small.layers[0] == pytest.approx([1e-20], rel=1e-6, abs=0.0)
    for bad in ([], [-1.0], [math.nan]):
        with pytest.raises(ValueError, match="norms"):
            measures.gradient_norm_bounds(bad, 1.0)
    with pytest.raises(ValueError, match="output_curvature"):
        measures.hessian_norm_bounds([1.0], 1.0, output_curvature=-1.0)
    with pytest.raises(ValueError, match="input_norm"):
        measures.gradient_norm_bounds([1.0], math.inf)


CONVS = {
    "same": ((4, 3, 3, 3), Conv((6, 5), padding=1)),
    "stride": ((4, 3, 3, 2), Conv((7, 6), stride=2, padding=1)),
    "stride that does not divide the kernel": ((2, 3, 5), Conv((12,), stride=3, padding="valid")),
    "dilated": ((2, 2, 3), Conv((11,), dilation=2, stride=2, padding=2)),
    "small grid": ((2, 2, 5), Conv((6,), padding="valid")),
    "circular": ((3, 2, 3), Conv((6,), stride=2, boundary="circular")),
    "circular, stride that does not divide": (
        (3, 2, 3),
        Conv((7,), stride=3, dilation=2, boundary="circular"),
    ),
    "wraps": ((2, 3, 5), Conv((3,), boundary="circular")),
    "grouped": ((4, 2, 3), Conv((7,), groups=2)),
    "transposed": ((3, 4, 3), Conv((5,), transposed=True, layout="IO*", stride=2, padding=1)),
    "transposed, cropped": ((3, 4, 5), Conv((2,), transposed=True, layout="IO*", padding=2)),
}


@pytest.mark.parametrize("key", CONVS)
def test_alpha_bounds_the_operator_by_the_reshaped_kernel(
    key: str, rng: np.random.Generator
) -> None:
    shape, geometry = CONVS[key]
    alpha = measures.tsuzuku_alpha(np.empty(shape), geometry)
    assert alpha <= measures.tsuzuku_alpha(np.empty(shape), anywhere(geometry)) * (1 + 1e-12)
    out = Dense(out_axes=(geometry.channel_axes[0],))
    for w in (rng.normal(size=shape), np.ones(shape)):
        reshaped = np.linalg.norm(out.blocks(w)[0], 2)
        operator = np.linalg.norm(oracle.conv_matrix(w, geometry), 2)
        assert operator <= alpha * reshaped * (1 + 1e-12)
    # What it counts: how often one input is read, of a kernel of ones between single channels.
    ones, one = np.ones((1, 1, *shape[2:])), geometry
    if geometry.groups == 1:
        reads = oracle.conv_matrix(ones, one).sum(axis=0).max()
        assert alpha == pytest.approx(math.sqrt(reads))


def anywhere(geometry: Conv) -> Conv:
    import dataclasses

    return dataclasses.replace(geometry, input_shape=None)


def test_alpha_is_the_papers_and_is_met() -> None:
    kernel = np.zeros((3, 1, 3, 3))
    for a in range(3):
        kernel[a, 0, a, a] = 1.0  # three taps of equal size in orthogonal rows
    assert measures.tsuzuku_alpha(kernel, Conv((8, 8))) == 3.0
    assert measures.tsuzuku_alpha(kernel, Conv(None, stride=2)) == 2.0
    assert measures.tsuzuku_alpha(kernel, Conv(None, stride=2, dilation=2)) == 3.0
    assert measures.tsuzuku_alpha(kernel, Conv((3, 3), padding="valid")) == 1.0
    flat = np.ones((1, 1, 3, 3))
    ratio = oracle.spectrum(flat, Conv((8, 8), boundary="circular"))[0] / np.linalg.norm(flat)
    assert ratio == pytest.approx(3.0)
    with pytest.raises(errors.GeometryError, match="Conv"):
        measures.tsuzuku_alpha(np.eye(2), Dense())  # type: ignore[arg-type]
