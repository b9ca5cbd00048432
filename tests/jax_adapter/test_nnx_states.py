"""Weights in use and states of flax.nnx, whose arrays stand in variables, under nnx.jit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import specops
import specops_jax
from tests.oracle import conv_matrix

optax = pytest.importorskip("optax")
nnx = pytest.importorskip("flax.nnx")

X = np.random.default_rng(0).normal(size=(8, 6, 6, 2)).astype(np.float32)
SCALE = 0.5
RULE = specops.SpectralNormalization(norm="operator", scale=SCALE)


class Net(nnx.Module):
    def __init__(self, rngs: Any) -> None:
        self.conv = nnx.Conv(2, 4, (3, 3), rngs=rngs)
        self.norm = nnx.BatchNorm(4, rngs=rngs)
        self.head = nnx.Linear(4, 3, rngs=rngs)

    def __call__(self, x: Any) -> Any:
        x = nnx.relu(self.norm(self.conv(x)))
        return self.head(x.mean((1, 2)))


FOUND: dict[str, Callable[[Any], Any]] = {
    "optimizer": specops_jax.find_state,
    "opt_state": lambda optimizer: specops_jax.find_state(optimizer.opt_state),
    "nnx.state": lambda optimizer: specops_jax.find_state(nnx.state(optimizer)),
    "pure dict": lambda o: specops_jax.find_state(nnx.to_pure_dict(nnx.state(o))),
    "variables": lambda optimizer: optimizer.opt_state[1],
}


def started(rule: Any = RULE) -> tuple[Any, Any, Any]:
    model = Net(nnx.Rngs(0))
    geometries = specops_jax.geometries_of(model, X)
    transform = optax.chain(optax.adam(0.005), specops_jax.constrain(rule, geometries))
    return model, geometries, nnx.Optimizer(model, transform, wrt=nnx.Param)


def norms(model: Any, geometries: Any) -> dict[str, float]:
    """Of the explicit matrices, in double precision."""
    kernel = np.asarray(model.conv.kernel[...], np.float64)
    matrices = {
        "conv/kernel": conv_matrix(kernel, geometries["conv/kernel"]),
        "head/kernel": np.asarray(model.head.kernel[...], np.float64),
    }
    return {k: float(np.linalg.svd(m, compute_uv=False)[0]) for k, m in matrices.items()}


@pytest.mark.parametrize("how", FOUND)
def test_the_weights_in_use_of_a_module(how: str) -> None:
    model, geometries, optimizer = started()
    traces: list[int] = []

    @nnx.jit
    def step(model: Any, optimizer: Any) -> tuple[Any, Any]:
        traces.append(1)
        state = FOUND[how](optimizer)

        def loss(model: Any) -> Any:
            used = specops_jax.normalize_params(model, RULE, state, geometries)
            value = jnp.mean((used(X) - 1) ** 2)
            nnx.update(model, nnx.state(used, nnx.Not(nnx.Param)))
            return value

        value, gradients = nnx.value_and_grad(loss)(model)
        optimizer.update(model, gradients)
        return value, gradients

    losses = []
    for index in range(1, 16):
        value, gradients = step(model, optimizer)
        losses.append(float(value))
        state = FOUND[how](optimizer)
        assert int(state.step) == index
    assert len(traces) == 1
    assert losses[-1] < losses[0]
    assert float(jnp.max(jnp.abs(gradients.conv.kernel[...]))) > 0
    # What the forward pass wrote has been taken over.
    assert float(jnp.max(jnp.abs(model.norm.mean[...]))) > 0
    specops_jax.check(state)
    assert {r["name"] for r in specops_jax.records(state)} == {"conv/kernel", "head/kernel"}
    used = specops_jax.normalize_params(model, RULE, state, geometries)
    raw, found = norms(model, geometries), norms(used, geometries)
    assert all(abs(raw[k] - SCALE) > 0.1 for k in raw)
    assert found == pytest.approx(dict.fromkeys(found, SCALE), rel=2e-2)
    assert isinstance(used, Net)
    assert isinstance(used.conv.kernel, nnx.Param)
    np.testing.assert_array_equal(used.conv.bias[...], model.conv.bias[...])
    report = specops_jax.report(model, RULE, geometries, state=state)
    assert report["head/kernel"].norm == pytest.approx(found["head/kernel"], rel=1e-5)


def test_the_weights_in_use_of_a_split_module() -> None:
    model, geometries, optimizer = started()

    @nnx.jit
    def step(model: Any, optimizer: Any) -> None:
        state = specops_jax.find_state(optimizer.opt_state)
        definition, params, rest = nnx.split(model, nnx.Param, ...)

        def loss(params: Any) -> Any:
            used = specops_jax.normalize_params(params, RULE, state, geometries)
            assert isinstance(used, nnx.State)
            copy = nnx.merge(definition, used, rest, copy=True)
            return jnp.mean((copy(X) - 1) ** 2)

        optimizer.update(model, jax.grad(loss)(params))

    for _ in range(15):
        step(model, optimizer)
    state = specops_jax.find_state(optimizer.opt_state)
    assert int(state.step) == 15
    used = nnx.clone(model)
    params = nnx.state(model, nnx.Param)
    nnx.update(used, specops_jax.normalize_params(params, RULE, state, geometries))
    found = norms(used, geometries)
    assert found == pytest.approx(dict.fromkeys(found, SCALE), rel=2e-2)


def test_both_ways_of_training_are_the_plain_loop_s() -> None:
    """One step by nnx's optimizer is that of the same arrays in plain dicts."""
    model, geometries, optimizer = started()
    definition, params, rest = nnx.split(model, nnx.Param, ...)
    transform, plain = optimizer.tx, nnx.to_pure_dict(params)
    state = transform.init(plain)

    def loss(params: Any, own: Any) -> Any:
        used = specops_jax.normalize_params(params, RULE, own, geometries)
        copy = nnx.merge(definition, used, rest, copy=True)
        return jnp.mean((copy(X) - 1) ** 2)

    def both(plain: Any, state: Any) -> Any:
        own = specops_jax.find_state(state)

        def of_dict(plain: Any) -> Any:
            held = jax.tree.unflatten(jax.tree.structure(params), jax.tree.leaves(plain))
            return loss(held, own)

        updates, state = transform.update(jax.grad(of_dict)(plain), state, plain)
        return optax.apply_updates(plain, updates), state

    plain, state = jax.jit(both)(plain, state)

    @nnx.jit
    def step(model: Any, optimizer: Any) -> None:
        own = specops_jax.find_state(optimizer)
        gradients = jax.grad(lambda p: loss(p, own))(nnx.state(model, nnx.Param))
        optimizer.update(model, gradients)

    step(model, optimizer)
    np.testing.assert_allclose(model.conv.kernel[...], plain["conv"]["kernel"], atol=1e-5)
    moved, expected = specops_jax.find_state(optimizer), specops_jax.find_state(state)
    assert jax.tree.structure(moved) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(moved), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4)


