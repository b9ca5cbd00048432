"""Derivatives of norms, stable ranks and normalised weights, in torch and JAX."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import specops
from specops import Conv, Dense
from specops.geometry import Geometry

torch = pytest.importorskip("torch")
jax = pytest.importorskip("jax")

GEOMETRIES: list[tuple[tuple[int, ...], Geometry]] = [
    ((5, 4), Dense()),
    ((2, 4, 5), Dense(out_axes=(2,), batch_axes=(0,))),
    ((4, 3, 3, 3), Conv((6, 6), boundary="circular")),
    ((4, 2, 3, 3), Conv((6, 4), stride=2, groups=2, boundary="circular")),
    ((3, 4, 3), Conv((4,), transposed=True, stride=2, layout="IO*", boundary="circular")),
    ((4, 3, 3, 3), Conv((5, 6))),
    ((3, 2, 4), Conv((7,), stride=2, padding=1)),
]


def normalised(w: Any, geometry: Geometry) -> Any:
    """The weight over its norm, each matrix of a stack over its own."""
    norm = specops.spectral_norm(w, geometry)
    return w / (norm[:, None, None] if norm.ndim else norm)


FUNCTIONS: dict[str, Callable[[Any, Any, Geometry], Any]] = {
    "norm": lambda w, _, g: specops.spectral_norm(w, g).sum(),
    "stable rank": lambda w, _, g: specops.stable_rank(w, g).sum(),
    "normalised": lambda w, probe, g: (normalised(w, g) * probe).sum(),
}


def torch_gradient(f: Any, w: np.ndarray, probe: np.ndarray, g: Geometry) -> np.ndarray:
    x = torch.tensor(w, requires_grad=True)
    f(x, torch.tensor(probe), g).backward()
    return x.grad.numpy()


def jax_gradient(f: Any, w: np.ndarray, probe: np.ndarray, g: Geometry) -> np.ndarray:
    return np.asarray(jax.jit(jax.grad(lambda x: f(x, probe, g)))(w))


def torch_func_gradient(f: Any, w: np.ndarray, probe: np.ndarray, g: Geometry) -> np.ndarray:
    return torch.func.grad(lambda x: f(x, torch.tensor(probe), g))(torch.tensor(w)).numpy()


def jax_eager_gradient(f: Any, w: np.ndarray, probe: np.ndarray, g: Geometry) -> np.ndarray:
    return np.asarray(jax.grad(lambda x: f(x, probe, g))(jax.numpy.asarray(w)))


GRADIENTS = [torch_gradient, torch_func_gradient, jax_gradient, jax_eager_gradient]


@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize(("shape", "geometry"), GEOMETRIES)
def test_against_finite_differences(
    gradient: Any, name: str, shape: tuple[int, ...], geometry: Geometry
) -> None:
    rng = np.random.default_rng(0)
    w, probe, direction = rng.standard_normal((3, *shape))
    f = FUNCTIONS[name]
    got = (gradient(f, w, probe, geometry) * direction).sum()
    h = 1e-5
    ahead, behind = (float(f(w + s * h * direction, probe, geometry)) for s in (1, -1))
    assert got == pytest.approx((ahead - behind) / (2 * h), rel=1e-6, abs=1e-7)


@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("name", ["norm", "stable rank"])
@pytest.mark.parametrize(
    ("w", "geometry"),
    [
        (np.eye(4), Dense()),
        (np.zeros((4, 3)), Dense()),
        (np.zeros((2, 2, 3, 3)), Conv((4, 4))),
        (np.zeros((2, 2, 3, 3)), Conv((4, 4), boundary="circular")),
        (np.eye(3)[:, :, None], Conv((4,), boundary="circular")),
        (np.eye(3)[:, :, None], Conv((4,))),
    ],
)
def test_finite_at_repeated_values_and_at_zero(
    gradient: Any, name: str, w: np.ndarray, geometry: Geometry
) -> None:
    got = gradient(FUNCTIONS[name], w, w, geometry)
    assert np.isfinite(got).all()
    if name == "norm" and w.any():
        # A subgradient of a norm at W has inner product σ₁ with W.
        assert (got * w).sum() == pytest.approx(float(specops.spectral_norm(w, geometry)))


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
@pytest.mark.parametrize("name", ["norm", "stable rank"])
@pytest.mark.parametrize(("shape", "geometry"), GEOMETRIES)
def test_forward_mode_of_torch(name: str, shape: tuple[int, ...], geometry: Geometry) -> None:
    rng = np.random.default_rng(0)
    w, direction = rng.standard_normal((2, *shape))
    f = FUNCTIONS[name]
    _, got = torch.func.jvp(
        lambda x: f(x, x, geometry), (torch.tensor(w),), (torch.tensor(direction),)
    )
    h = 1e-5
    ahead, behind = (float(f(w + s * h * direction, w, geometry)) for s in (1, -1))
    assert float(got) == pytest.approx((ahead - behind) / (2 * h), rel=1e-6, abs=1e-7)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(torch.tensor(w), torch.tensor(direction))
        _, tangent = torch.autograd.forward_ad.unpack_dual(f(dual, dual, geometry))
        assert float(tangent) == pytest.approx(float(got))


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("boundary", ["circular", "zeros"])
def test_vmap_of_torch(boundary: str) -> None:
    w = torch.randn(3, 4, 2, 3, dtype=torch.float64)
    geometry = Conv((6,), boundary=boundary)
    one_by_one = torch.stack([specops.spectral_norm(k, geometry) for k in w])
    together = torch.func.vmap(lambda k: specops.spectral_norm(k, geometry))(w)
    torch.testing.assert_close(together, one_by_one)
    large = torch.randn(2, 8, 8, 3, dtype=torch.float64)
    geometry = Conv((40,), boundary=boundary)
    one_by_one = torch.stack([specops.spectral_norm(k, geometry) for k in large])
    together = torch.func.vmap(lambda k: specops.spectral_norm(k, geometry))(large)
    torch.testing.assert_close(together, one_by_one, rtol=1e-3, atol=0)


def test_full_spectrum_gradient_of_torch() -> None:
    w = torch.randn(3, 2, 3, 3, dtype=torch.float64, requires_grad=True)
    geometry = Conv((5, 5), boundary="circular")
    specops.singular_values(w, geometry).square().sum().backward()
    # Σσ² = ‖A‖_F² = 25‖K‖²
    torch.testing.assert_close(w.grad, 50 * w.detach())


def test_values_do_not_depend_on_tracking() -> None:
    rng = np.random.default_rng(0)
    for shape, geometry in GEOMETRIES:
        w = rng.standard_normal(shape)
        plain = specops.spectral_norm(torch.tensor(w), geometry)
        tracked = specops.spectral_norm(torch.tensor(w, requires_grad=True), geometry)
        assert tracked.requires_grad
        torch.testing.assert_close(plain, tracked.detach())
        with torch.no_grad():
            quiet = specops.spectral_norm(torch.nn.Parameter(torch.tensor(w)), geometry)
        assert not quiet.requires_grad


def test_vmap_over_kernels() -> None:
    w = np.random.default_rng(0).standard_normal((3, 4, 2, 3))
    geometry = Conv((6,), boundary="circular")
    one_by_one = [float(specops.spectral_norm(k, geometry)) for k in w]
    together = jax.vmap(lambda k: specops.spectral_norm(k, geometry))(w)
    np.testing.assert_allclose(together, one_by_one, rtol=1e-12)
