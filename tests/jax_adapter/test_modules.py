"""Geometries found in modules, against the explicit matrix of each layer."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import specops
import specops_jax
from specops_jax.paths import named_leaves

linen = pytest.importorskip("flax.linen")
nnx = pytest.importorskip("flax.nnx")
eqx = pytest.importorskip("equinox")
hk = pytest.importorskip("haiku")


def explicit(apply: Any, shape: tuple[int, ...]) -> np.ndarray:
    """The matrix of an affine map of one sample, its bias taken off."""
    size = int(np.prod(shape))
    zero = np.asarray(apply(jnp.zeros((1, *shape))), np.float64).reshape(-1)
    images = np.asarray(apply(jnp.eye(size).reshape(size, *shape)), np.float64).reshape(size, -1)
    return (images - zero).T


def agrees(params: Any, geometries: Any, name: str, matrix: np.ndarray) -> None:
    """σ of the weight under its geometry are those of the layer's matrix."""
    weight = np.asarray(dict(named_leaves(params)[0])[name])
    expected = np.linalg.svd(matrix, compute_uv=False)
    found = np.asarray(specops.singular_values(weight, geometries[name]))
    np.testing.assert_allclose(found, expected, atol=2e-5 * expected[0])


CONVOLUTIONS = [
    ({"kernel_size": (3, 3)}, (5, 6, 2)),
    ({"kernel_size": (2, 3), "strides": 2}, (6, 5, 2)),
    ({"kernel_size": (3,), "padding": "CAUSAL", "kernel_dilation": 2}, (9, 2)),
    ({"kernel_size": (3,), "padding": "VALID"}, (9, 2)),
    ({"kernel_size": (3, 3), "padding": "CIRCULAR"}, (6, 5, 2)),
    ({"kernel_size": (1, 1), "strides": (2, 1), "padding": "REFLECT"}, (6, 5, 2)),  # pads nothing
    ({"kernel_size": (3, 3), "padding": 1, "feature_group_count": 2}, (4, 4, 4)),
    ({"kernel_size": (2, 2, 2), "padding": [(0, 1), (1, 0), (1, 1)]}, (3, 4, 3, 1)),
]
TRANSPOSED = [
    ({"kernel_size": (3, 3), "strides": (2, 2)}, (4, 3, 2)),
    ({"kernel_size": (3, 2), "strides": (2, 2), "padding": "VALID"}, (3, 4, 2)),
    ({"kernel_size": (3,), "strides": (1,), "kernel_dilation": (2,)}, (7, 2)),
    ({"kernel_size": (2,), "strides": (3,)}, (4, 2)),
    ({"kernel_size": (1,), "strides": (2,)}, (5, 8)),
    ({"kernel_size": (1,), "strides": (3,), "padding": "VALID", "transpose_kernel": True}, (4, 12)),
    ({"kernel_size": (4, 4), "strides": (2, 2), "transpose_kernel": True}, (4, 5, 2)),
    ({"kernel_size": (3,), "strides": (2,), "padding": ((2, 1),)}, (5, 2)),
    ({"kernel_size": (3, 3), "strides": (2, 2), "padding": "CIRCULAR"}, (4, 4, 2)),
]


def labelled(cases: list[Any]) -> list[Any]:
    return [pytest.param(*c, id="-".join(map(str, c[0].values()))) for c in cases]


@pytest.mark.parametrize(("options", "shape"), labelled(CONVOLUTIONS))
def test_linen_convolutions(options: dict[str, Any], shape: tuple[int, ...]) -> None:
    layer = linen.Conv(features=4, **options)
    check_linen(layer, shape, "kernel")


@pytest.mark.parametrize(("options", "shape"), labelled(TRANSPOSED))
def test_linen_transposed_convolutions(options: dict[str, Any], shape: tuple[int, ...]) -> None:
    layer = linen.ConvTranspose(features=3, **options)
    check_linen(layer, shape, "kernel")


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (linen.Dense(3), (5,)),
        (linen.DenseGeneral((2, 3)), (4,)),
        (linen.DenseGeneral(3, axis=(-2, -1)), (2, 4)),
    ],
    ids=["dense", "two outputs", "two inputs"],
)
def test_linen_dense_layers(layer: Any, shape: tuple[int, ...]) -> None:
    check_linen(layer, shape, "kernel")


