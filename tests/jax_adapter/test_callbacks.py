"""Firings of convolutions that compiled programs leave to the host, beside compiled ones."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

import specops
import specops_jax
from specops import ClipSpectralNorm, Conv, Dense
from specops.errors import NonFiniteError, SpecopsError, StateError
from tests.oracle import conv_matrix

GEOMETRIES = {"conv": Conv((12, 12), layout="*IO"), "w": Dense()}
CAP = 0.7
pytestmark = pytest.mark.skipif(
    jax.default_backend() != "cpu" or jax.device_count() > 1,
    reason="nothing is called back but by programs whose only device is a CPU",
)
BOTH = pytest.mark.parametrize("on_host", [True, False])


def parameters(dtype: Any = jnp.float32) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    shapes = {"conv": (3, 3, 4, 5), "w": (4, 6)}
    return {name: jnp.asarray(rng.normal(size=shape), dtype) for name, shape in shapes.items()}


def norm(kernel: Any) -> float:
    """Of the explicit matrix, in double precision."""
    matrix = conv_matrix(np.asarray(kernel, np.float64), GEOMETRIES["conv"])
    return float(np.linalg.norm(matrix, 2))


class Projection:
    """`project_params` of one plan, from its first state on."""

    def __init__(self, rule: Any = None, params: Any = None, **options: Any) -> None:
        self.plan = specops.Plan.of(ClipSpectralNorm(CAP) if rule is None else rule)
        params = parameters() if params is None else params
        self.state = specops_jax.init(params, self.plan, GEOMETRIES)
        self.options = options

    def __call__(self, params: Any, state: Any = None) -> Any:
        state = self.state if state is None else state
        return specops_jax.project_params(params, self.plan, state, GEOMETRIES, **self.options)


def calls_back(function: Any, *given: Any) -> bool:
    return "buffer_callback" in str(jax.make_jaxpr(function)(*given))


def test_a_program_gives_what_the_same_call_gives_outside_of_it() -> None:
    params, project = parameters(), Projection()
    assert calls_back(project, params)
    eager, told = project(params)
    new, found = jax.jit(project)(params)
    np.testing.assert_array_equal(new["conv"], eager["conv"])
    assert jax.tree.structure(found) == jax.tree.structure(told)
    for key, figure in told.figures["conv"].items():
        np.testing.assert_array_equal(found.figures["conv"][key], figure)
    assert 0.9 * CAP < norm(new["conv"]) <= CAP * (1 + 1e-6)


def test_compiled_and_called_back_it_keeps_the_same_promise() -> None:
    params = parameters()
    moved = {}
    for on_host in (True, False):
        project = Projection(on_host=on_host)
        assert calls_back(project, params) == on_host
        new, state = jax.jit(project)(params)
        assert 0.9 * CAP < norm(new["conv"]) <= CAP * (1 + 1e-6)
        assert jax.tree.structure(state) == jax.tree.structure(project.state)
        moved[on_host] = float(jnp.linalg.norm(new["conv"] - params["conv"]))
    assert moved[True] <= 1.1 * moved[False]
    assert moved[False] <= 1.1 * moved[True]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "complex64"])
def test_dtypes_stay(dtype: str) -> None:
    params = parameters(jnp.dtype(dtype))
    new, _ = jax.jit(Projection(params=params))(params)
    assert new["conv"].dtype == params["conv"].dtype
    kernel = np.asarray(new["conv"].astype(jnp.promote_types(dtype, jnp.float32)))
    wide = kernel.astype(np.result_type(kernel, np.float64))
    matrix = conv_matrix(wide, GEOMETRIES["conv"])
    assert 0.9 * CAP < np.linalg.norm(matrix, 2) <= CAP * (1 + 1e-6)


@pytest.mark.parametrize("bad", [0.0, -1.0, np.nan, np.inf])
def test_a_number_that_is_no_bound_leaves_the_kernel_alone_and_is_counted(bad: float) -> None:
    params = parameters()
    state = Projection().state

    @jax.jit
    def project(bound: Any) -> Any:
        plan = specops.Plan.of(ClipSpectralNorm(bound))
        return specops_jax.project_params(params, plan, state, GEOMETRIES)

    new, after = project(jnp.float32(bad))
    np.testing.assert_array_equal(new["conv"], params["conv"])
    assert after.nonfinite["conv"] == 1
    assert np.isnan(after.figures["conv"]["norm_after"])
    for bound in (CAP, 0.5 * CAP):
        new, after = project(jnp.float32(bound))
        assert norm(new["conv"]) <= bound * (1 + 1e-6)
        assert after.nonfinite["conv"] == 0


def test_a_kernel_that_is_not_finite_is_left_alone_and_counted() -> None:
    project = jax.jit(Projection())
    bad = parameters()
    bad["conv"] = bad["conv"].at[0, 0, 0, 0].set(jnp.nan)
    new, state = project(bad)
    np.testing.assert_array_equal(new["conv"], bad["conv"])
    assert state.nonfinite["conv"] == 1
    assert norm(project(parameters(), state)[0]["conv"]) <= CAP * (1 + 1e-6)
    with pytest.raises(NonFiniteError, match="conv"):
        specops_jax.check(state)


def test_schedules_are_computed_by_the_program_and_never_by_the_host() -> None:
    asked = []

    def bound(step: Any, name: str, geometry: Any) -> Any:
        asked.append(isinstance(step, jax.core.Tracer))
        return jnp.where(step > 1, 0.5 * CAP, CAP)

    params, project = parameters(), Projection(ClipSpectralNorm(bound))
    asked.clear()
    assert calls_back(project, params)
    step, state = jax.jit(project), None
    for expected in (CAP, 0.5 * CAP):
        params, state = step(params, state)
        assert 0.9 * expected < norm(params["conv"]) <= expected * (1 + 1e-6)
    assert asked
    assert all(asked)


def test_a_schedule_that_is_no_bound_is_refused_where_that_is_known() -> None:
    project = Projection()
    project.plan = specops.Plan([("conv", ClipSpectralNorm(lambda *_: -1.0)), ("w", None)])
    with pytest.raises(ValueError, match="max_norm must be a positive finite number") as caught:
        jax.jit(project)(parameters())
    assert "conv" in "".join(caught.value.__notes__)


class OwnStart(ClipSpectralNorm):
    """Takes something else, and is no dataclass of its own."""

    def __init__(self, half: Any) -> None:
        super().__init__(2 * half)


@dataclass(frozen=True, eq=False)
class OwnFields(ClipSpectralNorm):
    """Has fields that are arrays and functions, and no schedules."""

    mask: Any = None
    log: Any = None


@pytest.mark.parametrize(
    "rule",
    [
        OwnStart(0.5 * CAP),
        OwnStart(np.float32(0.5 * CAP)),
        OwnFields(CAP, mask=np.ones(4), log=print),
        OwnFields(lambda *_: jnp.asarray(CAP), mask=np.ones(4), log=print),
    ],
)
def test_subclasses_are_called_back_as_they_are(rule: Any) -> None:
    params, project = parameters(), Projection(rule)
    assert calls_back(project, params)
    new, state = jax.jit(project)(params)
    assert 0.9 * CAP < norm(new["conv"]) <= CAP * (1 + 1e-6)
    assert state.nonfinite["conv"] == 0


def test_a_rule_of_others_may_ask_to_be_called_back() -> None:
    class Halve:
        stage = "weights"

        def init(self, weight: Any, geometry: Any, name: str) -> Any:
            return {}

        def update(self, weight: Any, geometry: Any, state: Any, **options: Any) -> Any:
            return 0.5 * weight, state, {}

        def costly_to_compile(self, geometry: Any) -> bool:
            return isinstance(geometry, Conv)

    params, project = parameters(), Projection(Halve())
    assert calls_back(project, params)
    new, _ = jax.jit(project)(params)
    np.testing.assert_array_equal(new["conv"], 0.5 * params["conv"])


IN_FLIGHT = """
import jax, jax.numpy as jnp, specops_jax
from specops import ClipSpectralNorm, Conv

