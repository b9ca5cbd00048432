"""Biases and scales of several axes: a plan that names their layer leaves them alone."""

from __future__ import annotations

from typing import Any

import pytest

jax = pytest.importorskip("jax")

import jax.numpy as jnp  # noqa: E402

import specops  # noqa: E402
import specops_jax  # noqa: E402

CLIP = specops.ClipSpectralNorm(1.0)


def told(params: Any, pattern: str, geometries: Any = None) -> dict[str, str]:
    """The reason by array, for arrays that a plan which names all of them leaves alone."""
    plan = specops.Plan([(pattern, CLIP)])
    report = specops_jax.report(params, plan, geometries, measure=False)
    assert any(row.rule for row in report.rows)
    return {row.name: row.reason for row in report.rows if not row.rule}


def vectors(*names: str) -> dict[str, str]:
    return dict.fromkeys(names, "a bias or scale, no matrix")


def test_of_scanned_layers_of_linen() -> None:
    nn = pytest.importorskip("flax.linen")

    class Block(nn.Module):
        @nn.compact
        def __call__(self, x: Any, _: Any) -> Any:
            gain = self.param("gain", nn.initializers.ones, (8,))
            return gain * nn.LayerNorm(name="norm")(nn.Dense(8, name="inner")(x)), None

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x: Any) -> Any:
            options: dict[str, Any] = {"variable_axes": {"params": 0}, "length": 3}
            blocks = nn.scan(nn.remat(Block), split_rngs={"params": True}, **options)
            return blocks(name="layers")(x, None)[0]

    model, x = Net(), jnp.ones((2, 8))
    params = model.init(jax.random.key(0), x)["params"]
    found = told(params, "layers/*", specops_jax.geometries_of(model, x))
    ends = ("gain", "inner/bias", "norm/bias", "norm/scale")
    assert found == vectors(*(f"layers/{end}" for end in ends))


def test_of_attention_of_linen() -> None:
    nn = pytest.importorskip("flax.linen")
    model, x = nn.MultiHeadDotProductAttention(num_heads=2), jnp.ones((2, 3, 8))
    params = model.init(jax.random.key(0), x)["params"]
    found = told(params, "query/*", specops_jax.geometries_of(model, x))
    assert found["query/bias"] == "a bias or scale, no matrix"


def test_what_a_user_says_of_vectors_by_a_pattern_counts() -> None:
    nn = pytest.importorskip("flax.linen")
    model, x = nn.MultiHeadDotProductAttention(num_heads=2), jnp.ones((2, 3, 8))
    params = model.init(jax.random.key(0), x)["params"]
    found, columns = specops_jax.geometries_of(model, x), specops.Dense(out_axes=(-1,))
    assert told(params, "*", found | {"*/bias": columns}).keys() == {"out/bias"}
    left = told(params, "*", found | {"query/*": specops.Dense(out_axes=(-1, -2))})
    assert left["query/bias"] == "a bias or scale, no matrix"


def test_of_mapped_layers_of_nnx() -> None:
    nnx = pytest.importorskip("flax.nnx")

    @nnx.split_rngs(splits=3)
    @nnx.vmap(in_axes=(0,), out_axes=0)
    def make(rngs: Any) -> Any:
        return nnx.Sequential(nnx.Linear(8, 8, rngs=rngs), nnx.BatchNorm(8, rngs=rngs))

    model = make(nnx.Rngs(0))
    state = nnx.state(model, nnx.Param)
    params = ("layers/0/bias", "layers/1/bias", "layers/1/scale")
    assert told(model, "layers/*") == vectors(*params, "layers/1/mean", "layers/1/var")
    found = told(state, "layers/*", specops_jax.geometries_of(model))
    assert found == vectors(*params)


def test_of_layers_of_equinox() -> None:
    eqx = pytest.importorskip("equinox")
    conv = eqx.nn.Conv2d(3, 3, 3, key=jax.random.key(0))
    model = eqx.nn.Sequential([conv, eqx.nn.LayerNorm((3, 4, 4))])
    ends = ("0/bias", "1/weight", "1/bias")
    assert told(model, "layers/*") == vectors(*(f"layers/{end}" for end in ends))


def test_of_an_ensemble_of_equinox_and_what_a_user_says_of_one() -> None:
    eqx = pytest.importorskip("equinox")
    make = eqx.filter_vmap(lambda key: eqx.nn.GRUCell(4, 4, key=key))
    model = make(jax.random.split(jax.random.key(0), 3))
    assert told(model, "*") == vectors("bias", "bias_n")
    found = told(model, "*", {"bias_n": specops.Dense(out_axes=(-1,))})
    assert found == vectors("bias")


def test_of_stacks_of_haiku() -> None:
    hk = pytest.importorskip("haiku")

    def block(x: Any) -> Any:
        return hk.LayerNorm(-1, True, True)(hk.Linear(8)(x))

    model, x = hk.transform(lambda x: hk.experimental.layer_stack(3)(block)(x)), jnp.ones((2, 8))
    params = model.init(jax.random.key(0), x)
    found = told(params, "*layer_stack*", specops_jax.geometries_of(model, x))
    assert {name.partition("/")[2] for name in found} == {
        "layer_norm/offset",
        "layer_norm/scale",
        "linear/b",
    }
    assert set(found.values()) == {"a bias or scale, no matrix"}


def test_a_stack_of_kernels_is_told_what_handles_it() -> None:
    eqx = pytest.importorskip("equinox")
    make = eqx.filter_vmap(lambda key: eqx.nn.Conv2d(3, 3, 3, padding=1, key=key))
    model = make(jax.random.split(jax.random.key(0), 2))
    reason = specops_jax.geometries_of(model).reasons["weight"]
    assert "which no geometry stands for" in reason
    assert "jax.vmap of specops_jax.init and project_params" in reason
    maps = {"w": specops.Conv((5, 5), layout="OI*")}
    state = jax.vmap(lambda w: specops_jax.init({"w": w}, CLIP, maps))(model.weight)
    step = jax.jit(jax.vmap(lambda w, s: specops_jax.project_params({"w": w}, CLIP, s, maps)))
    kernels = step(4 * model.weight, state)[0]["w"]
    norms = [float(specops.spectral_norm(k, maps["w"])) for k in kernels]
    assert norms == pytest.approx([1, 1], abs=1e-5)
