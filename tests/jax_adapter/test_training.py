"""Plans in JAX training loops: under jit, scan, vmap, grad, and optax's wrappers."""

from __future__ import annotations

import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import specops
import specops_jax
from specops import ClipSpectralNorm, Conv, Dense, Monitor, Plan
from specops.errors import NonFiniteError, PlanError
from specops_jax import firing
from tests.oracle import conv_matrix

optax = pytest.importorskip("optax")

GEOMETRIES = {
    "a/w": Dense(out_axes=(-1,)),
    "b/w": Dense(out_axes=(-1,)),
    "conv": Conv((6, 5), layout="*IO"),
}
CAP = 0.7
ROOT = Path(__file__).parents[2]
CACHE = "JAX_COMPILATION_CACHE_DIR"


@pytest.fixture(autouse=True, params=["called back", "compiled"])
def firings(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of convolutions: as on a single CPU, and as on every other device."""
    if request.param == "compiled":
        monkeypatch.setattr(firing, "is_left_to_host", lambda *_: False)


def parameters(dtype: Any = jnp.float32) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    shapes = {"a": (4, 6), "b": (4, 6)}
    params: dict[str, Any] = {
        name: {"w": rng.normal(size=shape), "bias": rng.normal(size=shape[1])}
        for name, shape in shapes.items()
    }
    params["conv"] = rng.normal(size=(3, 3, 2, 2)) * 0.5
    return jax.tree.map(lambda x: jnp.asarray(x, dtype), params)


def loss(params: Any) -> Any:
    """Grows every weight: its gradient points away from zero."""
    return -sum(jnp.sum(x.astype(jnp.float32) ** 2) for x in jax.tree.leaves(params))


def norms(params: Any) -> dict[str, float]:
    """Of the explicit matrices."""
    found = {
        name: np.linalg.norm(np.asarray(params[name]["w"], np.float64), 2) for name in ("a", "b")
    }
    kernel = np.asarray(params["conv"], np.float64)
    return found | {"conv": np.linalg.norm(conv_matrix(kernel, GEOMETRIES["conv"]), 2)}


def stepper(transform: Any, counter: list[int] | None = None, **options: Any) -> Any:
    @partial(jax.jit, **options)
    def step(params: Any, state: Any) -> Any:
        if counter is not None:
            counter.append(1)
        updates, state = transform.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    return step


def run(transform: Any, steps: int, params: Any = None, **options: Any) -> tuple[Any, Any]:
    params = parameters() if params is None else params
    state, step = transform.init(params), stepper(transform, **options)
    for _ in range(steps):
        params, state = step(params, state)
    return params, state


def test_last_in_the_chain_every_norm_is_capped_and_nothing_else_changes() -> None:
    plain, _ = run(optax.sgd(0.05), 4)
    assert min(norms(plain).values()) > CAP
    transform = optax.chain(
        optax.sgd(0.05), specops_jax.constrain(ClipSpectralNorm(CAP), GEOMETRIES)
    )
    clipped, state = run(transform, 4)
    assert max(norms(clipped).values()) <= CAP * (1 + 1e-5)
    for name in ("a", "b"):
        np.testing.assert_array_equal(clipped[name]["bias"], plain[name]["bias"])
    assert int(specops_jax.find_state(state).step) == 4


def test_first_in_the_chain_the_cap_is_lost() -> None:
    wrong = optax.chain(specops_jax.constrain(ClipSpectralNorm(CAP), GEOMETRIES), optax.adamw(0.1))
    assert max(norms(run(wrong, 4)[0]).values()) > 1.05 * CAP


def test_the_rule_is_the_core_s() -> None:
    params = parameters()
    state = specops_jax.init(params, ClipSpectralNorm(CAP), GEOMETRIES)
    new, _ = specops_jax.project_params(params, ClipSpectralNorm(CAP), state, GEOMETRIES)
    expected = specops.project_spectral_ball(np.asarray(params["a"]["w"]), CAP, Dense((-1,)))
    np.testing.assert_allclose(new["a"]["w"], expected, atol=1e-6)
    jitted, _ = jax.jit(
        lambda p, s: specops_jax.project_params(p, ClipSpectralNorm(CAP), s, GEOMETRIES)
    )(params, state)
    np.testing.assert_allclose(jitted["a"]["w"], expected, atol=1e-6)


@pytest.mark.parametrize("donated", [False, True])
def test_intervals_fire_without_compiling_again(donated: bool) -> None:
    plan = Plan(
        [("conv", ClipSpectralNorm(CAP), 2), ("*", ClipSpectralNorm(CAP))], every=3, start=1
    )
    transform = optax.chain(optax.sgd(0.05), specops_jax.constrain(plan, GEOMETRIES))
    params, counter = parameters(), []
    state = transform.init(params)
    step = stepper(transform, counter, donate_argnums=(0, 1) if donated else ())
    fired: dict[str, list[int]] = {"a": [], "conv": []}
    for index in range(1, 10):
        before = norms(params)
        params, state = step(params, state)
        after = norms(params)
        for name in fired:
            # The step alone makes every weight a tenth longer.
            if after[name] < 1.05 * before[name]:
                assert after[name] <= CAP * (1 + 1e-5)
                fired[name].append(index)
    assert fired == {"a": [4, 7], "conv": [3, 5, 7, 9]}
    assert len(counter) == 1


def test_scan_of_the_training_step() -> None:
    transform = optax.chain(
        optax.sgd(0.05), specops_jax.constrain(ClipSpectralNorm(CAP), GEOMETRIES, every=2)
    )
    params = parameters()
    step = stepper(transform)
    carry = params, transform.init(params)
    scanned, _ = jax.jit(lambda c: jax.lax.scan(lambda c, _: (step(*c), None), c, length=4))(carry)
    looped, _ = run(transform, 4)
    for a, b in zip(jax.tree.leaves(scanned[0]), jax.tree.leaves(looped), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)


def test_vmap_over_models_is_a_loop() -> None:
    plan = Plan([("conv", None), ("*", ClipSpectralNorm(CAP))])
    scale = jnp.asarray([0.1, 1.0, 3.0])
    models = jax.vmap(lambda s: jax.tree.map(lambda x: s * x, parameters()))(scale)

    def project(params: Any) -> Any:
        state = specops_jax.init(params, plan, GEOMETRIES)
        return specops_jax.project_params(params, plan, state, GEOMETRIES)[0]

    mapped, alone = jax.jit(jax.vmap(project))(models), jax.jit(project)
    for index in range(3):
        own = alone(jax.tree.map(lambda x, i=index: x[i], models))
        for a, b in zip(jax.tree.leaves(mapped), jax.tree.leaves(own), strict=True):
            np.testing.assert_allclose(a[index], b, atol=1e-5)


def test_multi_steps_project_on_real_steps_only() -> None:
    transform = optax.MultiSteps(
        optax.chain(optax.sgd(0.05), specops_jax.constrain(ClipSpectralNorm(CAP), GEOMETRIES)), 2
    )
    params = parameters()
    state, step = transform.init(params), stepper(transform)
    before = norms(params)
    params, state = step(params, state)
    assert norms(params) == before
    params, state = step(params, state)
    assert max(norms(params).values()) <= CAP * (1 + 1e-5)
    assert int(specops_jax.find_state(state).step) == 1


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf])
def test_apply_if_finite_leaves_a_bad_step_out(bad: float) -> None:
    transform = optax.apply_if_finite(
        optax.chain(optax.sgd(0.05), specops_jax.constrain(ClipSpectralNorm(CAP), GEOMETRIES)), 3
    )
    params = parameters()
    state = transform.init(params)
    gradients = jax.tree.map(lambda x: jnp.full_like(x, bad), params)
    updates, state = jax.jit(transform.update)(gradients, state, params)
    kept = optax.apply_updates(params, updates)
    for a, b in zip(jax.tree.leaves(kept), jax.tree.leaves(params), strict=True):
        np.testing.assert_array_equal(a, b)
    assert int(specops_jax.find_state(state).step) == 0
    updates, state = jax.jit(transform.update)(jax.grad(loss)(params), state, params)
    assert max(norms(optax.apply_updates(params, updates)).values()) <= CAP * (1 + 1e-5)


def test_half_precision_holds_as_stored_by_project_params() -> None:
    params = parameters(jnp.bfloat16)
    plan = ClipSpectralNorm(CAP)
    state = specops_jax.init(params, plan, GEOMETRIES)

    @jax.jit
    def step(params: Any, state: Any) -> Any:
        stepped = jax.tree.map(lambda p, g: p - 0.05 * g, params, jax.grad(loss)(params))
        return specops_jax.project_params(stepped, plan, state, GEOMETRIES)

    for _ in range(5):
        params, state = step(params, state)
        assert params["conv"].dtype == jnp.bfloat16
        assert max(norms(params).values()) <= CAP * (1 + 1e-6)


def test_half_precision_holds_as_stored_by_the_compiler_that_users_have() -> None:
    # Tests compile without optimisations; with them a compiler may keep more than a dtype holds.
    source = """
import os
from tests.jax_adapter import test_training
assert "XLA_FLAGS" not in os.environ
test_training.test_half_precision_holds_as_stored_by_project_params()
"""
    kept = {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", CACHE)}
    subprocess.run([sys.executable, "-c", source], check=True, env=kept, cwd=ROOT)


def test_missing_params_and_wrong_plans_say_what_to_do() -> None:
    transform = specops_jax.constrain(ClipSpectralNorm(CAP), GEOMETRIES)
    params = parameters()
    state = transform.init(params)
    with pytest.raises(ValueError, match="state, params"):
        transform.update(params, state)
    penalty = specops.SpectralNormPenalty(0.1, norm="reshaped")
    with pytest.raises(PlanError, match="add_penalty"):
        specops_jax.constrain(penalty, GEOMETRIES).init(params)
    with pytest.raises(PlanError, match="constrain"):
        specops_jax.add_penalty(ClipSpectralNorm(CAP), GEOMETRIES).init(params)
    with pytest.raises(PlanError, match="b/v"):
        specops_jax.init(params, ClipSpectralNorm(CAP), {"b/v": Dense()})
    with pytest.raises(specops.errors.GeometryError, match="conv"):
        specops_jax.init(params, ClipSpectralNorm(CAP), {"conv": Dense(splits=(5, 5))})


def test_weights_that_are_not_finite_are_left_alone_and_said() -> None:
    params, plan = parameters(), ClipSpectralNorm(CAP)
    state = specops_jax.init(params, plan, GEOMETRIES)
    bad = params | {"a": params["a"] | {"w": params["a"]["w"].at[0, 0].set(jnp.nan)}}
    with pytest.raises(NonFiniteError, match="a/w"):
        specops_jax.project_params(bad, plan, state, GEOMETRIES)
    with pytest.raises(NonFiniteError, match="a/w"):
        specops_jax.init(bad, plan, GEOMETRIES)
    project = jax.jit(lambda p, s: specops_jax.project_params(p, plan, s, GEOMETRIES))
    new, state = project(bad, state)
    np.testing.assert_array_equal(new["a"]["w"], bad["a"]["w"])
    assert norms({**new, "a": params["a"]})["b"] <= CAP * (1 + 1e-5)
    with pytest.raises(NonFiniteError, match=r"a/w \(1 times\)"):
        specops_jax.check(state)
    good, state = project(params, specops_jax.init(params, plan, GEOMETRIES))
    specops_jax.check(state)
    assert max(norms(good).values()) <= CAP * (1 + 1e-5)


def test_inside_the_ball_firings_are_screened_and_certified() -> None:
    params = jax.tree.map(lambda x: 0.05 * x, parameters())
    plan = ClipSpectralNorm(CAP)
    state = specops_jax.init(params, plan, GEOMETRIES)
    project = jax.jit(lambda p, s: specops_jax.project_params(p, plan, s, GEOMETRIES))
    new, state = project(params, state)
    counts = []
    for _ in range(3):
        new, state = project(new, state)
        counts.append(float(state.rules["conv"]["firings"]))
    assert counts == [2.0, 3.0, 4.0]
    for a, b in zip(jax.tree.leaves(new), jax.tree.leaves(params), strict=True):
        np.testing.assert_array_equal(a, b)
    # A sudden growth is seen by the estimate at the same firing.
    grown = jax.tree.map(lambda x: 100 * x, new)
    grown, state = project(grown, state)
    assert max(norms(grown).values()) <= CAP * (1 + 1e-5)
    assert float(state.rules["conv"]["firings"]) == 0.0
    # A hundred trusted firings, then one that certifies.
    nearly = state._replace(
        rules={**state.rules, "a/w": {**state.rules["a/w"], "firings": jnp.float32(100)}}
    )
    _, state = project(jax.tree.map(lambda x: 0.05 * x, grown), nearly)
    assert float(state.rules["a/w"]["firings"]) == 1.0


def test_figures_and_report() -> None:
    params = parameters()
    state = specops_jax.init(params, Monitor(), GEOMETRIES)
    assert float(state.figures["a/w"]["spectral_norm"]) == 0.0
    same, state = specops_jax.project_params(params, Monitor(), state, GEOMETRIES)
    expected = norms(params)
    assert float(state.figures["a/w"]["spectral_norm"]) == pytest.approx(expected["a"], rel=1e-5)
    np.testing.assert_array_equal(same["conv"], params["conv"])
    report = specops_jax.report(params, Monitor(), GEOMETRIES)
    assert len(report.rows) == 5
    assert report["a/w"].norm == pytest.approx(expected["a"], rel=1e-5)
    assert report["conv"].norm >= expected["conv"] * (1 - 1e-6)
    assert report["a/bias"].reason


FORWARD = [
    specops.SpectralNormalization(norm="reshaped", scale=2.0),
    specops.SpectralNormalization(norm="operator"),
    specops.SpectralNormalization(norm="bidirectional"),
    specops.StableRankNormalization(0.4, norm="reshaped"),
]


@pytest.mark.parametrize("rule", FORWARD, ids=lambda r: f"{type(r).__name__}-{r.norm}")
def test_forward_rules_normalise_what_the_loss_uses(rule: Any) -> None:
    params = parameters()
    state = specops_jax.init(params, rule, GEOMETRIES)
    scale = getattr(rule, "scale", 1.0)

    @jax.jit
    def step(params: Any, state: Any) -> Any:
        def used(params: Any) -> Any:
            return loss(specops_jax.normalize_params(params, rule, state, GEOMETRIES))

        gradients = jax.grad(used)(params)
        stepped = jax.tree.map(lambda p, g: p + 0.01 * g, params, gradients)
        return specops_jax.project_params(stepped, rule, state, GEOMETRIES)

    for _ in range(20):
        params, state = step(params, state)
    used = specops_jax.normalize_params(params, rule, state, GEOMETRIES)
    again = specops_jax.normalize_params(params, rule, state, GEOMETRIES)
    assert norms(used)["a"] == pytest.approx(scale, rel=1e-3)
    for a, b in zip(jax.tree.leaves(used), jax.tree.leaves(again), strict=True):
        np.testing.assert_array_equal(a, b)
    np.testing.assert_array_equal(used["a"]["bias"], params["a"]["bias"])


def test_a_weight_that_was_zero_has_no_directions_yet() -> None:
    """Those of the first step away from it wait for no interval."""
    rng, rule = np.random.default_rng(0), specops.SpectralNormalization(norm="reshaped")
    params = {"head": jnp.zeros((8, 12)), "other": jnp.asarray(rng.standard_normal((8, 12)))}
    maps = {name: Dense() for name in params}
    state, plan = specops_jax.init(params, rule, maps), Plan([("*", rule)], every=5)
    moved = jnp.asarray(rng.standard_normal((8, 12)), jnp.float32)
    for step in range(1, 5):
        params = {name: p + 0.1 * moved for name, p in params.items()}
        params, state = specops_jax.project_params(params, plan, state, maps)
        used = specops_jax.normalize_params(params, plan, state, maps)["head"]
        assert np.linalg.norm(np.asarray(used), 2) == pytest.approx(1.0, rel=0.2)
        assert int(state.fired["head"]) == int(state.fired["other"]) == 1, step


def test_scales_are_trained_beside_the_parameters() -> None:
    rule = specops.SpectralNormalization(
        norm="reshaped", scale=specops.TrainableScale(1.5, shared=True)
    )
    own = specops.SpectralNormalization(norm="reshaped", scale=specops.TrainableScale(0.5))
    plan, params = Plan([("a/*", own), ("*", rule)]), parameters()
    scales = specops_jax.init_scales(params, plan, GEOMETRIES)
    assert {k: float(v) for k, v in scales.items()} == {"a/w": 0.5, "rule 1": 1.5}
    state = specops_jax.init(params, plan, GEOMETRIES)

    def used(scales: Any) -> Any:
        new = specops_jax.normalize_params(params, plan, state, GEOMETRIES, scales=scales)
        return jnp.sum(new["a"]["w"] ** 2)

    gradient = jax.grad(used)(scales)
    assert float(gradient["a/w"]) != 0.0
    assert float(gradient["rule 1"]) == 0.0
    value = float(used(scales))
    assert float(gradient["a/w"]) == pytest.approx(2 * value / 0.5, rel=1e-4)


def test_the_penalty_is_its_gradient_at_the_steps_that_are_due() -> None:
    rule = specops.SpectralNormPenalty(0.3, norm="reshaped")
    transform = optax.chain(
        specops_jax.add_penalty(Plan([("a/*", rule)], every=2), GEOMETRIES), optax.sgd(1.0)
    )
    params = parameters()
    state = transform.init(params)
    zeros = jax.tree.map(jnp.zeros_like, params)
    update = jax.jit(transform.update)
    first, state = update(zeros, state, params)
    assert all(float(jnp.max(jnp.abs(x))) == 0.0 for x in jax.tree.leaves(first))
    second, state = update(zeros, state, params)
    w = np.asarray(params["a"]["w"], np.float64)
    u, s, vh = np.linalg.svd(w)
    expected = -0.3 * s[0] * np.outer(u[:, 0], vh[0])
    np.testing.assert_allclose(second["a"]["w"], expected, atol=2e-3)
    assert float(jnp.max(jnp.abs(second["b"]["w"]))) == 0.0


@pytest.mark.parametrize("keep", ["flax", "orbax"])
def test_checkpoints_carry_the_state(keep: str, tmp_path: Any) -> None:
    plan = Plan(
        [
            ("conv", ClipSpectralNorm(CAP)),
            ("*", specops.SpectralNormalization(norm="reshaped")),
        ],
        every=2,
    )
    transform = optax.chain(optax.adam(0.05), specops_jax.constrain(plan, GEOMETRIES))
    params, state = run(transform, 3)
    step = stepper(transform)
    fresh = {"params": parameters(), "state": transform.init(parameters())}
    saved = {"params": params, "state": state}
    if keep == "flax":
        serialization = pytest.importorskip("flax.serialization")
        restored = serialization.from_bytes(fresh, serialization.to_bytes(saved))
    else:
        checkpoint = pytest.importorskip("orbax.checkpoint")
        with checkpoint.StandardCheckpointer() as keeper:
            keeper.save(tmp_path / "saved", saved)
            keeper.wait_until_finished()
            restored = keeper.restore(tmp_path / "saved", fresh)
    after, resumed = (params, state), (restored["params"], restored["state"])
    for _ in range(3):
        after, resumed = step(*after), step(*resumed)
    for a, b in zip(jax.tree.leaves(after), jax.tree.leaves(resumed), strict=True):
        np.testing.assert_array_equal(a, b)


def test_schedules_of_step_and_name_are_traced() -> None:
    rule = ClipSpectralNorm(lambda step, name, geometry: (1.0 if name[0] == "a" else 2.0) / step)
    plan = Plan([("conv", None), ("*", rule)])
    params = jax.tree.map(lambda x: 10 * x, parameters())
    state = specops_jax.init(params, plan, GEOMETRIES)
    project = jax.jit(lambda p, s: specops_jax.project_params(p, plan, s, GEOMETRIES))
    for step in (1, 2, 3):
        params, state = project(params, state)
        assert norms(params)["a"] == pytest.approx(1 / step, rel=1e-5)
        assert norms(params)["b"] == pytest.approx(2 / step, rel=1e-5)


def test_a_state_is_found_wherever_it_is() -> None:
    transform = optax.chain(optax.sgd(0.1), specops_jax.constrain(ClipSpectralNorm(1), GEOMETRIES))
    state = transform.init(parameters())
    assert specops_jax.find_state((state, {"x": 1})) is state[1]
    with pytest.raises(ValueError, match="found 0"):
        specops_jax.find_state(optax.sgd(0.1).init(parameters()))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_enforce_is_the_last_word_as_stored(dtype: Any) -> None:
    params = parameters(dtype)
    plan = Plan([("conv", ClipSpectralNorm(CAP), 50), ("*", ClipSpectralNorm(CAP))])
    final = specops_jax.enforce(params, plan, GEOMETRIES)
    assert max(norms(final).values()) <= CAP * (1 + 1e-6)
    assert min(norms(final).values()) >= 0.9 * CAP
    for a, b in zip(jax.tree.leaves(final), jax.tree.leaves(params), strict=True):
        assert a.dtype == b.dtype
    again = specops_jax.enforce(final, plan, GEOMETRIES)
    assert again["conv"] is final["conv"]
    with pytest.raises(NonFiniteError, match="conv"):
        specops_jax.enforce({**params, "conv": params["conv"] * jnp.nan}, plan, GEOMETRIES)


class ByName:
    """W divided by the length of its name's ; keeps the names that its bodies were made for."""

    stage = "weights"

    def __init__(self) -> None:
        self.bodies: list[str] = []

    def init(self, weight: Any, geometry: Any, name: str) -> dict[str, Any]:
        return {}

    def update(self, weight: Any, geometry: Any, state: Any, *, step: Any, name: str) -> Any:
        self.bodies.append(name)
        return weight / len(name), state, {}


class ByStep(ByName):
    """W divided by the step, whatever the name."""

    def update(self, weight: Any, geometry: Any, state: Any, *, step: Any, name: str) -> Any:
        self.bodies.append(name)
        return weight / step, state, {}

    def is_scheduled(self) -> bool:
        return False


@pytest.mark.parametrize("rule", [ByName(), ByStep()], ids=["by name", "by step"])
def test_equal_weights_share_a_body_where_a_rule_of_others_says_so(rule: Any) -> None:
    params = {"a": jnp.ones((2, 3)), "longer": jnp.ones((2, 3))}
    geometries = dict.fromkeys(params, Dense())
    state = specops_jax.init(params, rule, geometries)
    rule.bodies.clear()
    step = jax.jit(lambda p, s: specops_jax.project_params(p, rule, s, geometries))
    for _ in range(2):
        params, state = step(params, state)
    shared = isinstance(rule, ByStep)
    assert set(rule.bodies) == ({"a"} if shared else {"a", "longer"})
    lengths = {"a": 2, "longer": 2} if shared else {"a": 1, "longer": 36}
    for name, factor in lengths.items():
        np.testing.assert_allclose(params[name], np.ones((2, 3)) / factor, rtol=1e-6)
