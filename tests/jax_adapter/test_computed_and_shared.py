"""Arrays that a layer does not compute with as they are, that layers share, or that copies use."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import specops
import specops_jax

linen = pytest.importorskip("flax.linen")
nnx = pytest.importorskip("flax.nnx")
eqx = pytest.importorskip("equinox")
hk = pytest.importorskip("haiku")

KEY = jax.random.key(0)
X = jnp.ones((2, 9, 4))


@pytest.mark.parametrize("kind", ["WeightNorm", "SpectralNorm"])
def test_normalised_layers_of_flax(kind: str) -> None:
    class Net(linen.Module):
        @linen.compact
        def __call__(self, x: Any) -> Any:
            options = {"update_stats": False} if kind == "SpectralNorm" else {}
            x = getattr(linen, kind)(linen.Dense(4))(x, **options)
            return linen.Dense(3)(x)

    class Model(nnx.Module):
        def __init__(self) -> None:
            rngs = nnx.Rngs(0)
            self.inner = getattr(nnx, kind)(nnx.Linear(4, 4, rngs=rngs), rngs=rngs)
            self.outer = nnx.Linear(4, 3, rngs=rngs)

    for found, name in [
        (specops_jax.geometries_of(Net(), X), "Dense_0/kernel"),
        (specops_jax.geometries_of(Model()), "inner/layer_instance/kernel"),
    ]:
        assert set(found) == {"Dense_1/kernel" if name.startswith("Dense") else "outer/kernel"}
        assert kind in found.reasons[name]


def test_normalised_layers_of_equinox() -> None:
    layer = eqx.nn.Linear(4, 4, key=KEY)
    spectral, _ = eqx.nn.make_with_state(eqx.nn.SpectralNorm)(layer, "weight", key=KEY)
    model = [
        eqx.nn.WeightNorm(eqx.nn.Linear(4, 4, key=KEY)),
        spectral,
        eqx.nn.Linear(4, 4, key=KEY),
    ]
    report = specops_jax.report(eqx.filter(model, eqx.is_array), specops.ClipSpectralNorm(0.5))
    assert [row.name for row in report.constrained] == ["2/weight"]
    assert "WeightNorm" in report["0/layer/weight"].reason
    assert "SpectralNorm" in report["1/layer/weight"].reason


class Inner(nnx.Module):
    def __init__(self) -> None:
        self.conv = nnx.Conv(4, 4, (3,), rngs=nnx.Rngs(0))

    def __call__(self, x: Any) -> Any:
        return self.conv(x)


def apply(inner: Any, x: Any) -> Any:
    return inner(x)


@pytest.mark.parametrize(
    "lifted", [nnx.remat(apply), nnx.jit(apply), nnx.vmap(apply, in_axes=(None, 0))]
)
def test_nnx_layers_within_transforms(lifted: Any) -> None:
    class Model(nnx.Module):
        def __init__(self) -> None:
            self.inner = Inner()

        def __call__(self, x: Any) -> Any:
            return self.inner(x).sum() + lifted(self.inner, jnp.concatenate([x, x], axis=1)).sum()

    assert specops_jax.geometries_of(Model(), X)["inner/conv/kernel"].grid == (18,)


def test_equinox_layers_within_transforms() -> None:
    class Model(eqx.Module):
        conv: Any

        def __call__(self, x: Any) -> Any:
            twice = jnp.concatenate([x, x], axis=1)
            return self.conv(x).sum() + eqx.filter_checkpoint(self.conv)(twice).sum()

    model = Model(eqx.nn.Conv1d(4, 4, 3, padding=1, key=KEY))
    assert specops_jax.geometries_of(model, jnp.ones((4, 9)))["conv/weight"].grid == (18,)


def test_kernels_that_layers_of_nnx_share() -> None:
    class Model(nnx.Module):
        def __init__(self, **second: Any) -> None:
            self.a = nnx.Conv(4, 4, (3,), rngs=nnx.Rngs(0))
            self.b = nnx.Conv(4, 4, (3,), rngs=nnx.Rngs(0), **second)
            self.b.kernel = self.a.kernel

        def __call__(self, x: Any) -> Any:
            return self.b(jnp.concatenate([self.a(x)] * 2, axis=1))

    assert specops_jax.geometries_of(Model(), X)["a/kernel"].grid == (18,)
    differing = specops_jax.geometries_of(Model(strides=2), X)
    assert not differing
    assert "two different maps" in differing.reasons["a/kernel"]


def test_equal_names_of_different_layers_in_haiku() -> None:
    def f(x: Any) -> Any:
        x = hk.Conv1D(4, 3, stride=2)(x)
        return hk.experimental.layer_stack(3)(lambda x: hk.Conv1D(4, 3)(x))(x)

    found = specops_jax.geometries_of(hk.transform(f), X)
    assert not found
    assert "two different maps" in found.reasons["conv1_d/w"]


def test_a_layer_of_haiku_that_only_has_the_name_of_another() -> None:
    class Scaled(hk.Module):
        def __call__(self, x: Any) -> Any:
            return 3.0 * x @ hk.get_parameter("w", (4, 4), init=jnp.ones)

    class Block(hk.Module):
        def __call__(self, x: Any) -> Any:
            return Scaled(name="linear")(x)

    found = specops_jax.geometries_of(hk.transform(lambda x: hk.Linear(4)(Block()(x))), X)
    assert set(found) == {"linear/w"}


def test_padding_that_depends_on_the_size_at_two_sizes() -> None:
    class Net(linen.Module):
        @linen.compact
        def __call__(self, x: Any) -> Any:
            conv = linen.Conv(4, (2,), strides=2, padding="SAME_LOWER")
            return conv(x[:, :3]).sum() + conv(x[:, :2]).sum()

    assert "two different maps" in specops_jax.geometries_of(Net(), X).reasons["Conv_0/kernel"]


@pytest.mark.parametrize(("sizes", "grid"), [((4, 3), None), ((3, 6), (6,))])
def test_a_stride_whose_padding_begins_apart_is_bounded_on_both_sizes(
    sizes: Any, grid: Any
) -> None:
    class Net(linen.Module):
        @linen.compact
        def __call__(self, x: Any) -> Any:
            conv = linen.Conv(1, (4,), strides=3, padding="SAME", use_bias=False)
            return [conv(x[:, :n]) for n in sizes]

    geometry = specops_jax.geometries_of(Net(), X[..., :1])["Conv_0/kernel"]
    assert geometry.grid == grid
    kernel = np.array([1.0, 0.0, 1.0, 0.0]).reshape(4, 1, 1)
    upper = specops.spectral_norm_bounds(kernel, geometry).upper
    for n in sizes:
        alone = specops.spectral_norm(kernel, dataclasses.replace(geometry, input_shape=n))
        assert alone <= upper * (1 + 1e-9)


@pytest.mark.parametrize(("padding", "closes"), [(2, False), ((0, 1), True), (0, True)])
def test_circular_padding_of_equinox(padding: Any, closes: bool) -> None:
    pads = padding if isinstance(padding, int) else (padding,)
    layer = eqx.nn.Conv1d(
        1, 2, 2, stride=2, padding=pads, padding_mode="circular", use_bias=False, key=KEY
    )
    found = specops_jax.geometries_of(layer, jnp.ones((1, 4)))
    assert ("weight" in found) is closes
    if closes:
        matrix = np.asarray(jax.jacobian(layer)(jnp.ones((1, 4)))).reshape(-1, 4)
        true = np.linalg.norm(matrix, 2)
        assert specops.spectral_norm(np.asarray(layer.weight), found["weight"]) == pytest.approx(
            true, rel=1e-5
        )


def test_stacks_of_equinox_along_another_axis() -> None:
    keys = jax.random.split(KEY, 3)
    stack = eqx.filter_vmap(lambda k: eqx.nn.Linear(8, 4, key=k), out_axes=1)(keys)
    geometry = specops_jax.geometries_of(stack)["weight"]
    weight = np.asarray(stack.weight)
    assert weight.shape == (4, 3, 8)
    expected = [np.linalg.norm(weight[:, i], 2) for i in range(3)]
    assert specops.spectral_norm(weight, geometry) == pytest.approx(expected, rel=1e-5)