def check_linen(layer: Any, shape: tuple[int, ...], name: str) -> None:
    x = jnp.zeros((1, *shape))
    variables = layer.init(jax.random.key(0), x)
    geometries = specops_jax.geometries_of(layer, jax.ShapeDtypeStruct(x.shape, x.dtype))
    matrix = explicit(lambda x: layer.apply(variables, x), shape)
    agrees(variables["params"], geometries, name, matrix)


@pytest.mark.parametrize(("options", "shape"), labelled(CONVOLUTIONS))
def test_nnx_convolutions(options: dict[str, Any], shape: tuple[int, ...]) -> None:
    layer = nnx.Conv(shape[-1], 4, rngs=nnx.Rngs(0), **options)
    check_nnx(layer, shape)


@pytest.mark.parametrize(("options", "shape"), labelled(TRANSPOSED[:-1]))
def test_nnx_transposed_convolutions(options: dict[str, Any], shape: tuple[int, ...]) -> None:
    layer = nnx.ConvTranspose(shape[-1], 3, rngs=nnx.Rngs(0), **options)
    check_nnx(layer, shape)


@pytest.mark.parametrize("kind", ["linear", "general"])
def test_nnx_dense_layers(kind: str) -> None:
    rngs = nnx.Rngs(0)
    layer = (
        nnx.Linear(4, 3, rngs=rngs) if kind == "linear" else nnx.LinearGeneral(4, (2, 3), rngs=rngs)
    )
    check_nnx(layer, (4,))


def check_nnx(layer: Any, shape: tuple[int, ...]) -> None:
    geometries = specops_jax.geometries_of(layer, jnp.zeros((1, *shape)))
    agrees(nnx.state(layer, nnx.Param), geometries, "kernel", explicit(layer, shape))


EQUINOX = [
    ("Conv", {"kernel_size": (3, 3), "padding": 1}, (2, 5, 6)),
    ("Conv", {"kernel_size": (3, 2), "stride": 2, "padding": "SAME"}, (2, 5, 6)),
    ("Conv", {"kernel_size": 3, "dilation": 2, "padding": ((2, 0),)}, (2, 9)),
    ("Conv", {"kernel_size": (3, 3), "padding": "SAME", "groups": 2}, (4, 4, 4)),
    (
        "Conv",
        {"kernel_size": (3, 3), "padding": "SAME", "padding_mode": "CIRCULAR"},
        (2, 4, 5),
    ),
    ("Conv", {"kernel_size": (2, 2), "padding_mode": "REFLECT"}, (2, 4, 5)),  # of no padding
    ("ConvTranspose", {"kernel_size": (3, 3), "stride": 2, "padding": 1}, (2, 4, 3)),
    (
        "ConvTranspose",
        {"kernel_size": (3,), "stride": 2, "padding": 1, "output_padding": 1},
        (2, 5),
    ),
    ("ConvTranspose", {"kernel_size": 4, "stride": 2, "padding": "SAME"}, (2, 5)),
    ("ConvTranspose", {"kernel_size": (3,), "groups": 2, "dilation": 2}, (4, 5)),
]


@pytest.mark.parametrize(("kind", "options", "shape"), EQUINOX)
def test_equinox_convolutions(kind: str, options: dict[str, Any], shape: tuple[int, ...]) -> None:
    layer = getattr(eqx.nn, kind)(len(shape) - 1, shape[0], 4, key=jax.random.key(0), **options)
    geometries = specops_jax.geometries_of(layer, jnp.zeros(shape))
    matrix = explicit(jax.vmap(layer), shape)
    agrees(eqx.filter(layer, eqx.is_array), geometries, "weight", matrix)


def test_equinox_layers_in_the_tree_are_looked_at() -> None:
    model = eqx.nn.MLP(3, 2, 8, 1, key=jax.random.key(0))
    params = eqx.filter(model, eqx.is_array)
    report = specops_jax.report(params, specops.Monitor())
    assert {row.name for row in report.constrained} == {"layers/0/weight", "layers/1/weight"}
    stack = eqx.filter_vmap(lambda key: eqx.nn.Linear(3, 2, key=key))(
        jax.random.split(jax.random.key(0), 4)
    )
    found = specops_jax.geometries_of(stack)["weight"]
    assert specops.spectral_norm(stack.weight, found).shape == (4,)


