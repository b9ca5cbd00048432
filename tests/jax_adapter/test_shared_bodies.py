"""Layers that are alike share a compiled body where a rule's numbers are schedules, too."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import specops
import specops_jax
from specops import ClipSpectralNorm, Dense

MAPS = {"*": Dense(out_axes=(-1,))}


def parameters() -> dict[str, Any]:
    rng = np.random.default_rng(0)
    return {name: jnp.asarray(rng.standard_normal((5, 4)), jnp.float32) for name in "abc"}


def falling(step: Any, name: str, geometry: Any) -> Any:
    """Another number for each name and step, at most 1."""
    return (0.4 + 0.2 / step) / (1 + "abc".index(name))


RULES = [
    ClipSpectralNorm(falling),
    specops.ClipAndCut(falling),
    specops.NormalizeIfAbove(falling, norm="reshaped"),
    specops.SpectralSoftCap(falling, norm="reshaped"),
    specops.SpectralHammer(falling, norm="reshaped"),
    specops.ProjectStableRank(ratio=falling, norm="reshaped"),
    specops.SpectralNormalization(norm="reshaped", scale=falling),
    specops.StableRankNormalization(falling, norm="reshaped"),
    specops.SpectralNormPenalty(falling, norm="reshaped"),
]


@pytest.mark.parametrize("rule", RULES, ids=lambda r: type(r).__name__)
def test_one_body_gives_each_layer_its_own_number(
    rule: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    params = parameters()
    state = specops_jax.init(params, rule, MAPS)
    calls, update = [], type(rule).update

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return update(*args, **kwargs)

    def project(params: Any, state: Any) -> Any:
        return specops_jax.project_params(params, rule, state, MAPS)

    with monkeypatch.context() as patched:
        patched.setattr(type(rule), "update", counted)
        compiled = jax.jit(project).lower(params, state).compile()
    assert len(calls) == 1
    expected = params, state
    found = params, state
    for _ in range(2):
        expected, found = project(*expected), compiled(*found)
    for a, b in zip(jax.tree.leaves(found[0]), jax.tree.leaves(expected[0]), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-6)
    for name, figures in expected[1].figures.items():
        for key, value in figures.items():
            np.testing.assert_allclose(
                found[1].figures[name][key], value, rtol=1e-4, atol=1e-5, err_msg=f"{name} {key}"
            )


@dataclass(frozen=True, repr=False)
class AtTheNext(ClipSpectralNorm):
    """A rule of others that asks its schedule itself."""

    def update(
        self, weight: Any, geometry: Any, state: Any, *, step: Any = 1, name: str = ""
    ) -> Any:
        """Scale by the number of the next step."""
        assert callable(self.max_norm)
        return weight * self.max_norm(step + 1, name, geometry), state, {}


def test_a_rule_of_others_keeps_its_schedule() -> None:
    rule, params = AtTheNext(falling), parameters()
    state = specops_jax.init(params, rule, MAPS)
    new, _ = jax.jit(lambda p, s: specops_jax.project_params(p, rule, s, MAPS))(params, state)
    for name, w in params.items():
        np.testing.assert_allclose(new[name], w * falling(2, name, None), rtol=1e-6)


@dataclass(frozen=True, repr=False)
class Linear(specops.SpectralNormPenalty):
    """A rule of others with a term of its own, which asks its schedule itself."""

    def penalty(
        self, weight: Any, geometry: Any, state: Any, *, step: Any = 1, name: str = ""
    ) -> Any:
        """λ·Σ W."""
        assert callable(self.strength)
        number = self.strength(step, name, geometry)
        return number * weight.sum(), number * jnp.ones_like(weight)


def test_a_term_of_others_keeps_its_schedule() -> None:
    rule, params = Linear(falling, norm="reshaped"), parameters()
    state = specops_jax.init(params, rule, MAPS)
    terms = jax.jit(jax.grad(lambda p, s: specops_jax.penalty(p, rule, s, MAPS)))(params, state)
    for name, term in terms.items():
        np.testing.assert_allclose(term, falling(1, name, None), rtol=1e-6)


def test_starts_of_layers_that_are_alike_share_a_body(monkeypatch: pytest.MonkeyPatch) -> None:
    rule, params = ClipSpectralNorm(1.0), parameters()
    expected = specops_jax.init(params, rule, MAPS)
    calls, watch = [], ClipSpectralNorm.watch

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return watch(*args, **kwargs)

    with monkeypatch.context() as patched:
        patched.setattr(ClipSpectralNorm, "watch", counted)
        compiled = jax.jit(lambda p: specops_jax.init(p, rule, MAPS)).lower(params).compile()
    assert len(calls) == 1
    found = compiled(params)
    for name in params:
        for key in ("watched.u0", "watched.v0", "seen"):
            a, b = found.rules[name][key], expected.rules[name][key]
            np.testing.assert_allclose(np.abs(a), np.abs(b), atol=1e-5, err_msg=f"{name} {key}")


def test_terms_of_layers_that_are_alike_share_a_body(monkeypatch: pytest.MonkeyPatch) -> None:
    rule, params = specops.SpectralNormPenalty(falling, norm="reshaped"), parameters()
    state = specops_jax.init(params, rule, MAPS)
    calls, update = [], specops.SpectralNormPenalty.update

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return update(*args, **kwargs)

    with monkeypatch.context() as patched:
        patched.setattr(specops.SpectralNormPenalty, "update", counted)
        term = jax.jit(jax.value_and_grad(lambda p: specops_jax.penalty(p, rule, state, MAPS)))
        compiled = term.lower(params).compile()
    assert len(calls) == 1
    value, gradients = compiled(params)
    total = 0.0
    for name, w in params.items():
        u, s, vh = np.linalg.svd(np.asarray(w, np.float64))
        total += 0.5 * falling(1, name, None) * s[0] ** 2
        expected = falling(1, name, None) * s[0] * np.outer(u[:, 0], vh[0])
        np.testing.assert_allclose(gradients[name], expected, atol=1e-5)
    assert float(value) == pytest.approx(total, rel=1e-5)
