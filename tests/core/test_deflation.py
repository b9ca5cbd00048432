"""Leading triplets one after another: of layers that are too large to be decomposed."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

import specops
from specops import Conv, arrays
from specops.linalg.deflation import triplets_by_deflation
from specops.maps.convolution import ConvOperator
from tests import oracle
from tests.backends import Backend
from tests.core.test_more_spectra import check_triplets
from tests.strategies import Case, convolutions


def by_deflation(w: np.ndarray, geometry: Conv, k: int) -> tuple[np.ndarray, ...]:
    operator = ConvOperator(geometry.kernel(w), geometry.sizes(w.shape))
    noise = arrays.start_vector("test", operator.shape[1] * k).reshape(-1, k).astype(w.dtype)
    return triplets_by_deflation(np, operator, noise, k)


@given(convolutions(), st.integers(1, 6))
def test_any_layer_against_its_explicit_matrix(case: Case, count: int) -> None:
    w, geometry = case.weight(), case.geometry
    sigma = oracle.spectrum(w, geometry)
    k = min(count, sigma.size)
    assume(k > 0 and not geometry.transposed)
    u, s, v = by_deflation(w, geometry, k)
    check_triplets(oracle.conv_matrix(w, geometry), u, s, v, sigma[:k], 1e-8)


@pytest.mark.parametrize("groups", [1, 4])
def test_equal_values_are_found_as_often_as_they_are_there(groups: int) -> None:
    """A Krylov space of one vector holds one vector of each."""
    kernel = np.zeros((4, 4 // groups, 3))
    for i in range(4):
        kernel[i, i % kernel.shape[1], 1] = 1.0
    geometry = Conv((5,), groups=groups)
    expected = oracle.spectrum(kernel, geometry)[:7]
    u, s, v = by_deflation(kernel, geometry, 7)
    check_triplets(oracle.conv_matrix(kernel, geometry), u, s, v, expected, 1e-12)


def test_zeros_have_orthonormal_triplets() -> None:
    u, s, v = by_deflation(np.zeros((3, 2, 3)), Conv((6,)), 3)
    check_triplets(np.zeros((18, 12)), u, s, v, np.zeros(3), 1e-12)


@pytest.mark.slow
@pytest.mark.parametrize(
    "geometry",
    [
        Conv((12, 11)),
        Conv((23, 22), stride=2, groups=2),
        Conv((11, 11), transposed=True, stride=2),
        Conv((23, 22), boundary="circular", stride=3),
    ],
    ids=str,
)
@pytest.mark.parametrize("complex_weight", [False, True])
def test_large_layers(geometry: Conv, complex_weight: bool) -> None:
    rng = np.random.default_rng(0)
    w = rng.standard_normal((8, 8 // geometry.groups, 3, 3))
    if complex_weight:
        w = w + 1j * rng.standard_normal(w.shape)
    matrix = oracle.conv_matrix(w, geometry)
    assert matrix.size > 2**20
    sigma = np.linalg.svd(matrix, compute_uv=False)
    u, s, v = specops.top_singular_triplets(w, 3, geometry)
    check_triplets(matrix, u, s, v, sigma[:3], 1e-8)
    np.testing.assert_allclose(s, sigma[:3], rtol=1e-13)


@pytest.mark.slow
def test_large_layers_on_every_backend(eager: Backend) -> None:
    w = np.random.default_rng(0).standard_normal((5, 4, 3, 3)).astype(np.float32)
    geometry = Conv((16, 17))
    matrix = oracle.conv_matrix(w, geometry)
    assert matrix.size > 2**20
    weight = eager.array(w)
    found = specops.top_singular_triplets(weight, 3, geometry)
    for array in found:
        eager.same_kind(array, weight)
    expected = np.linalg.svd(matrix, compute_uv=False)[:3]
    check_triplets(matrix, *(eager.numpy(a) for a in found), expected, 1e-5)
    np.testing.assert_allclose(eager.numpy(found[1]), expected, rtol=1e-6)


def test_products_that_close_values_take(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of large grids come in pairs 1e-8 of σ₁ apart, where a block takes thousands."""
    products = 0
    plain = ConvOperator.rmatvec

    def counted(self: ConvOperator, y: np.ndarray) -> np.ndarray:
        nonlocal products
        products += int(np.prod(y.shape[:-1]))
        return plain(self, y)

    monkeypatch.setattr(ConvOperator, "rmatvec", counted)
    w = np.random.default_rng(0).standard_normal((16, 16, 3, 3))
    specops.top_singular_triplets(w, 3, Conv((32, 32)))
    assert products < 800


@pytest.mark.slow
def test_values_of_large_layers_are_differentiable() -> None:
    """By their vectors as constants: ∂σ/∂W = u vᴴ on the entries of the weight."""
    torch = pytest.importorskip("torch")
    w = np.random.default_rng(0).standard_normal((5, 4, 3, 3))
    geometry = Conv((16, 17))
    weight = torch.tensor(w, requires_grad=True)
    _, s, _ = specops.top_singular_triplets(weight, 2, geometry)
    s.sum().backward()
    direction = np.random.default_rng(1).standard_normal(w.shape)
    ends = [oracle.spectrum(w + h * direction, geometry)[:2].sum() for h in (1e-5, -1e-5)]
    slope = (ends[0] - ends[1]) / 2e-5
    assert float((weight.grad.numpy() * direction).sum()) == pytest.approx(slope, rel=1e-6)
    plain = specops.top_singular_triplets(w, 2, geometry)[1]
    np.testing.assert_allclose(s.detach().numpy(), plain, rtol=1e-13)
