"""What compiled steps cannot raise, what is given wrongly, and trees that optax takes apart."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import specops
import specops_jax
from specops import (
    ClipSpectralNorm,
    Conv,
    Dense,
    NormalizeIfAbove,
    ProjectStableRank,
    SpectralHammer,
    SpectralNormalization,
    SpectralNormPenalty,
    SpectralSoftCap,
    StableRankNormalization,
)
from specops.errors import AdapterError, NonFiniteError, PlanError, StateError
from tests.jax_adapter.test_training import CAP, GEOMETRIES, loss, norms, parameters, run

optax = pytest.importorskip("optax")

DENSE = {"a/w": Dense(out_axes=(-1,))}


def _two(params: Any) -> Any:
    return {"a": params["a"], "b": params["b"]}


def _until_zero(step: Any, name: str, geometry: Any) -> Any:
    """A bound at the first step, none at the second."""
    return 1.0 * (2 - step)


def _none(step: Any, name: str, geometry: Any) -> Any:
    return step * jnp.nan


_SCHEDULED = {
    "clip": lambda f: ClipSpectralNorm(f),
    "clip, unscreened": lambda f: ClipSpectralNorm(f, screen=False),
    "normalize if above": lambda f: NormalizeIfAbove(f, norm="operator"),
    "soft cap": lambda f: SpectralSoftCap(f, norm="operator"),
    "hammer": lambda f: SpectralHammer(f, norm="operator"),
    "stable rank": lambda f: ProjectStableRank(ratio=f, norm="operator"),
}


@pytest.mark.parametrize("schedule", [_until_zero, _none])
@pytest.mark.parametrize("key", _SCHEDULED)
def test_a_traced_schedule_that_gives_no_bound_leaves_weights_alone_and_is_told(
    key: str, schedule: Any
) -> None:
    # Small weights: inside any bound, so that a comparison with NaN alone would pass them.
    params = jax.tree.map(lambda x: 0.01 * x, _two(parameters()))
    plan = specops.Plan([("a/w", _SCHEDULED[key](schedule))])
    step = jax.jit(lambda p, s: specops_jax.project_params(p, plan, s, DENSE))
    state = specops_jax.init(params, plan, DENSE)
    params, state = step(params, state)
    if schedule is _until_zero:
        specops_jax.check(state)
    before = jax.tree.map(np.asarray, params)
    params, state = step(params, state)
    jax.tree.map(np.testing.assert_array_equal, jax.tree.map(np.asarray, params), before)
    with pytest.raises(NonFiniteError, match=r"a/w.*schedule"):
        specops_jax.check(state)


def test_a_traced_strength_that_is_none_adds_nothing() -> None:
    params = _two(parameters())
    plan = specops.Plan([("a/w", SpectralNormPenalty(_none, norm="operator"))])
    transform = optax.chain(specops_jax.add_penalty(plan, DENSE), optax.sgd(0.1))
    moved, state = run(transform, 1, params)
    plain, _ = run(optax.sgd(0.1), 1, params)
    np.testing.assert_array_equal(moved["a"]["w"], plain["a"]["w"])
    with pytest.raises(NonFiniteError, match="a/w"):
        specops_jax.check(specops_jax.find_state(state))


@pytest.mark.parametrize(
    "rule",
    [
        SpectralNormalization(norm="operator", scale=_none),
        StableRankNormalization(_none, norm="operator"),
    ],
    ids=["scale", "ratio"],
)
def test_a_forward_rule_without_a_value_shows_as_nan(rule: Any) -> None:
    params, plan = _two(parameters()), specops.Plan([("a/w", rule)])
    state = specops_jax.init(params, plan, DENSE)
    used = jax.jit(lambda p, s: specops_jax.normalize_params(p, plan, s, DENSE))(params, state)
    assert bool(jnp.all(jnp.isnan(used["a"]["w"])))


@pytest.mark.parametrize("key", _SCHEDULED)
def test_schedules_may_give_integers(key: str) -> None:
    params = _two(parameters())
    rank = key == "stable rank"
    plan = specops.Plan([("a/w", _SCHEDULED[key](lambda step, *_: step if not rank else 1))])
    state = specops_jax.init(params, plan, DENSE)
    step = jax.jit(lambda p, s: specops_jax.project_params(p, plan, s, DENSE))
    moved, state = step(params, state)
    specops_jax.check(state)
    if not rank:
        assert np.linalg.norm(np.asarray(moved["a"]["w"]), 2) < norms_of(params)["a"]


def norms_of(params: Any) -> dict[str, float]:
    return {k: float(np.linalg.norm(np.asarray(v["w"]), 2)) for k, v in params.items()}


def test_a_traced_ratio_is_that_of_the_schedule() -> None:
    params = _two(parameters())
    at_step = StableRankNormalization(lambda step, *_: 0.25 * step, norm="operator")
    fixed = StableRankNormalization(0.25, norm="operator")
    used = []
    for rule in (at_step, fixed):
        plan = specops.Plan([("a/w", rule)])
        state = specops_jax.init(params, plan, DENSE)
        look = jax.jit(lambda p, s, plan=plan: specops_jax.normalize_params(p, plan, s, DENSE))
        used.append(look(params, state)["a"]["w"])
    np.testing.assert_allclose(*used, rtol=1e-6)


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "jit"])
@pytest.mark.parametrize("other", ["another rule", "another pair", "another shape"])
def test_a_state_of_something_else_is_refused_by_name(other: str, compiled: bool) -> None:
    params, plan = _two(parameters()), specops.Plan([("a/w", ClipSpectralNorm(CAP))])
    if other == "another shape":
        larger = {"a": {"w": jnp.ones((7, 9))}}
        state = specops_jax.init(larger, plan, DENSE)
    else:
        rule: Any = ProjectStableRank(ratio=0.5, norm="operator")
        if other == "another pair":
            rule = SpectralHammer(CAP, norm="operator")
        state = specops_jax.init(params, specops.Plan([("a/w", rule)]), DENSE)

    def step(p: Any, s: Any) -> Any:
        return specops_jax.project_params(p, plan, s, DENSE)

    step = jax.jit(step) if compiled else step
    with pytest.raises(StateError, match="a/w"):
        step(params, state)


def test_the_state_of_a_whole_optimizer_is_told_where_ours_is() -> None:
    params = parameters()
    state = optax.chain(optax.adam(0.1), specops_jax.constrain(ClipSpectralNorm(CAP), GEOMETRIES))
    whole = state.init(params)
    for call in (specops_jax.project_params, specops_jax.normalize_params):
        with pytest.raises(StateError, match=r"got tuple.*find_state"):
            call(params, ClipSpectralNorm(CAP), whole, GEOMETRIES)
    with pytest.raises(StateError, match=r"got dict.*find_state"):  # as a checkpoint gives it
        specops_jax.project_params(params, ClipSpectralNorm(CAP), {"0": {}, "1": {}}, GEOMETRIES)
    for look in (specops_jax.records, specops_jax.check):
        with pytest.raises(StateError, match=r"got tuple.*find_state"):
            look(whole)


def test_a_plan_is_checked_where_it_is_written() -> None:
    with pytest.raises(PlanError, match="every"):
        specops_jax.constrain(ClipSpectralNorm(1.0), every=0)
    with pytest.raises(PlanError, match="every"):
        specops_jax.add_penalty(SpectralNormPenalty(1.0, norm="operator"), every=0)


def test_a_tree_of_arrays_is_told_what_to_call() -> None:
    with pytest.raises(AdapterError, match=r"specops_jax\.enforce"):
        specops.project(parameters(), ClipSpectralNorm(1.0))


def test_two_states_in_a_chain_are_found_by_their_place() -> None:
    plan = specops.Plan([("a/w", SpectralNormPenalty(0.1, norm="operator"))])
    chain = optax.chain(
        specops_jax.add_penalty(plan, GEOMETRIES),
        optax.sgd(0.1),
        specops_jax.constrain(ClipSpectralNorm(CAP), GEOMETRIES),
    )
    state = chain.init(parameters())
    with pytest.raises(ValueError, match="2 specops_jax states"):
        specops_jax.find_state(state)
    assert set(specops_jax.find_state(state, 0).rules) == {"a/w"}
    assert set(specops_jax.find_state(state, 1).rules) == set(GEOMETRIES)
    with pytest.raises(ValueError, match="found 2"):
        specops_jax.find_state(state, 2)


def test_geometries_may_name_what_a_multi_transform_masks() -> None:
    params = parameters()
    labels = {"a": "capped", "b": "free", "conv": "free"}
    transform = optax.multi_transform(
        {
            "capped": optax.chain(
                optax.sgd(0.05), specops_jax.constrain(ClipSpectralNorm(CAP), GEOMETRIES)
            ),
            "free": optax.set_to_zero(),
        },
        labels,
    )
    moved, _ = run(transform, 3, params)
    assert norms(moved)["a"] <= CAP * (1 + 1e-5)
    np.testing.assert_array_equal(moved["b"]["w"], params["b"]["w"])
    with pytest.raises(PlanError, match="typo"):
        specops_jax.init(params, ClipSpectralNorm(CAP), {"typo": Dense()})


def test_geometries_keep_what_they_know_when_joined() -> None:
    nn = pytest.importorskip("flax.linen")

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x: Any) -> Any:
            return nn.Dense(3)(nn.Embed(5, 4)(x))

    net, x = Net(), jnp.zeros((2,), jnp.int32)
    params = net.init(jax.random.key(0), x)["params"]
    found = specops_jax.geometries_of(net, x)
    mine = Dense(out_axes=(0,))
    for joined in (found | {"Dense_*/kernel": mine}, {"Dense_*/kernel": mine} | found):
        report = specops_jax.report(params, ClipSpectralNorm(1.0), joined, measure=False)
        rows = {row.name: row for row in report.rows}
        assert "embedding" in rows["Embed_0/embedding"].reason
        assert rows["Dense_0/kernel"].geometry == mine.describe()
    named = found | {"Embed_0/embedding": Dense(out_axes=(-1,))}
    rows = {
        row.name: row
        for row in specops_jax.report(params, ClipSpectralNorm(1.0), named, measure=False).rows
    }
    assert rows["Embed_0/embedding"].rule
    with pytest.raises(PlanError, match="Dense_O"):
        specops_jax.init(params, ClipSpectralNorm(1.0), found | {"Dense_O/kernel": mine})
    refused = specops_jax.geometries_of(net, x)
    refused.clear()
    refused.reasons["Dense_0/kernel"] = "no map"
    joined = found | refused
    assert "Dense_0/kernel" not in joined
    assert joined.reasons["Dense_0/kernel"] == "no map"
    same = updated = specops_jax.geometries_of(net, x)
    updated |= {"Dense_0/kernel": mine}
    assert updated is same
    updated |= updated
    assert updated.opt_in == found.opt_in
    assert updated["Dense_0/kernel"] == mine


def test_a_hammer_finds_what_leads_after_its_first_blow() -> None:
    values = np.array([10.0, 9.0, 8.0, 0.1])
    params = {"w": jnp.asarray(np.diag(values))}
    plan = specops.Plan.of(SpectralHammer(1.0, norm="operator"))
    geometries = {"w": Dense()}
    state = specops_jax.init(params, plan, geometries)
    step = jax.jit(lambda p, s: specops_jax.project_params(p, plan, s, geometries))
    for _ in range(12):
        params, state = step(params, state)
    found = np.linalg.svd(np.asarray(params["w"]), compute_uv=False)
    assert found.max() < 1.5
    assert loss(params) < 0


def test_conv_kernels_are_projected_under_jit_with_a_traced_bound() -> None:
    params = {"conv": parameters()["conv"]}
    plan = specops.Plan.of(ClipSpectralNorm(lambda step, *_: CAP / step))
    geometries = {"conv": Conv((6, 5), layout="*IO")}
    state = specops_jax.init(params, plan, geometries)
    step = jax.jit(lambda p, s: specops_jax.project_params(p, plan, s, geometries))
    for count in (1, 2):
        params, state = step(params, state)
        found = specops.spectral_norm(np.asarray(params["conv"]), geometries["conv"])
        assert float(found) <= CAP / count * (1 + 1e-4)
    specops_jax.check(state)


@pytest.mark.parametrize("norm", ["operator", "reshaped"])
def test_promotions_that_jax_refuses_its_users_are_none_of_the_rules_business(norm: Any) -> None:
    params, geometries = {"conv": parameters()["conv"]}, {"conv": Conv((6, 5), layout="*IO")}
    rules = [
        ClipSpectralNorm(CAP, norm=norm),
        specops.NormalizeIfAbove(CAP, norm=norm),
        specops.SpectralHammer(CAP, norm=norm),
        specops.Monitor(),
        specops.SpectralNormPenalty(0.1, norm=norm),
    ]
    with jax.numpy_rank_promotion("raise"), jax.numpy_dtype_promotion("strict"):
        for rule in rules:
            state = specops_jax.init(params, rule, geometries)

            @jax.jit
            def step(params: Any, state: Any, rule: Any = rule) -> Any:
                return specops_jax.project_params(params, rule, state, geometries, on_host=False)

            _, after = step(params, state)
            specops_jax.check(after)
        assert float(specops_jax.enforce(params, rules[0], geometries)["conv"].sum()) != 0.0


@pytest.mark.parametrize(
    "rule",
    [ClipSpectralNorm(CAP), SpectralNormalization(norm="operator"), specops.Monitor()],
    ids=lambda rule: type(rule).__name__,
)
def test_transfers_that_jax_refuses_its_users_are_none_of_the_rules_business(rule: Any) -> None:
    params = _two(parameters()) | {"conv": parameters()["conv"]}
    with jax.transfer_guard("disallow"):
        state = specops_jax.init(params, rule, GEOMETRIES)
        after = jax.jit(lambda p, s: specops_jax.project_params(p, rule, s, GEOMETRIES))(
            params, state
        )
        specops_jax.check(after[1])
        assert len(specops_jax.records(after[1])) == 3
        assert specops_jax.report(params, rule, GEOMETRIES).constrained


def test_a_schedule_of_a_forward_rule_that_fails_names_the_weight() -> None:
    params, rule = {"a": {"w": jnp.eye(3)}}, SpectralNormalization(norm="reshaped", scale=_negative)
    state = specops_jax.init(params, rule, DENSE)
    with pytest.raises(ValueError, match="scale must be a positive finite number") as caught:
        specops_jax.normalize_params(params, rule, state, DENSE)
    assert "a/w" in "".join(caught.value.__notes__)


def _negative(step: Any, name: str, geometry: Any) -> float:
    return -1.0