def test_rules_without_a_state_keep_their_names_in_nested_dicts() -> None:
    rule = specops.NormalizeIfAbove(0.5, norm="operator")
    model, geometries, optimizer = started(rule)
    own = specops_jax.find_state(nnx.state(optimizer))
    assert own.rules == {"conv/kernel": {}, "head/kernel": {}}
    params, own = specops_jax.project_params(
        nnx.state(model, nnx.Param), rule, own, geometries
    )  # fmt: skip
    nnx.update(model, params)
    assert max(norms(model, geometries).values()) <= 0.5 * (1 + 1e-5)
    assert int(own.step) == 1


def test_several_states_and_none_in_variables() -> None:
    model, geometries, _ = started()
    penalty = specops.SpectralNormPenalty(0.1, norm="operator")
    parts = [specops_jax.add_penalty(penalty, geometries), optax.sgd(0.1)]
    both = optax.chain(*parts, specops_jax.constrain(RULE, geometries))
    for transform, count in ((both, 2), (optax.sgd(0.1), 0)):
        optimizer = nnx.Optimizer(model, transform, wrt=nnx.Param)
        for held in (optimizer, optimizer.opt_state, nnx.state(optimizer)):
            with pytest.raises(ValueError, match=f"{count} specops_jax|found {count}"):
                specops_jax.find_state(held)
            for index in range(count):
                assert isinstance(specops_jax.find_state(held, index).step, jax.Array)
