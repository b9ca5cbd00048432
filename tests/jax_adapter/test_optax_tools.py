"""What optax does to transformations from outside: states mapped, hyperparameters injected."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import specops
import specops_jax
from specops import ClipSpectralNorm, Conv, Dense
from specops.errors import NonFiniteError
from tests.oracle import conv_matrix

optax = pytest.importorskip("optax")

CONV = Conv((6, 5), layout="*IO")
GEOMETRIES = {"a": Dense(), "b": Dense(), "conv": CONV}
Norms = tuple[float, float, float]


def parameters(dtype: Any = jnp.float32) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    shapes = {"a": (4, 6), "b": (4, 6), "conv": (3, 3, 2, 2), "bias": (3,)}
    return {k: jnp.asarray(3 * rng.normal(size=shape), dtype) for k, shape in shapes.items()}


def values(params: Any) -> list[np.ndarray]:
    """All singular values of the explicit matrices."""
    a, b, kernel = (np.asarray(params[k], np.float64) for k in ("a", "b", "conv"))
    return [np.linalg.svd(m, compute_uv=False) for m in (a, b, conv_matrix(kernel, CONV))]


def norms(params: Any) -> list[float]:
    return [float(s[0]) for s in values(params)]


def clip(max_norm: Any) -> Any:
    return specops_jax.constrain(ClipSpectralNorm(max_norm), GEOMETRIES)


def penalty() -> Any:
    rule = specops.SpectralNormPenalty(0.1, norm="operator")
    return specops_jax.add_penalty(rule, GEOMETRIES)


MAPPED: dict[str, Callable[[], Any]] = {
    "chain": lambda: optax.chain(penalty(), optax.adam(0.1), clip(1.0)),
    "several steps": lambda: optax.MultiSteps(optax.chain(optax.adam(0.1), clip(1.0)), 2),
    "masked": lambda: optax.chain(
        optax.adam(0.1),
        optax.masked(clip(1.0), {"a": True, "b": True, "conv": True, "bias": False}),
    ),
    "injected": lambda: optax.chain(
        optax.adam(0.1), optax.inject_hyperparams(clip)(lambda step: 1.0)
    ),
}


@pytest.mark.parametrize("kind", MAPPED)
def test_mapping_over_params_maps_moments_and_leaves_our_state(kind: str) -> None:
    transform, params = MAPPED[kind](), parameters()
    state = transform.init(params)
    update = jax.jit(transform.update)
    _, state = update(params, state, params)
    _, state = update(params, state, params)
    mapped = optax.tree.map_params(transform, lambda x: 2 * x, state)
    assert jax.tree.structure(mapped) == jax.tree.structure(state)
    for moment in ("mu", "nu"):
        given, found = (optax.tree.get(s, moment) for s in (state, mapped))
        assert max(float(jnp.max(jnp.abs(x))) for x in jax.tree.leaves(given)) > 0
        jax.tree.map(lambda a, b: np.testing.assert_array_equal(b, 2 * a), given, found)
    for index in range(2 if kind == "chain" else 1):
        given, found = (specops_jax.find_state(s, index) for s in (state, mapped))
        assert int(given.step) > 0
        jax.tree.map(np.testing.assert_array_equal, given, found)
    jax.tree.map(np.testing.assert_array_equal, mapped, optax.tree.map_params(
        transform, lambda x, factor: factor * x, state, jax.tree.map(lambda _: 2.0, params)
    ))  # fmt: skip


def test_what_is_no_param_is_mapped_by_fields() -> None:
    transform, params = optax.chain(optax.adam(0.1), clip(1.0)), parameters()
    shapes = jax.eval_shape(transform.init, params)
    specs = optax.tree.map_params(
        transform,
        lambda _: "as the parameter",
        shapes,
        transform_non_params=lambda x: jax.tree.map(lambda _: "replicated", x),
    )
    assert jax.tree.structure(specs) == jax.tree.structure(shapes)
    assert set(jax.tree.leaves(specs[1])) == {"replicated"}
    assert set(jax.tree.leaves(specs[0][0].mu)) == {"as the parameter"}


def test_empty_parameters_are_still_refused() -> None:
    with pytest.raises(specops.errors.AdapterError, match="no array"):
        clip(1.0).init({})


BOUNDS = (2.0, 0.5, 1.0, 0.25)


def by_table(step: Any) -> Any:
    return jnp.asarray(BOUNDS)[step]


def above(max_norm: Any) -> Any:
    rule = specops.NormalizeIfAbove(max_norm, norm="operator")
    return specops_jax.constrain(rule, GEOMETRIES)


def hammer(max_norm: Any) -> Any:
    rule = specops.SpectralHammer(max_norm, norm="operator")
    return specops_jax.constrain(rule, GEOMETRIES)


def soft(max_norm: Any) -> Any:
    rule = specops.SpectralSoftCap(max_norm, norm="operator")
    return specops_jax.constrain(rule, {k: GEOMETRIES[k] for k in ("a", "b")})


def steps(transform: Any, compiled: bool, count: int) -> tuple[list[Any], int]:
    """(what each step makes of the same parameters, how often the step was traced)."""
    params, traces, found = parameters(), [], []

    def update(params: Any, state: Any) -> Any:
        traces.append(1)
        updates, state = transform.update(jax.tree.map(jnp.zeros_like, params), state, params)
        return optax.apply_updates(params, updates), state

    step, state = jax.jit(update) if compiled else update, transform.init(params)
    for _ in range(count):
        new, state = step(params, state)
        found.append(new)
    specops_jax.check(specops_jax.find_state(state))
    return found, len(traces)


@pytest.mark.parametrize("compiled", [True, False], ids=["jit", "eager"])
@pytest.mark.parametrize("make", [clip, above, soft])
def test_an_injected_bound_follows_its_schedule(make: Any, compiled: bool) -> None:
    transform = optax.inject_hyperparams(make)(by_table)
    count = len(BOUNDS) if compiled else 2
    found, traces = steps(transform, compiled, count)
    for new, bound in zip(found, BOUNDS, strict=False):
        for norm in norms(new)[: 2 if make is soft else 3]:
            # A zero-padded layer is clipped on the torus that contains it.
            assert (0.9 if make is clip else 1 - 1e-4) * bound <= norm <= bound * (1 + 1e-5)
        np.testing.assert_array_equal(new["bias"], parameters()["bias"])
    assert traces == (1 if compiled else count)


def test_an_injected_bound_of_a_struck_value_follows_its_schedule() -> None:
    found, traces = steps(optax.inject_hyperparams(hammer)(by_table), True, 4)
    before = np.sort(values(parameters())[0])
    for new, bound in zip(found, BOUNDS, strict=True):
        expected = np.sort([*before[:-1], bound])
        np.testing.assert_allclose(np.sort(values(new)[0]), expected, rtol=1e-2)
    assert traces == 1


@pytest.mark.parametrize("compiled", [True, False], ids=["jit", "eager"])
@pytest.mark.parametrize("value", [0.5, 2, jnp.float32(0.5)], ids=["float", "int", "array"])
def test_injected_constants(value: Any, compiled: bool) -> None:
    found, traces = steps(optax.inject_hyperparams(clip)(max_norm=value), compiled, 2)
    for new in found:
        assert norms(new)[0] == pytest.approx(float(value), rel=1e-5)
    assert traces == (1 if compiled else 2)


def test_an_injected_bound_may_be_set_between_steps() -> None:
    transform, params = optax.inject_hyperparams(clip)(max_norm=0.5), parameters()
    state, update = transform.init(params), jax.jit(transform.update)
    zeros = jax.tree.map(jnp.zeros_like, params)
    for bound in (0.5, 2.0, 1.0):
        state.hyperparams["max_norm"] = jnp.float32(bound)
        updates, state = update(zeros, state, params)
        assert norms(optax.apply_updates(params, updates))[0] == pytest.approx(bound, rel=1e-5)


RATIOS = (0.4, 0.9, 0.3)


@pytest.mark.parametrize("compiled", [True, False], ids=["jit", "eager"])
def test_an_injected_ratio_follows_its_schedule(compiled: bool) -> None:
    def make(ratio: Any) -> Any:
        rule = specops.ProjectStableRank(ratio=ratio, norm="reshaped")
        return specops_jax.constrain(rule, GEOMETRIES)

    before = values(parameters())[0]
    own = float(np.sum(before**2) / before[0] ** 2)
    transform = optax.inject_hyperparams(make)(lambda step: jnp.asarray(RATIOS)[step])
    found, traces = steps(transform, compiled, 3)
    for new, ratio in zip(found, RATIOS, strict=True):
        s = values(new)[0]
        expected = min(own, max(1.0, ratio * 4))
        assert np.sum(s**2) / s[0] ** 2 == pytest.approx(expected, rel=1e-4)
    assert traces == (1 if compiled else 3)


@pytest.mark.parametrize("compiled", [True, False], ids=["jit", "eager"])
@pytest.mark.parametrize("norm", ["operator", "reshaped"])
def test_an_injected_strength_follows_its_schedule(norm: Any, compiled: bool) -> None:
    def make(strength: Any) -> Any:
        rule = specops.SpectralNormPenalty(strength, norm=norm)
        return specops_jax.add_penalty(rule, GEOMETRIES)

    transform = optax.inject_hyperparams(make)(by_table)
    found, traces = steps(transform, compiled, 3)
    w = np.asarray(parameters()["a"], np.float64)
    u, s, vh = np.linalg.svd(w)
    for new, strength in zip(found, BOUNDS, strict=False):
        term = np.asarray(new["a"], np.float64) - w
        expected = strength * s[0] * np.outer(u[:, 0], vh[0])
        np.testing.assert_allclose(term, expected, atol=0.02 * strength * s[0])
    assert traces == (1 if compiled else 3)


def test_several_hyperparameters_at_once() -> None:
    def make(rate: Any, strength: Any, max_norm: Any, every: int) -> Any:
        rule = specops.SpectralNormPenalty(strength, norm="reshaped")
        cap = ClipSpectralNorm(max_norm)
        return optax.chain(
            specops_jax.add_penalty(rule, GEOMETRIES),
            optax.sgd(rate),
            specops_jax.constrain(cap, GEOMETRIES, every=every),
        )

    transform = optax.inject_hyperparams(make, static_args=("every",))(
        rate=0.125, strength=by_table, max_norm=lambda step: 0.5 + 0.5 * step, every=2
    )
    params, traces = parameters(), []

    @jax.jit
    def update(params: Any, state: Any) -> Any:
        traces.append(1)
        updates, state = transform.update(jax.tree.map(jnp.zeros_like, params), state, params)
        return optax.apply_updates(params, updates), state

    state, found = transform.init(params), []
    for _ in range(4):
        new, state = update(params, state)
        found.append(norms(new)[0])
    own = norms(params)[0]
    assert found[0] == pytest.approx(own * (1 - 0.125 * BOUNDS[0]), rel=1e-2)
    assert found[1] == pytest.approx(1.0, rel=1e-5)
    assert found[2] == pytest.approx(own * (1 - 0.125 * BOUNDS[2]), rel=1e-2)
    assert found[3] == pytest.approx(2.0, rel=1e-5)
    assert len(traces) == 1


def test_a_forward_rule_takes_the_injected_scale() -> None:
    def rule(scale: Any) -> Any:
        return specops.SpectralNormalization(norm="operator", scale=scale)

    transform = optax.inject_hyperparams(lambda s: specops_jax.constrain(rule(s), GEOMETRIES))(
        by_table
    )
    params = parameters()

    @jax.jit
    def step(state: Any) -> Any:
        _, state = transform.update(jax.tree.map(jnp.zeros_like, params), state, params)
        plan, own = rule(state.hyperparams["s"]), specops_jax.find_state(state)
        return specops_jax.normalize_params(params, plan, own, GEOMETRIES), state

    state = transform.init(params)
    for scale in BOUNDS:
        used, state = step(state)
        np.testing.assert_allclose(norms(used), scale, rtol=2e-2)


def test_an_injected_bound_that_is_none_is_told() -> None:
    with pytest.raises(ValueError, match="max_norm"):
        optax.inject_hyperparams(clip)(max_norm=0.0).init(parameters())
    transform = optax.inject_hyperparams(clip)(optax.linear_schedule(1.0, 0.0, 1))
    params = parameters()
    state, update = transform.init(params), jax.jit(transform.update)
    for _ in range(2):
        updates, state = update(jax.tree.map(jnp.zeros_like, params), state, params)
    np.testing.assert_array_equal(updates["a"], 0.0)
    with pytest.raises(NonFiniteError, match=r"a \(1 times\)"):
        specops_jax.check(specops_jax.find_state(state))


def test_no_tracer_of_a_bound_outlives_its_trace() -> None:
    transform, params = optax.inject_hyperparams(clip)(by_table), parameters()
    state = transform.init(params)
    with jax.checking_leaks():
        jax.jit(transform.update).lower(params, state, params)


def test_equal_layers_share_one_body_under_an_injected_bound(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    geometries = {"*": Dense()}
    params = {str(i): parameters()["a"] for i in range(5)}
    transform = optax.inject_hyperparams(
        lambda max_norm: specops_jax.constrain(
            ClipSpectralNorm(max_norm), geometries, on_host=False
        )
    )(by_table)
    state, calls, update = transform.init(params), [], ClipSpectralNorm.update

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return update(*args, **kwargs)

    monkeypatch.setattr(ClipSpectralNorm, "update", counted)
    jax.jit(transform.update).lower(params, state, params)
    assert len(calls) == 1


def test_bounds_of_half_precision_weights_may_stay_in_single() -> None:
    params = parameters(jnp.bfloat16)
    bound = jnp.float32(0.3)

    @jax.jit
    def project(params: Any, bound: Any) -> Any:
        plan = ClipSpectralNorm(bound)
        state = specops_jax.init(params, plan, GEOMETRIES)
        return specops_jax.project_params(params, plan, state, GEOMETRIES)[0]

    assert 0.98 * 0.3 <= norms(project(params, bound))[0] <= 0.3 * (1 + 1e-6)
