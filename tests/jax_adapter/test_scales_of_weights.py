"""Weights of zeros, and at both ends of single precision, in what the loss uses and adds."""

from __future__ import annotations

from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import specops
import specops_jax
from specops import Conv, Dense
from tests.oracle import conv_matrix

optax = pytest.importorskip("optax")

CONV = Conv((6, 5), layout="*IO")
GEOMETRIES = {"matrix": Dense(), "stack": Dense(out_axes=(1,), batch_axes=(0,)), "conv": CONV}
SHAPES = {"matrix": (4, 6), "stack": (2, 3, 4), "conv": (3, 3, 2, 2)}
SCALES = (0.0, 1e-37, 1e37)
RULES = [
    specops.SpectralNormalization(norm="operator"),
    specops.SpectralNormalization(norm="bidirectional"),
    specops.StableRankNormalization(0.5, norm="reshaped"),
]


def parameters(scale: float) -> dict[str, Any]:
    rng, tiny = np.random.default_rng(0), np.finfo(np.float32).tiny
    drawn = {k: scale * rng.normal(size=s) for k, s in SHAPES.items()}
    # XLA reads subnormal numbers as zeros.
    normal = {k: np.where(np.abs(x) < tiny, 0.0, x) for k, x in drawn.items()}
    return {k: jnp.asarray(x, jnp.float32) for k, x in normal.items()}


def norms(params: Any, norm: str) -> list[float]:
    """Those that a rule means, of explicit matrices in double precision."""
    held = {k: np.asarray(x, np.float64) for k, x in params.items()}
    kernel = held["conv"]
    reshaped = [np.moveaxis(kernel, axis, 0).reshape(kernel.shape[axis], -1) for axis in (-1, -2)]
    own = [conv_matrix(kernel, CONV)] if norm == "operator" else reshaped
    of_conv = [float(np.linalg.norm(m, 2)) for m in own]
    mean = sum(of_conv) / len(of_conv) if norm != "reshaped" else of_conv[0]
    matrices = [held["matrix"], *held["stack"]]
    return [*(float(np.linalg.norm(m, 2)) for m in matrices), mean]


@pytest.mark.parametrize("rule", RULES, ids=lambda r: f"{type(r).__name__}-{r.norm}")
def test_weights_in_use_at_every_scale(rule: Any) -> None:
    rng = np.random.default_rng(1)
    along = {k: jnp.asarray(rng.normal(size=s), jnp.float32) for k, s in SHAPES.items()}

    @jax.jit
    def advance(params: Any, state: Any) -> Any:
        return specops_jax.project_params(params, rule, state, GEOMETRIES)[1]

    def use(params: Any, state: Any) -> tuple[Any, Any]:
        used = specops_jax.normalize_params(params, rule, state, GEOMETRIES)
        return sum(jnp.sum(along[k] * x) for k, x in used.items()), used

    both = jax.jit(jax.value_and_grad(use, has_aux=True))
    for scale in SCALES:
        params = parameters(scale)
        state = specops_jax.init(params, rule, GEOMETRIES)
        for _ in range(10):
            state = advance(params, state)
        specops_jax.check(state)
        (_, used), gradients = both(params, state)
        for x in jax.tree.leaves((state, used, gradients)):
            assert bool(jnp.all(jnp.isfinite(x)))
        if scale == 0.0:
            assert all(bool(jnp.all(x == 0)) for x in used.values())
        else:
            np.testing.assert_allclose(norms(used, rule.norm), 1.0, rtol=1e-2)


@cache
def penalty(norm: Any, strength: float) -> tuple[Any, Any]:
    """(how its state starts, how it updates, compiled)."""
    rule = specops.SpectralNormPenalty(strength, norm=norm)
    transform = specops_jax.add_penalty(rule, GEOMETRIES)
    return transform.init, jax.jit(transform.update)


@pytest.mark.parametrize("norm", ["operator", "bidirectional"])
@pytest.mark.parametrize(("scale", "strength"), [(0.0, 10.0), (1e-37, 10.0), (1e37, 0.1)])
def test_penalties_at_every_scale(norm: Any, scale: float, strength: float) -> None:
    params = parameters(scale)
    init, update = penalty(norm, strength)
    state = init(params)
    zeros = jax.tree.map(jnp.zeros_like, params)
    for _ in range(10):
        terms, state = update(zeros, state, params)
    specops_jax.check(state)
    for x in jax.tree.leaves((terms, state.rules)):
        assert bool(jnp.all(jnp.isfinite(x)))
    for w, term in zip(
        [params["matrix"], *params["stack"]], [terms["matrix"], *terms["stack"]], strict=True
    ):
        u, s, vh = np.linalg.svd(np.asarray(w, np.float64))
        expected = strength * s[0] * np.outer(u[:, 0], vh[0])
        np.testing.assert_allclose(term, expected, rtol=0, atol=1e-2 * strength * s[0])
    # The norm is linear along the weight itself: the slope of λσ²/2 is λσ².
    kernel, term = (np.asarray(x["conv"], np.float64) for x in (params, terms))
    sigma = norms(params, norm)[-1]
    assert np.sum(term * kernel) == pytest.approx(strength * sigma**2, rel=2e-2)
