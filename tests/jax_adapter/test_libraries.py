"""The loops of flax.nnx, equinox and haiku take the transformation as it is."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import specops
import specops_jax

optax = pytest.importorskip("optax")
CAP = 0.5
RULE = specops.ClipSpectralNorm(CAP)
X = np.random.default_rng(0).normal(size=(8, 4)).astype(np.float32)


def norm(w: Any) -> float:
    return float(np.linalg.norm(np.asarray(w, np.float64), 2))


def test_nnx_optimizer() -> None:
    nnx = pytest.importorskip("flax.nnx")

    class Net(nnx.Module):
        def __init__(self, rngs: Any) -> None:
            self.first = nnx.Linear(4, 16, rngs=rngs)
            self.norm = nnx.BatchNorm(16, rngs=rngs)
            self.second = nnx.Linear(16, 2, rngs=rngs)

        def __call__(self, x: Any) -> Any:
            return self.second(nnx.relu(self.norm(self.first(x))))

    model = Net(nnx.Rngs(0))
    geometries = specops_jax.geometries_of(model)
    assert set(geometries) == {"first/kernel", "second/kernel"}
    transform = optax.chain(optax.sgd(0.1), specops_jax.constrain(RULE, geometries))
    optimizer = nnx.Optimizer(model, transform, wrt=nnx.Param)

    @nnx.jit
    def step(model: Any, optimizer: Any) -> None:
        gradients = nnx.grad(lambda m: -jnp.mean(m(X) ** 2))(model)
        optimizer.update(model, gradients)

    for _ in range(3):
        step(model, optimizer)
    assert max(norm(model.first.kernel[...]), norm(model.second.kernel[...])) <= CAP * (1 + 1e-5)
    report = specops_jax.report(nnx.state(model, nnx.Param), RULE, geometries)
    assert report["first/kernel"].norm == pytest.approx(norm(model.first.kernel[...]), rel=1e-5)
    assert report["norm/scale"].reason


def test_equinox_needs_no_mapping() -> None:
    eqx = pytest.importorskip("equinox")
    model = eqx.nn.Sequential(
        [
            eqx.nn.Conv2d(1, 4, 3, padding=1, key=jax.random.key(0)),
            eqx.nn.Lambda(jax.nn.relu),
            eqx.nn.Lambda(jnp.ravel),
            eqx.nn.Linear(4 * 2 * 2, 3, key=jax.random.key(1)),
        ]
    )
    images = jnp.asarray(X.reshape(8, 1, 2, 2), model.layers[3].weight.dtype)
    transform = optax.chain(optax.sgd(0.1), specops_jax.constrain(RULE))
    state = transform.init(eqx.filter(model, eqx.is_array))

    @eqx.filter_jit
    def step(model: Any, state: Any) -> Any:
        gradients = eqx.filter_grad(lambda m: -jnp.mean(jax.vmap(m)(images) ** 2))(model)
        updates, state = transform.update(gradients, state, eqx.filter(model, eqx.is_array))
        return eqx.apply_updates(model, updates), state

    for _ in range(3):
        model, state = step(model, state)
    assert norm(model.layers[3].weight) <= CAP * (1 + 1e-5)
    # Without inputs the convolution is capped for every size.
    kernel = np.asarray(model.layers[0].weight, np.float64)
    whole = specops.Conv((32, 32), padding=1)
    assert specops.spectral_norm(kernel, whole) <= CAP * (1 + 1e-5)
    found = specops_jax.geometries_of(model, images[0])
    assert found["layers/0/weight"].grid == (2, 2)


def test_haiku_names() -> None:
    hk = pytest.importorskip("haiku")
    model = hk.without_apply_rng(hk.transform(lambda x: hk.nets.MLP([16, 2])(x)))
    params = model.init(jax.random.key(0), X)
    geometries = specops_jax.geometries_of(model, X)
    transform = optax.chain(optax.sgd(0.1), specops_jax.constrain(RULE, geometries))
    state = transform.init(params)
    gradients = jax.grad(lambda p: -jnp.mean(model.apply(p, X) ** 2))(params)
    updates, _ = jax.jit(transform.update)(gradients, state, params)
    params = optax.apply_updates(params, updates)
    assert max(norm(params[name]["w"]) for name in params) <= CAP * (1 + 1e-5)
    assert set(geometries) == {"mlp/~/linear_0/w", "mlp/~/linear_1/w"}


def test_masked_parameters_stay_out() -> None:
    params = {"a": jnp.eye(3) * 4, "b": jnp.eye(3) * 4}
    geometries = {"a": specops.Dense(), "b": specops.Dense()}
    plan = specops.Plan([("a", RULE)])
    transform = optax.masked(
        specops_jax.constrain(plan, {"a": geometries["a"]}), {"a": True, "b": False}
    )
    state = transform.init(params)
    zeros = jax.tree.map(jnp.zeros_like, params)
    updates, _ = transform.update(zeros, state, params)
    new = optax.apply_updates(params, updates)
    assert norm(new["a"]) <= CAP * (1 + 1e-5)
    np.testing.assert_array_equal(new["b"], params["b"])


@pytest.mark.parametrize("model", ["module", "optimizer"])
def test_attach_says_what_to_use_instead(model: str) -> None:
    given = {"w": jnp.eye(2)}
    optimizer = None if model == "module" else optax.sgd(0.1)
    with pytest.raises(specops.errors.AdapterError, match=r"specops_jax\.constrain"):
        specops.attach(optimizer, given, RULE)


def test_half_precision_through_updates_rounds_again() -> None:
    rng = np.random.default_rng(1)
    params = {"w": jnp.asarray(rng.normal(size=(24, 16)), jnp.bfloat16)}
    geometries = {"w": specops.Dense()}
    transform = specops_jax.constrain(RULE, geometries)
    state = transform.init(params)
    zeros = jax.tree.map(jnp.zeros_like, params)
    updates, _ = jax.jit(transform.update)(zeros, state, params)
    rounded = norm(optax.apply_updates(params, updates)["w"])
    exact, _ = specops_jax.project_params(params, RULE, state, geometries)
    assert norm(exact["w"]) <= CAP
    assert rounded <= CAP * (1 + 2.0**-6)


def test_names_that_collide_are_refused() -> None:
    params = {"a": {"b": jnp.eye(2)}, "a/b": jnp.eye(3)}
    with pytest.raises(specops.errors.PlanError, match="a/b"):
        specops_jax.init(params, RULE, {"a/b": specops.Dense()})


def test_equinox_models_may_be_given_whole() -> None:
    eqx = pytest.importorskip("equinox")
    model = eqx.nn.MLP(4, 2, 8, 1, key=jax.random.key(0))
    transform = optax.chain(optax.sgd(0.1), specops_jax.constrain(RULE))
    state = transform.init(eqx.filter(model, eqx.is_array))
    x = jnp.asarray(X, model.layers[0].weight.dtype)
    gradients = eqx.filter_grad(lambda m: -jnp.mean(jax.vmap(m)(x) ** 2))(model)
    updates, _ = transform.update(gradients, state, model)
    model = eqx.apply_updates(model, updates)
    assert max(norm(layer.weight) for layer in model.layers) <= CAP * (1 + 1e-5)


def test_wide_updates_of_half_precision_are_exact() -> None:
    params = {"w": jnp.asarray(np.random.default_rng(2).normal(size=(24, 16)), jnp.bfloat16)}
    transform = specops_jax.constrain(RULE, {"w": specops.Dense()})
    wide = {"w": jnp.full((24, 16), 0.3, jnp.float32)}
    updates, _ = transform.update(wide, transform.init(params), params)
    assert updates["w"].dtype == jnp.float32
    assert norm(optax.apply_updates(params, updates)["w"]) <= CAP
