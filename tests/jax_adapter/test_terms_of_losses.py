"""Terms of losses: penalties where a line search sees them, and what norms are compared with."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import specops
from specops.errors import AdapterError, PlanError

jax = pytest.importorskip("jax")
optax = pytest.importorskip("optax")
import jax.numpy as jnp  # noqa: E402

import specops_jax  # noqa: E402

MAPS = {"w": specops.Dense()}
PENALTY = specops.SpectralNormPenalty(0.5, norm="reshaped")


def params() -> dict[str, Any]:
    rng = np.random.default_rng(0)
    return {name: jnp.asarray(rng.standard_normal((4, 3))) for name in MAPS}


def exact(given: Any) -> tuple[float, np.ndarray]:
    """The penalty and its gradient."""
    u, values, v = np.linalg.svd(np.asarray(given["w"], float))
    return 0.25 * values[0] ** 2, 0.5 * values[0] * np.outer(u[:, 0], v[0])


def test_a_line_search_finds_the_penalised_optimum() -> None:
    rng = np.random.default_rng(0)
    u, v = (np.linalg.qr(rng.standard_normal(shape))[0] for shape in ((4, 3), (3, 3)))
    target = jnp.asarray(u * [3.0, 1.0, 0.5] @ v)
    optimizer = optax.lbfgs(memory_size=2)

    def fit(given: Any) -> Any:
        return 0.5 * jnp.sum((given["w"] - target) ** 2)

    @jax.jit
    def step(given: Any, optimizer_state: Any, state: Any) -> Any:
        def loss(p: Any) -> Any:
            return fit(p) + specops_jax.penalty(p, PENALTY, state, MAPS)

        value, gradient = optax.value_and_grad_from_state(loss)(given, state=optimizer_state)
        updates, optimizer_state = optimizer.update(
            gradient, optimizer_state, given, value=value, grad=gradient, value_fn=loss
        )
        given = optax.apply_updates(given, updates)
        _, state = specops_jax.project_params(given, PENALTY, state, MAPS)
        return (given, optimizer_state, state), value, gradient

    given = params()
    at = given, optimizer.init(given), specops_jax.init(given, PENALTY, MAPS)
    at, value, gradient = step(*at)
    wanted, slope = exact(given)
    assert float(value - fit(given)) == pytest.approx(wanted, rel=1e-5)
    np.testing.assert_allclose(gradient["w"], given["w"] - target + slope, atol=1e-5)
    for _ in range(9):
        at, *_ = step(*at)
    # The best has σ₁ = 3/(1 + 0.5), and all else of the target.
    assert float(fit(at[0])) + exact(at[0])[0] == pytest.approx(1.5, rel=1e-5)


def test_its_vectors_advance_with_the_state_and_it_is_due_as_its_plan_says() -> None:
    plan = specops.Plan([("w", PENALTY)], every=2)
    given = params()
    state = specops_jax.init(given, plan, MAPS)
    moved = {"w": given["w"][:, ::-1] * 2.0}

    @jax.jit
    def step(state: Any) -> Any:
        return specops_jax.penalty(moved, plan, state, MAPS), *specops_jax.project_params(
            moved, plan, state, MAPS
        )

    first, _, state = step(state)
    second, same, after = step(state)
    assert float(first) == 0.0
    assert 0.0 < float(second) < exact(moved)[0] * (1.0 + 1e-6)
    np.testing.assert_array_equal(same["w"], moved["w"])
    assert not np.allclose(state.rules["w"]["v0"], after.rules["w"]["v0"])


def test_what_has_no_penalty_is_refused_and_so_is_a_line_search() -> None:
    given = params()
    clip = specops.ClipSpectralNorm(1.0)
    with pytest.raises(PlanError, match="nothing to add"):
        specops_jax.penalty(given, clip, specops_jax.init(given, clip, MAPS), MAPS)
    transform = specops_jax.add_penalty(PENALTY, MAPS)
    state = transform.init(given)
    with pytest.raises(AdapterError, match=r"specops_jax\.penalty"):
        transform.update(given, state, given, value_fn=lambda p: 0.0)


def test_scales_of_other_names_are_named() -> None:
    rule = specops.SpectralNormalization(norm="reshaped", scale=specops.TrainableScale())
    given = params()
    state = specops_jax.init(given, rule, MAPS)
    scales = specops_jax.init_scales(given, rule, MAPS)
    specops_jax.normalize_params(given, rule, state, MAPS, scales=scales)
    scales["wv"] = scales.pop("w")
    with pytest.raises(PlanError, match=r"unknown \['wv'\], missing \['w'\]"):
        specops_jax.normalize_params(given, rule, state, MAPS, scales=scales)


def test_the_adversarial_loss_of_confident_samples() -> None:
    w = jnp.array([[27.5, 0.0, 0.0], [-27.5, 0.0, 0.0]], jnp.float32)
    x = jnp.array([[1.0, 0.3, -1.0], [-1.0, 0.2, 0.5]], jnp.float32)
    y = jnp.array([0, 1])

    def loss(z: Any, y: Any) -> Any:
        return -jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(z), y[:, None], 1))

    def of(w: Any) -> Any:
        return specops_jax.adversarial_loss(lambda x: x @ w.T, loss, x, y, alpha=0.25)

    # Moved by 1 along ±e₁, where the loss is log 2.
    value, gradient = jax.jit(jax.value_and_grad(of))(w)
    assert float(value) == pytest.approx(0.75 * np.log(2.0), rel=1e-5)
    assert np.isfinite(gradient).all()
    with pytest.raises(ValueError, match="alpha"):
        specops_jax.adversarial_loss(lambda x: x, loss, x, y, alpha=2.0)


def test_the_jacobian_penalty() -> None:
    x, a = jnp.ones((3, 4)), params()["w"]

    def of(a: Any, **options: Any) -> Any:
        return specops_jax.jacobian_penalty(lambda x: x @ a, x, **options)

    value, gradient = jax.value_and_grad(lambda a: of(a, projections=None))(a)
    assert float(value) == pytest.approx(float(jnp.sum(a**2) / 2))
    np.testing.assert_allclose(gradient, a, rtol=1e-6)
    estimate = of(a, projections=3000, key=jax.random.key(0))
    assert float(estimate) == pytest.approx(float(value), rel=0.05)
    for options in ({}, {"projections": 0}):
        with pytest.raises(ValueError, match=r"key|at least 1"):
            of(a, **options)


def test_gradients_that_are_none_move_no_term_to_another_array() -> None:
    """As frozen parts have them in equinox: each array gets its own penalty, or none."""
    norms = {"a": 2.0, "b": 4.0, "c": 8.0}
    params = {name: jnp.diag(jnp.array([norm, 1.0])) for name, norm in norms.items()}
    maps = {"*": specops.Dense()}
    gradients = {"a": None, "b": jnp.zeros((2, 2)), "c": jnp.zeros((2, 2))}
    expected = np.diag([4.0, 0])
    for pattern in ("b", "*"):
        plan = specops.Plan([(pattern, specops.SpectralNormPenalty(1.0, norm="operator"))])
        transform = specops_jax.add_penalty(plan, maps)
        found, _ = transform.update(gradients, transform.init(params), params)
        assert found["a"] is None
        np.testing.assert_allclose(found["b"], expected, atol=1e-5)
        np.testing.assert_allclose(found["c"], 2 * expected if pattern == "*" else 0, atol=1e-5)
