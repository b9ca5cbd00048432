"""The JAX adapter passes the conformance kit, in a jitted optax loop of a flax model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pytest

import specops_jax
from specops.geometry import Geometry
from specops.testing import AdapterSuite, Capabilities, LayerCase
from specops.training.plan import Plan
from specops.training.report import Report

jax = pytest.importorskip("jax")
optax = pytest.importorskip("optax")
nn = pytest.importorskip("flax.linen")
jnp = jax.numpy

X = np.random.default_rng(1).normal(size=(8, 6, 6, 2)).astype(np.float32)
Y = np.random.default_rng(2).normal(size=(8, 3)).astype(np.float32)


class Net(nn.Module):
    @nn.compact
    def __call__(self, x: Any) -> Any:
        x = nn.tanh(nn.Conv(4, (3, 3), strides=2, param_dtype=jnp.float32)(x))
        return nn.Dense(3, param_dtype=jnp.float32)(x.reshape(len(x), -1))


def named(params: Any) -> dict[str, np.ndarray]:
    leaves = jax.tree_util.tree_flatten_with_path(params)[0]
    return {"/".join(k.key for k in path): np.array(leaf) for path, leaf in leaves}


class JaxTraining:
    """Three ways to call one plan: before the optimizer, in its chain, around the loss."""

    def __init__(
        self, params: Any, rule_or_plan: Any, geometries: Any = None, *, on_host: bool = True
    ) -> None:
        inferred = specops_jax.geometries_of(Net(), X)
        given = inferred if geometries is None else {**inferred, **geometries}
        self.params, self.given = params, given
        self.plan = Plan.of(rule_or_plan)
        self.found = dict(inferred)
        stages = {rule.stage for _, rule, *_ in self.plan.entries if rule is not None}
        parts = [optax.sgd(0.1, momentum=0.5)]
        if "gradients" in stages:
            parts.insert(0, specops_jax.add_penalty(self.plan, given))
        if stages - {"gradients"} or not stages:
            parts.append(specops_jax.constrain(self.plan, given, on_host=on_host))
        self.use(optax.chain(*parts))
        self.log: list[dict[str, Any]] = []

    def use(self, transform: Any) -> None:
        self.state = transform.init(self.params)

        def step(params: Any, state: Any) -> Any:
            own = self.own_state(state)

            def loss(params: Any) -> Any:
                used = params
                if own is not None:
                    used = specops_jax.normalize_params(params, self.plan, own, self.given)
                return jnp.mean((Net().apply({"params": used}, X) - 10 * Y) ** 2)

            updates, state = transform.update(jax.grad(loss)(params), state, params)
            return optax.apply_updates(params, updates), state

        self.take = jax.jit(step)

    @staticmethod
    def own_state(state: Any) -> Any:
        try:
            return specops_jax.find_state(state)
        except ValueError:
            return None

    def step(self) -> None:
        self.params, self.state = self.take(self.params, self.state)
        own = self.own_state(self.state)
        if own is not None:
            specops_jax.check(own)
            self.log += specops_jax.records(own)

    def weights(self) -> dict[str, np.ndarray]:
        return named(self.params)

    def outputs(self) -> np.ndarray:
        own, used = self.own_state(self.state), self.params
        if own is not None:
            used = specops_jax.normalize_params(used, self.plan, own, self.given)
        return np.asarray(Net().apply({"params": used}, X))

    def report(self) -> Report:
        state = self.own_state(self.state)
        return specops_jax.report(self.params, self.plan, self.given, state=state)

    def history(self) -> list[dict[str, Any]]:
        return self.log

    def save(self) -> Any:
        return jax.tree.map(np.array, (self.params, self.state))

    def restore(self, saved: Any) -> None:
        self.params, self.state = jax.tree.map(jnp.asarray, saved)

    def set_weight(self, name: str, values: np.ndarray) -> None:
        layer, key = name.split("/")
        new = {**self.params[layer], key: jnp.asarray(values)}
        self.params = {**self.params, layer: new}

    def enforce(self) -> None:
        plan = self.plan.once()
        state = specops_jax.init(self.params, plan, self.given)
        self.params, _ = specops_jax.project_params(self.params, plan, state, self.given)

    def detach(self) -> None:
        momentum = self.state
        self.use(optax.sgd(0.1, momentum=0.5))
        kept = next(s for s in momentum if self.own_state(s) is None)
        self.state = kept

    @property
    def geometries(self) -> Mapping[str, Geometry]:
        names = {row.name for row in self.report().constrained}
        return {name: g for name, g in self.given.items() if name in names}


def case(label: str, layer: Any, *shape: int) -> LayerCase:
    params = layer.init(jax.random.key(0), jnp.zeros((1, *shape), jnp.float32))

    def apply(x: np.ndarray) -> np.ndarray:
        return np.asarray(layer.apply(params, jnp.asarray(x)))

    return LayerCase(label, (layer, params["params"], shape), "kernel", shape, apply)


class TestJax(AdapterSuite):
    name = "jax"
    # There is nothing to attach to: the suite's training is the loop that users write.
    capabilities = Capabilities(supports_jit=True, in_place=False, registered=False)
    on_host = True

    def model(self) -> Any:
        params = Net().init(jax.random.key(0), X)["params"]
        return jax.tree.map(lambda p: 3.0 * p, params)

    def layers(self) -> Sequence[LayerCase]:
        return [
            case("Dense", nn.Dense(3, param_dtype=jnp.float32), 5),
            case("Conv", nn.Conv(3, (3, 2)), 6, 5, 2),
            case("strided", nn.Conv(3, (3, 3), strides=2), 7, 6, 2),
            case("dilated", nn.Conv(4, (3,), kernel_dilation=2, feature_group_count=2), 9, 4),
            case("circular", nn.Conv(3, (3, 3), padding="CIRCULAR"), 5, 4, 2),
        ]

    def start(self, model: Any, rule_or_plan: Any, **options: Any) -> JaxTraining:
        return JaxTraining(model, rule_or_plan, on_host=self.on_host, **options)

    def array(self, values: np.ndarray) -> Any:
        return jnp.asarray(values)

    def numpy(self, x: Any) -> np.ndarray:
        return np.asarray(x)

    def jit(self, function: Callable[..., Any]) -> Callable[..., Any]:
        return jax.jit(function)

    def project(self, model: Any, rule_or_plan: Any, geometries: Any = None) -> Any:
        if isinstance(model, tuple):
            layer, params, shape = model
            found = specops_jax.geometries_of(layer, jnp.zeros((1, *shape)))
        else:
            params, found = model, specops_jax.geometries_of(Net(), X)
        found = found if geometries is None else {**found, **geometries}
        state = specops_jax.init(params, rule_or_plan, found)
        return specops_jax.project_params(params, rule_or_plan, state, found)


class TestCompiled(TestJax):
    """The same where nothing is called back, as on every device but a single CPU."""

    on_host = False