params = {"k": jax.random.normal(jax.random.key(0), (3, 3, 64, 64))}
maps = {"k": Conv((8, 8), layout="*IO")}
state = specops_jax.init(params, ClipSpectralNorm(1.0), maps)

@jax.jit
def step(params, state):
    grown = jax.tree.map(lambda x: 1.1 * x, params)
    return specops_jax.project_params(grown, ClipSpectralNorm(1.0), state, maps)

other, x = jax.jit(lambda x: x @ x.T @ x), jnp.ones((1024, 512))
for _ in range(10):
    params, state = step(params, state)
    y = other(x)
jax.block_until_ready((params, y))
print("done")
"""


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="processes cannot be pinned here")
def test_on_one_core_other_programs_in_flight_do_not_stop_it() -> None:
    pin = f"import os; os.sched_setaffinity(0, {{{min(os.sched_getaffinity(0))}}})"
    command = [sys.executable, "-c", pin + IN_FLIGHT]
    run = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert run.stdout == "done\n", run.stderr


@BOTH
def test_its_derivative_is_that_of_the_compiled_rounds(on_host: bool) -> None:
    params, project = parameters(), Projection(on_host=on_host)
    tangent = jax.tree.map(jnp.ones_like, params)

    def total(params: Any) -> Any:
        return sum(jnp.sum(x**3) for x in jax.tree.leaves(project(params)[0]))

    gradient = jax.jit(jax.grad(total))(params)
    _, along = jax.jit(lambda p: jax.jvp(total, (p,), (tangent,)))(params)
    summed = sum(float(jnp.sum(x)) for x in jax.tree.leaves(gradient))
    assert abs(summed - float(along)) <= 1e-4 * abs(summed)
    compiled = jax.jit(jax.grad(lambda p: jnp.sum(Projection(on_host=False)(p)[0]["conv"] ** 3)))
    np.testing.assert_allclose(gradient["conv"], compiled(params)["conv"], rtol=1e-4, atol=1e-6)


def test_mapped_over_stacked_models_each_has_its_own() -> None:
    params, project = parameters(), Projection()
    stack = jax.tree.map(lambda x: jnp.stack([x, 2.0 * x, 0.01 * x]), params)
    new, state = jax.jit(jax.vmap(lambda p: project(p)))(stack)
    for index, scale in enumerate((1.0, 2.0, 0.01)):
        alone, _ = project(jax.tree.map(lambda x, s=scale: s * x, params))
        np.testing.assert_allclose(new["conv"][index], alone["conv"], atol=1e-6)
    assert state.figures["conv"]["norm_before"].shape == (3,)
    with pytest.raises(StateError, match="3 stacked models"):
        specops_jax.records(state)
    of_the_last = specops_jax.records(jax.tree.map(lambda x: x[2], state))
    assert {record["name"] for record in of_the_last} == {"conv", "w"}


def test_in_a_scan_only_the_steps_that_are_due_call() -> None:
    rule, calls = ClipSpectralNorm(CAP), []

    @dataclass(frozen=True)
    class Counting(ClipSpectralNorm):
        def update(self, *given: Any, **options: Any) -> Any:
            calls.append(isinstance(given[0], np.ndarray))
            return rule.update(*given, **options)

        def costly_to_compile(self, geometry: Any) -> bool:
            return isinstance(geometry, Conv)

    params = parameters()
    plan = specops.Plan([("conv", Counting(CAP))], every=3)
    state = specops_jax.init(params, plan, GEOMETRIES)
    calls.clear()

    def body(carry: Any, _: Any) -> Any:
        grown = jax.tree.map(lambda x: 1.1 * x, carry[0])
        return specops_jax.project_params(grown, plan, carry[1], GEOMETRIES), None

    (params, state), _ = jax.lax.scan(body, (params, state), length=7)
    jax.block_until_ready(params)
    assert calls == [True, True]
    assert abs(norm(params["conv"]) / (1.1 * CAP) - 1.0) < 0.1


def test_a_subclass_that_computes_otherwise_is_compiled() -> None:
    @dataclass(frozen=True)
    class ByJax(ClipSpectralNorm):
        def update(self, weight: Any, *given: Any, **options: Any) -> Any:
            half = jnp.multiply(weight, 0.5)
            return half, {}, {"size": jnp.linalg.norm(half)}

    assert not ByJax(CAP).costly_to_compile(GEOMETRIES["conv"])
    params, project = parameters(), Projection(ByJax(CAP, screen=False))
    assert not calls_back(project, params)
    new, _ = jax.jit(project)(params)
    np.testing.assert_array_equal(new["conv"], 0.5 * params["conv"])


@pytest.mark.parametrize(
    "rule",
    [
        ClipSpectralNorm(CAP, norm="reshaped"),
        specops.SpectralNormPenalty(0.1, norm="operator"),
        specops.SpectralNormalization(norm="operator"),
        specops.SpectralHammer(CAP, norm="operator"),
    ],
)
def test_what_compiles_quickly_is_compiled(rule: Any) -> None:
    assert not calls_back(Projection(rule), parameters())


def test_matrices_are_compiled() -> None:
    plan = specops.Plan([("w", ClipSpectralNorm(CAP)), ("conv", None)])
    assert not calls_back(Projection(plan), parameters())


def test_without_that_function_of_jax_all_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("specops_jax.callbacks.buffer_callback", None)
    assert not calls_back(Projection(), parameters())


def test_within_shard_map_it_is_compiled() -> None:
    mesh, spec = jax.make_mesh((1,), ("devices",)), PartitionSpec()
    project = Projection()

    @jax.jit
    def mapped(params: Any) -> Any:
        inner = jax.shard_map(
            lambda p: project(p)[0], mesh=mesh, in_specs=(spec,), out_specs=spec, check_vma=False
        )
        return inner(params)

    assert not calls_back(mapped, parameters())
    assert norm(mapped(parameters())["conv"]) <= CAP * (1 + 1e-6)


def test_programs_without_callbacks_are_exported() -> None:
    params = parameters()

    def exported(**options: Any) -> Any:
        project = Projection(**options)
        return jax.export.export(jax.jit(lambda p: project(p)[0]))(params)

    with pytest.raises(NotImplementedError, match="callback"):
        exported()
    assert norm(exported(on_host=False).call(params)["conv"]) <= CAP * (1 + 1e-6)


@BOTH
def test_the_last_link_of_a_chain_passes_the_choice_on(on_host: bool) -> None:
    optax = pytest.importorskip("optax")
    transform = optax.chain(
        optax.sgd(0.1),
        specops_jax.constrain(ClipSpectralNorm(CAP), GEOMETRIES, on_host=on_host),
    )
    params = parameters()
    state = transform.init(params)
    assert calls_back(transform.update, params, state, params) == on_host
    updates, _ = jax.jit(transform.update)(params, state, params)
    assert norm(optax.apply_updates(params, updates)["conv"]) <= CAP * (1 + 1e-5)


def test_an_error_on_the_host_names_the_layer() -> None:
    @dataclass(frozen=True)
    class Failing(ClipSpectralNorm):
        def update(self, weight: Any, *given: Any, **options: Any) -> Any:
            if isinstance(weight, np.ndarray):
                raise SpecopsError("as it must")
            return super().update(weight, *given, **options)

        def costly_to_compile(self, geometry: Any) -> bool:
            return isinstance(geometry, Conv)

    with pytest.raises(jax.errors.JaxRuntimeError, match="conv: as it must"):
        jax.block_until_ready(jax.jit(Projection(Failing(CAP)))(parameters()))


@BOTH
def test_an_estimate_that_falls_short_is_not_taken_for_the_norm(on_host: bool) -> None:
    params = parameters()
    # Vectors of other weights, which one step a firing turns slowly.
    project = Projection(params=jax.tree.map(lambda x: x[::-1], params), on_host=on_host)
    step = jax.jit(project)
    inside = {**params, "conv": params["conv"] * (0.93 * CAP / norm(params["conv"]))}
    new, state = step(inside)
    np.testing.assert_array_equal(new["conv"], inside["conv"])
    for _ in range(3):
        _, state = step(inside, state)
    seen = float(state.figures["conv"]["norm_before"])
    assert 0.93 * CAP * (1 - 1e-3) < seen < 0.93 * CAP * 1.1
    grown = {**inside, "conv": inside["conv"] * 1.1}
    assert norm(step(grown, state)[0]["conv"]) <= CAP * (1 + 1e-6)


@BOTH
def test_a_layer_for_every_size_is_not_certified_at_every_firing(on_host: bool) -> None:
    params, geometries = {"conv": parameters()["conv"]}, {"conv": Conv(None, layout="*IO")}

    def upper(kernel: Any) -> float:
        return float(
            specops.spectral_norm_bounds(np.asarray(kernel, float), geometries["conv"]).upper
        )

    inside = {"conv": params["conv"] * (0.8 * CAP / upper(params["conv"]))}
    state = specops_jax.init(inside, ClipSpectralNorm(CAP), geometries)

    @jax.jit
    def step(params: Any, state: Any) -> Any:
        plan = ClipSpectralNorm(CAP)
        return specops_jax.project_params(params, plan, state, geometries, on_host=on_host)

    for _ in range(3):
        new, state = step(inside, state)
        np.testing.assert_array_equal(new["conv"], inside["conv"])
    assert float(state.rules["conv"]["firings"]) == 3  # the first of them certified
    grown = {"conv": inside["conv"] * 1.5}
    assert upper(step(grown, state)[0]["conv"]) <= CAP * (1 + 1e-6)


@BOTH
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_state_that_was_cast_goes_on_in_its_dtype(on_host: bool, dtype: str) -> None:
    params, project = parameters(), Projection(on_host=on_host)
    inside = {name: x * (0.5 * CAP / jnp.linalg.norm(x)) for name, x in params.items()}
    state = jax.tree.map(
        lambda x: x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.inexact) else x, project.state
    )
    dtypes, step = [x.dtype for x in jax.tree.leaves(state)], jax.jit(project)
    for _ in range(3):
        _, state = step(inside, state)
        assert [x.dtype for x in jax.tree.leaves(state)] == dtypes
    assert all(float(state.rules[name]["firings"]) == 3 for name in params)


def test_a_derivative_outside_of_a_program_is_that_of_one() -> None:
    kernel = parameters()["conv"]

    def total(kernel: Any) -> Any:
        new = specops.project_spectral_ball(kernel, CAP, GEOMETRIES["conv"], distance_tolerance=0.1)
        return jnp.sum(new**3)

    value, gradient = jax.value_and_grad(total)(kernel)
    expected, compiled = jax.jit(jax.value_and_grad(total))(kernel)
    assert abs(float(value - expected)) <= 1e-4 * abs(float(expected))
    np.testing.assert_allclose(gradient, compiled, rtol=1e-3, atol=1e-4)