HAIKU = [
    (lambda x: hk.Linear(3)(x), (4,), "linear/w"),
    (lambda x: hk.Conv2D(4, (3, 2), stride=2)(x), (5, 6, 2), "conv2_d/w"),
    (lambda x: hk.Conv1D(4, 3, rate=2, padding="VALID")(x), (9, 2), "conv1_d/w"),
    (lambda x: hk.Conv2D(4, 3, padding=(1, 1))(x), (5, 4, 2), "conv2_d/w"),
    (lambda x: hk.Conv2D(4, 3, data_format="NCHW")(x), (2, 5, 4), "conv2_d/w"),
    (lambda x: hk.Conv2DTranspose(3, (3, 2), stride=2)(x), (4, 3, 2), "conv2_d_transpose/w"),
    (lambda x: hk.Conv1DTranspose(3, 4, padding="VALID")(x), (4, 2), "conv1_d_transpose/w"),
    (lambda x: hk.DepthwiseConv2D(2, (3, 3))(x), (4, 5, 2), "depthwise_conv2_d/w"),
]


@pytest.mark.parametrize(("function", "shape", "name"), HAIKU, ids=range(len(HAIKU)))
def test_haiku_layers(function: Any, shape: tuple[int, ...], name: str) -> None:
    model = hk.without_apply_rng(hk.transform(function))
    x = jnp.zeros((1, *shape))
    params = model.init(jax.random.key(0), x)
    geometries = specops_jax.geometries_of(hk.transform(function), x)
    agrees(params, geometries, name, explicit(lambda x: model.apply(params, x), shape))


def test_names_and_sizes_of_a_whole_model() -> None:
    class Net(linen.Module):
        @linen.compact
        def __call__(self, x: Any) -> Any:
            x = linen.Conv(4, (3, 3), strides=2)(x)
            x = linen.BatchNorm(use_running_average=True)(x)
            x = linen.Conv(4, (3, 3), padding="REFLECT")(x)
            x = linen.MultiHeadDotProductAttention(num_heads=2)(x.reshape(x.shape[0], -1, 4))
            return linen.Embed(5, 4)(jnp.zeros((1,), int)) + linen.Dense(4)(x)

    x = jnp.zeros((2, 8, 6, 1))
    params = Net().init(jax.random.key(0), x)["params"]
    found = specops_jax.geometries_of(Net(), x)
    report = specops_jax.report(params, specops.Monitor(), found, measure=False)
    rules = {row.name: row for row in report.rows}
    assert found["Conv_0/kernel"].grid == (8, 6)
    assert "torus" in rules["Conv_1/kernel"].reason
    assert "embedding" in rules["Embed_0/embedding"].reason
    attention = "MultiHeadDotProductAttention_0"
    assert rules[f"{attention}/query/kernel"].rule
    assert rules[f"{attention}/out/kernel"].rule
    assert found[f"{attention}/out/kernel"].out_axes == (-1,)
    assert "1-d" in rules["BatchNorm_0/scale"].reason
    wrapped = specops_jax.report({"params": params}, specops.Monitor(), found, measure=False)
    assert [row.name for row in wrapped.rows] == [row.name for row in report.rows]


def test_flags_among_the_inputs_are_not_traced() -> None:
    class Net(linen.Module):
        @linen.compact
        def __call__(self, x: Any, train: bool) -> Any:
            return linen.Dense(3)(x) if train else linen.Dense(3)(x) + 1

    assert set(specops_jax.geometries_of(Net(), jnp.ones((1, 2)), True)) == {"Dense_0/kernel"}


def test_scanned_layers_are_stacks() -> None:
    class Layer(linen.Module):
        @linen.compact
        def __call__(self, carry: Any, _: Any) -> Any:
            return linen.Dense(3)(carry), None

    stack = linen.scan(Layer, variable_axes={"params": 0}, split_rngs={"params": True}, length=4)
    x = jnp.zeros((2, 3))
    params = stack().init(jax.random.key(0), x, None)["params"]
    found = specops_jax.geometries_of(stack(), x, None)
    weight = params["Dense_0"]["kernel"]
    expected = np.linalg.norm(np.asarray(weight), 2, axis=(-2, -1))
    norms = specops.spectral_norm(weight, found["Dense_0/kernel"])
    np.testing.assert_allclose(np.asarray(norms), expected, rtol=1e-5)


def test_unknown_modules_and_missing_inputs_say_what_to_do() -> None:
    with pytest.raises(specops.errors.AdapterError, match="geometries_of"):
        specops_jax.geometries_of(linen.Dense(3))
    with pytest.raises(specops.errors.AdapterError, match="haiku"):
        specops_jax.geometries_of(object())
    with pytest.raises(specops.errors.PlanError, match="geometries"):
        specops_jax.init({"w": jnp.ones((2, 2))}, specops.ClipSpectralNorm(1.0))


