"""The caps by their singular values: normalise if above, soft cap, hammer."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from specops import (
    Conv,
    Dense,
    NormalizeIfAbove,
    SpectralHammer,
    SpectralSoftCap,
    errors,
)
from tests import oracle
from tests.backends import Backend
from tests.core.laws import (
    GEOMETRIES,
    flat,
    outcome,
    weight,
)


def with_values(values: Any) -> tuple[np.ndarray, ...]:
    """(w, u, v) with w = u·diag(values)·vᵀ of shape (5, 4)."""
    u, _, vh = np.linalg.svd(weight((5, 4)), full_matrices=False)
    return (u * np.asarray(values)) @ vh, u, vh.T


def test_normalize_if_above(backend: Backend) -> None:
    def fire(x: Any) -> Any:
        return outcome(NormalizeIfAbove(1.0, norm="operator"), x, Dense())

    for top in (3.0, 1.0, 0.4):
        w, _, _ = with_values([top, 0.3, 0.2, 0.0])
        given = backend.array(w, "float32")
        got, _, figures = backend.call(fire, given)
        np.testing.assert_allclose(backend.numpy(got), w * min(1.0, 1.0 / top), atol=2e-6)
        np.testing.assert_allclose(flat(backend, figures), [min(top, 1.0), top], rtol=1e-5)
        assert backend.traced or top > 0.5 or got is given


@pytest.mark.parametrize("kind", [NormalizeIfAbove, SpectralSoftCap, SpectralHammer])
@pytest.mark.parametrize("geometry", [Dense(), Conv((6, 6))], ids=["dense", "conv"])
@pytest.mark.filterwarnings("ignore:overflow encountered")
def test_norms_beyond_the_precision_are_refused(kind: Any, geometry: Any) -> None:
    """A quotient by infinity would be zeros."""
    shape = (8, 8) if isinstance(geometry, Dense) else (8, 8, 3, 3)
    w = np.full(shape, 1e38, np.float32)
    rule = kind(1.0, norm="reshaped")
    with pytest.raises(errors.NonFiniteError, match="beyond float32"):
        outcome(rule, w, geometry)


def test_normalize_if_above_for_every_size() -> None:
    w = weight((4, 3, 3))
    got = outcome(NormalizeIfAbove(1.0, norm="operator"), w, Conv(None))[0]
    assert 0.95 <= oracle.spectrum(got, Conv((64,), boundary="circular"))[0] <= 1.0
    np.testing.assert_allclose(got / w, (got / w).flat[0])


def soft_capped(x: Any) -> Any:
    """Of one name, so that it is compiled once."""
    return outcome(SpectralSoftCap(1.0, norm="reshaped"), x, Dense())


@pytest.mark.parametrize("top", [1.1, 1.6, 8.0, 50.0, 1e15])
def test_soft_cap(backend: Backend, top: float) -> None:
    values = np.array([top, 0.9 * top, 0.5, 0.01])
    w, u, v = with_values(values)
    got, _, figures = backend.call(soft_capped, backend.array(w, "float32"))
    turned = u.T @ backend.numpy(got).astype(np.float64) @ v
    after = np.diag(turned)
    assert np.linalg.norm(turned, 2) == pytest.approx(1.0, abs=1e-5)
    assert np.linalg.norm(turned, 2) <= 1.0 + 1e-6
    np.testing.assert_allclose(flat(backend, figures), [1.0, top], rtol=1e-5)
    # Small values drown in the rounding of large ones before those are pressed.
    rounding = 1e-6 * top
    if top < 100.0:
        np.testing.assert_allclose(turned - np.diag(after), 0.0, atol=5 * rounding)
        assert (np.diff(after) <= rounding).all()
    if top < 2.0:
        # x ↦ x − 3α²x⁵ + …, with α ≤ 1/(3σ₁²)
        np.testing.assert_allclose(after[3], values[3], rtol=1e-4, atol=rounding)
        assert values[2] - 0.05 < after[2] <= values[2] + rounding
    # Once inside, nothing moves.
    inside = backend.array(w / (1.01 * top), "float32")
    np.testing.assert_array_equal(
        backend.numpy(backend.call(soft_capped, inside)[0]), backend.numpy(inside)
    )


def test_soft_cap_refuses_an_operator() -> None:
    rule = SpectralSoftCap(1.0, norm="operator")
    assert "reshaped" in rule.obstacle(Conv((5,)))
    assert rule.obstacle(Dense()) == ""
    with pytest.raises(errors.UnsupportedGeometryError, match="reshaped"):
        outcome(rule, weight((4, 3, 3)), Conv((5,)))


def test_hammer_moves_one_value(backend: Backend) -> None:
    def fire(x: Any) -> Any:
        return outcome(SpectralHammer(1.5, norm="operator"), x, Dense())

    values = [4.0, 2.5, 0.8, 0.1]
    w, u, v = with_values(values)
    got, _, figures = backend.call(fire, backend.array(w, "float32"))
    turned = u.T @ backend.numpy(got).astype(np.float64) @ v
    np.testing.assert_allclose(turned, np.diag([1.5, *values[1:]]), atol=5e-6)
    np.testing.assert_allclose(flat(backend, figures), [1.5, 4.0], rtol=1e-5)
    calm = backend.array(w / 4.0, "float32")
    after = backend.call(fire, calm)[0]
    np.testing.assert_array_equal(backend.numpy(after), backend.numpy(calm))
    assert backend.traced or after is calm


def test_the_hammer_tells_the_bound_however_far_below_it_is(backend: Backend) -> None:
    rule = SpectralHammer(2.0**-40, norm="operator")
    w = backend.array(np.diag([4.0, 1.0]), "float32")
    figures = backend.call(lambda x: outcome(rule, x, Dense()), w)[2]
    np.testing.assert_allclose(flat(backend, figures), [2.0**-40, 4.0], rtol=1e-6)


@pytest.mark.parametrize("key", ["circular", "zeros", "transposed"])
def test_hammer_on_an_operator(key: str) -> None:
    shape, geometry = GEOMETRIES[key]
    assert isinstance(geometry, Conv)
    w = weight(shape)
    rule = SpectralHammer(1.0, norm="operator")
    state = rule.init(w, geometry, "w")
    for _ in range(100):
        got, state, _ = rule.update(w, geometry, state)
    u, s, vh = np.linalg.svd(oracle.conv_matrix(w, geometry))
    assert u[:, 0] @ oracle.conv_matrix(got, geometry) @ vh[0] == pytest.approx(1.0, abs=1e-6)
    # Of all kernels for which that holds it is the nearest: it moved along the gradient.
    along = (w - got) / np.linalg.norm(w - got)
    ahead, behind = (oracle.spectrum(w + h * along, geometry)[0] for h in (1e-5, -1e-5))
    steepest = (s[0] - 1.0) / np.linalg.norm(w - got)
    assert (ahead - behind) / 2e-5 == pytest.approx(steepest, rel=1e-6)


@pytest.mark.parametrize("top", [0.9, 1.1, 1.25, 2.0, 80.0])
def test_derivatives_of_the_soft_cap_are_those_of_what_it_computes(top: float) -> None:
    """The least α depends on the norm; one round, several, and scaled down before."""
    torch = pytest.importorskip("torch")
    rule = SpectralSoftCap(1.0, norm="reshaped")
    w, along = weight((6, 5)), np.cos(np.arange(30.0)).reshape(6, 5)
    w = w * (top / np.linalg.norm(w, 2))

    def value(t: float) -> float:
        return float((rule.update(w + t * along, Dense(), {})[0] * along).sum())

    x = torch.tensor(w, requires_grad=True)
    (rule.update(x, Dense(), {})[0] * torch.tensor(along)).sum().backward()
    wanted = (value(1e-6) - value(-1e-6)) / 2e-6
    assert float((x.grad * torch.tensor(along)).sum()) == pytest.approx(wanted, rel=1e-6)
