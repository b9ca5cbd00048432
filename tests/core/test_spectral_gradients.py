"""Derivatives of spectral functions, at repeated singular values too, in torch and JAX."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import specops
from specops import Conv, Dense

torch = pytest.importorskip("torch")
jax = pytest.importorskip("jax")

STACK = Dense(out_axes=(1,), batch_axes=(0,))
FUNCTIONS: dict[str, Callable[[Any], Any]] = {
    "ball": lambda w: specops.project_spectral_ball(w, 2.0, STACK),
    "nuclear ball": lambda w: specops.project_schatten_ball(w, 2.5, STACK, p=1),
    "Frobenius ball": lambda w: specops.project_schatten_ball(w, 2.5, STACK, p=2),
    "polar": lambda w: specops.polar_factor(w, STACK),
    "between": lambda w: specops.clip_singular_values(w, 1.5, 2.5, STACK),
    "at least": lambda w: specops.clip_singular_values(w, 1.5, math.inf, STACK),
    "stable rank": lambda w: specops.project_stable_rank(w, STACK, target=1.2),
}


def stack(shape: tuple[int, int], *spectra: list[float]) -> np.ndarray:
    """Repeated values above, inside and below the bounds, generic ones and small ones."""
    rng = np.random.default_rng(0)
    spectra = spectra or ([4, 3, 3], [3, 1, 1], [3, 2.25, 1.75], [1, 0.5, 0.5], [4, 0.1, 0.1])
    u, v = (np.linalg.qr(rng.standard_normal((len(spectra), side, 3)))[0] for side in shape)
    return (u * np.array(spectra)[:, None, :]) @ np.swapaxes(v, 1, 2)


def by_torch(f: Any, w: np.ndarray, m: np.ndarray) -> np.ndarray:
    x = torch.tensor(w, requires_grad=True)
    (f(x) * torch.tensor(m)).sum().backward()
    return x.grad.numpy()


def by_torch_func(f: Any, w: np.ndarray, m: np.ndarray) -> np.ndarray:
    return torch.func.grad(lambda x: (f(x) * torch.tensor(m)).sum())(torch.tensor(w)).numpy()


def differences(f: Any, w: np.ndarray, m: np.ndarray, h: float = 1e-6) -> np.ndarray:
    """Of every entry, the same one in all matrices of the stack at once."""
    result = np.zeros_like(w)
    for i in np.ndindex(w.shape[1:]):
        for step in (h, -h):
            moved = w.copy()
            moved[(slice(None), *i)] += step
            product = (f(moved) * m).reshape(len(w), -1).sum(axis=1)
            result[(slice(None), *i)] += product / (2 * step)
    return result


@pytest.mark.parametrize("gradient", [by_torch, by_torch_func])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_of_torch_against_finite_differences(gradient: Any, name: str) -> None:
    f = FUNCTIONS[name]
    for shape in ((4, 3), (3, 3), (3, 5)):
        w, m = stack(shape), np.random.default_rng(1).standard_normal((5, *shape))
        np.testing.assert_allclose(gradient(f, w, m), differences(f, w, m), atol=1e-6, rtol=1e-6)


def test_of_a_stable_rank_with_two_triplets_kept() -> None:
    w, m = stack((5, 4), [4, 3, 1]), np.random.default_rng(1).standard_normal((1, 5, 4))
    for options in ({"target": 1.6, "preserve": 2}, {"ratio": 0.3, "preserve": 1}):

        def f(x: Any, options: Any = options) -> Any:
            return specops.project_stable_rank(x, STACK, **options)

        np.testing.assert_allclose(by_torch(f, w, m), differences(f, w, m), atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(("compiled", "name"), [(True, "nuclear ball"), (False, "polar")])
def test_of_jax_against_finite_differences(compiled: bool, name: str) -> None:
    f, w, m = FUNCTIONS[name], stack((4, 3)), np.random.default_rng(1).standard_normal((5, 4, 3))
    gradient = jax.grad(lambda x: (f(x) * m).sum())
    got = (jax.jit(gradient) if compiled else gradient)(jax.numpy.asarray(w))
    np.testing.assert_allclose(got, differences(f, w, m), atol=1e-6, rtol=1e-6)


def test_of_jax_agrees_with_torch() -> None:
    w, m = stack((4, 3)), np.random.default_rng(1).standard_normal((5, 4, 3))
    names = ["polar", "between", "stable rank"]

    def totals(x: Any) -> Any:
        return [(FUNCTIONS[name](x) * m).sum() for name in names]

    found = jax.jit(jax.jacrev(totals))(jax.numpy.asarray(w))
    for name, got in zip(names, found, strict=True):
        wanted = by_torch(FUNCTIONS[name], w, m)
        np.testing.assert_allclose(got, wanted, atol=1e-9, err_msg=name)


def test_of_complex_matrices() -> None:
    rng = np.random.default_rng(0)
    w = np.diag([3.0, 3, 1]) + 0j
    u, v = (np.linalg.qr(rng.standard_normal((3, 3)) + 1j * rng.standard_normal((3, 3)))[0],) * 2
    w, direction = u @ w @ v, rng.standard_normal((3, 3)) + 1j * rng.standard_normal((3, 3))
    m, h = rng.standard_normal((3, 3)), 1e-6
    for f in (lambda x: specops.project_spectral_ball(x, 2.0), specops.polar_factor):
        x = torch.tensor(w, requires_grad=True)
        (f(x).real * torch.tensor(m)).sum().backward()
        got = (x.grad.numpy().conj() * direction).sum().real
        ahead, behind = ((f(w + s * h * direction).real * m).sum() for s in (1, -1))
        assert got == pytest.approx((ahead - behind) / (2 * h), rel=1e-6)


@pytest.mark.parametrize("boundary", ["circular", "zeros"])
def test_of_kernels_whose_blocks_repeat_values(boundary: str) -> None:
    kernel = 3.0 * np.eye(3)[:, :, None] * np.array([0.0, 1, 0])
    geometry = Conv((4,), boundary=boundary, padding="same")
    x = torch.tensor(kernel, requires_grad=True)
    specops.project_spectral_ball(x, 2.0, geometry)[0, 1, 1].backward()
    assert torch.isfinite(x.grad).all()
    if boundary == "circular":
        x.grad = None
        specops.clip_singular_values(x, 0.0, 2.0, geometry)[0, 1, 1].backward()
        # Of a multiple of the identity, as of matrices: what is antisymmetric turns.
        assert x.grad[0, 1, 1].item() == pytest.approx(1 / 3)
        assert x.grad[1, 0, 1].item() == pytest.approx(-1 / 3)


@pytest.mark.parametrize("boundary", ["circular", "zeros"])
def test_of_the_stable_rank_of_kernels_whose_values_repeat(boundary: str) -> None:
    # Channels of three kinds, two of them equal.
    kernel = np.einsum("o,oi,a->oia", [3.0, 1, 1], np.eye(3), [0.2, 1, 0.3])
    geometry = Conv((4,), boundary=boundary, padding="same")
    m = np.random.default_rng(1).standard_normal(kernel.shape)

    def f(x: Any) -> Any:
        return specops.project_stable_rank(x, geometry, target=2.2)

    assert not np.allclose(f(kernel), kernel)
    wanted = differences(lambda w: f(w[0])[None], kernel[None], m[None])
    np.testing.assert_allclose(by_torch(f, kernel, m), wanted[0], atol=1e-6)


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_forward_mode_and_vmap_agree_with_backward() -> None:
    w, direction = stack((3, 4)), np.random.default_rng(2).standard_normal((5, 3, 4))
    for f in (FUNCTIONS["ball"], FUNCTIONS["nuclear ball"]):
        m = np.random.default_rng(1).standard_normal((5, 3, 4))
        wanted = (by_torch(f, w, m) * direction).sum()
        _, got = torch.func.jvp(f, (torch.tensor(w),), (torch.tensor(direction),))
        assert float((got * torch.tensor(m)).sum()) == pytest.approx(wanted)
    one = torch.func.vmap(torch.func.grad(lambda x: specops.polar_factor(x)[0, 0]))
    many = torch.func.grad(lambda x: specops.polar_factor(x, STACK)[:, 0, 0].sum())
    torch.testing.assert_close(one(torch.tensor(w)), many(torch.tensor(w)))


def test_second_derivatives_where_values_differ() -> None:
    w = torch.tensor(np.diag([3.0, 2.5, 1.0]) + 0.1, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda x: specops.project_spectral_ball(x, 2.0), (w,))


def test_of_weights_whose_squares_underflow() -> None:
    for f in (
        lambda x: specops.spectral_norm(x),
        lambda x: specops.stable_rank(x) * 1e-20,
        lambda x: specops.project_spectral_ball(x, 2e-20).sum(),
    ):
        w = np.diag([3.0, 1, 1]) + 0.1
        x = torch.tensor(w * 1e-20, dtype=torch.float32, requires_grad=True)
        f(x).backward()
        large = torch.tensor(w, dtype=torch.float64, requires_grad=True)
        scaled = f(large * 1e-20)
        (scaled * 1e20).backward()
        torch.testing.assert_close(x.grad, large.grad.float(), rtol=1e-5, atol=1e-6)