def test_a_layer_called_at_two_sizes_is_known_at_the_larger() -> None:
    class Net(linen.Module):
        padding: str = "SAME"

        @linen.compact
        def __call__(self, x: Any) -> Any:
            layer = linen.Conv(2, (3, 3), padding=self.padding)
            return layer(x).sum() + layer(x[:, :4, :3]).sum()

    x = jnp.zeros((1, 6, 5, 2))
    assert specops_jax.geometries_of(Net(), x)["Conv_0/kernel"].grid == (6, 5)
    assert specops_jax.geometries_of(Net("CIRCULAR"), x)["Conv_0/kernel"].grid is None


def test_the_same_of_layers_that_are_objects() -> None:
    class Twice(nnx.Module):
        def __init__(self) -> None:
            self.conv = nnx.Conv(2, 2, (3, 3), rngs=nnx.Rngs(0))

        def __call__(self, x: Any) -> Any:
            return self.conv(inputs=x).sum() + self.conv(x[:, :4, :3]).sum()

    assert specops_jax.geometries_of(Twice(), jnp.zeros((1, 6, 5, 2)))["conv/kernel"].grid == (6, 5)

    class Pair(eqx.Module):
        conv: Any

        def __call__(self, x: Any) -> Any:
            return self.conv(x).sum() + self.conv(x[:, :4, :3]).sum()

    pair = Pair(eqx.nn.Conv2d(2, 2, 3, padding=1, key=jax.random.key(0)))
    assert specops_jax.geometries_of(pair, jnp.zeros((2, 6, 5)))["conv/weight"].grid == (6, 5)


@pytest.mark.parametrize("axis", [0, 1])
def test_scanned_linen_layers_are_stacks_along_their_own_axis(axis: int) -> None:
    class Block(linen.Module):
        @linen.compact
        def __call__(self, x: Any, _: Any) -> Any:
            return linen.Dense(4)(x), None

    class Net(linen.Module):
        length: int

        @linen.compact
        def __call__(self, x: Any) -> Any:
            scanned = linen.scan(
                Block,
                variable_axes={"params": axis},
                split_rngs={"params": True},
                length=self.length,
            )
            return scanned(name="blocks")(x, None)[0]

    x = jnp.ones((2, 4))
    geometry = specops_jax.geometries_of(Net(3), x)["blocks/Dense_0/kernel"]
    assert geometry.batch_axes == (axis,)
    kernel = Net(3).init(jax.random.key(0), x)["params"]["blocks"]["Dense_0"]["kernel"]
    expected = [np.linalg.norm(np.take(np.asarray(kernel), i, axis=axis), 2) for i in range(3)]
    np.testing.assert_allclose(specops.spectral_norm(kernel, geometry), expected, rtol=1e-5)
    # As many layers as features: which axis is the stack cannot be told.
    unknown = specops_jax.geometries_of(Net(4), x)
    assert "blocks/Dense_0/kernel" not in unknown
    assert "stack" in unknown.reasons["blocks/Dense_0/kernel"]


def test_stacked_haiku_layers_are_known_by_the_stacks_name() -> None:
    def net(x: Any) -> Any:
        x = hk.Linear(5, name="first")(x)
        return hk.experimental.layer_stack(3)(lambda x: hk.Linear(5, name="inner")(x))(x)

    transformed, x = hk.transform(net), jnp.ones((2, 4))
    params = transformed.init(jax.random.key(0), x)
    found = specops_jax.geometries_of(transformed, x)
    report = specops_jax.report(params, specops.ClipSpectralNorm(1.0), found)
    assert len(report.constrained) == 2
    stack = next(name for name in found if name.endswith("inner/w"))
    assert found[stack].batch_axes == (0,)


def test_stacked_general_nnx_layers_are_stacks() -> None:
    @nnx.vmap(in_axes=0, out_axes=0)
    def stack(rngs: Any) -> Any:
        return nnx.LinearGeneral((2, 3), (4,), axis=(-2, -1), rngs=rngs)

    geometry = specops_jax.geometries_of(stack(nnx.Rngs(0).split(7)))["kernel"]
    assert geometry.batch_axes == (0,)
    assert geometry.out_axes == (3,)
