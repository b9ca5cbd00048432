"""Arrays of JAX outside of jit: computed through NumPy, given back as arrays of JAX."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import specops
from specops import Conv, Dense, arrays

jax = pytest.importorskip("jax")
jnp = jax.numpy
KERNEL = Conv(padding=1, input_shape=(5, 6))


def seen_by(*args: Any, **kwargs: Any) -> tuple[Any, Any]:
    """(the kind that a public function computes with, what comes back)."""
    kinds: list[Any] = []

    @arrays.entry
    def function(x: Any) -> Any:
        kinds.append(type(x))
        return x

    found = function(*args, **kwargs)
    return kinds[0], found


def test_public_functions_see_numpy_and_give_the_same_array_back(rng: np.random.Generator) -> None:
    w = jnp.asarray(rng.standard_normal((3, 4)))
    kind, found = seen_by(w)
    assert kind is np.ndarray
    assert found is w
    assert specops.project_spectral_ball(w, 1e3) is w


def test_results_in_containers_are_of_jax(rng: np.random.Generator) -> None:
    w = jnp.asarray(rng.standard_normal((4, 3, 3, 3)), jnp.float32)
    new, info = specops.project_spectral_ball(w, 0.5, KERNEL, return_info=True)
    assert isinstance(new, jax.Array)
    assert new.dtype == w.dtype
    assert isinstance(info.norm_before, jax.Array)
    assert info.state
    assert all(isinstance(x, jax.Array) for x in info.state.values())
    again = specops.project_spectral_ball(1.001 * w, 0.5, KERNEL, state=info.state)
    assert isinstance(again, jax.Array)
    blocks = specops.spectral_norm(w[..., 0, 0], Dense(splits=(2, 2)))
    assert all(isinstance(x, jax.Array) for x in blocks)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "complex64"])
def test_values_are_numpy_s(rng: np.random.Generator, dtype: str) -> None:
    w = jnp.asarray(rng.standard_normal((4, 3, 3, 3))).astype(dtype)
    ours, wanted = (specops.project_spectral_ball(x, 1.0, KERNEL) for x in (w, np.asarray(w)))
    assert ours.dtype == w.dtype
    np.testing.assert_array_equal(np.asarray(ours), wanted)


def test_what_is_traced_or_mapped_stays(rng: np.random.Generator) -> None:
    w = jnp.asarray(rng.standard_normal((3, 4)))
    kinds = []
    for transform in (jax.jit, jax.vmap, lambda f: jax.grad(lambda x: f(x).sum())):
        transform(lambda x: kinds.append(seen_by(x)[0]) or x)(w)
    assert len(kinds) == 3
    assert all(issubclass(kind, jax.core.Tracer) for kind in kinds)
    # A bound, or an entry of a state, may be traced where the weight is not.
    jax.jit(lambda c: specops.project_spectral_ball(w, c))(1.0)


def test_the_weight_decides(rng: np.random.Generator) -> None:
    w = rng.standard_normal((3, 4))
    for bound in (1.0, 1e3):
        new = specops.project_spectral_ball(w, jnp.asarray(bound))
        assert type(new) is np.ndarray
        assert new.dtype == np.float64
    assert seen_by(x=jnp.asarray(w))[0] is np.ndarray


def test_a_schedule_may_give_a_tracer(rng: np.random.Generator) -> None:
    w = jnp.asarray(rng.standard_normal((3, 4)))

    def project(bound: Any) -> Any:
        return specops.ClipSpectralNorm(lambda *_: bound).update(w, Dense(), {})[0]

    np.testing.assert_allclose(jax.jit(project)(1.0), project(1.0), atol=1e-6)


def test_layouts_and_keys_are_left_to_jax(rng: np.random.Generator) -> None:
    w = jnp.asarray(rng.standard_normal((3, 4)))
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]), ("x",))
    over = jax.device_put(w, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("x")))
    assert issubclass(seen_by(over)[0], jax.Array)
    with pytest.raises(specops.errors.UnsupportedArrayError):
        specops.spectral_norm(jax.random.key(0))


def test_a_layer_compiles_next_to_nothing(rng: np.random.Generator) -> None:
    w = jnp.asarray(rng.standard_normal((7, 5, 3, 3)), jnp.float32)
    compiled: list[str] = []

    def listen(event: str, _: float, **__: Any) -> None:
        if event.endswith("backend_compile_duration"):
            compiled.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        for rule in (specops.ClipSpectralNorm(0.5), specops.Monitor()):
            rule.watch(w, KERNEL, "w")
            state = rule.init(w, KERNEL, "w")
            for step in (1, 2):
                _, state, _ = rule.update(w, KERNEL, state, step=step, name="w")
    finally:
        jax.monitoring.clear_event_listeners()
    assert len(compiled) < 20
