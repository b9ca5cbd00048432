"""Each layer's matrix, made from unit vectors, against the one that its geometry describes."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
import pytest
from keras import layers
from specops_keras import plugin
from specops_keras.geometry import _einsum, roles
from specops_keras.variables import locate

import specops

CASES = {
    "dense": (layers.Dense(3), (5,)),
    "conv1d": (layers.Conv1D(3, 3), (7, 2)),
    "conv1d strided": (layers.Conv1D(3, 4, strides=3, padding="same"), (8, 2)),
    "conv1d causal": (layers.Conv1D(3, 3, padding="causal", dilation_rate=2), (7, 2)),
    "conv1d causal strided": (layers.Conv1D(3, 3, padding="causal", strides=2), (7, 2)),
    "conv2d": (layers.Conv2D(3, (3, 2), padding="same"), (5, 4, 2)),
    "conv2d strided": (layers.Conv2D(3, 3, strides=2, padding="same"), (6, 5, 2)),
    "conv2d wide stride": (layers.Conv2D(3, 2, strides=3, padding="same"), (5, 6, 2)),
    "conv2d dilated": (layers.Conv2D(3, 3, dilation_rate=(1, 2), padding="same"), (5, 6, 2)),
    "conv2d grouped": (layers.Conv2D(6, 3, groups=2, strides=2), (5, 6, 4)),
    "conv3d": (layers.Conv3D(2, 2, strides=(1, 2, 1), padding="same"), (3, 4, 2, 2)),
    "depthwise1d": (layers.DepthwiseConv1D(3, depth_multiplier=2, padding="same"), (6, 3)),
    "depthwise2d": (layers.DepthwiseConv2D(3, depth_multiplier=2), (5, 4, 3)),
    "depthwise2d strided": (
        layers.DepthwiseConv2D(3, strides=2, padding="same", depth_multiplier=3),
        (5, 6, 2),
    ),
    "einsum": (layers.EinsumDense("abc,cde->abde", (None, 2, 3)), (1, 4)),
    "einsum joined": (layers.EinsumDense("abcd,cde->abe", (None, 3)), (1, 2, 4)),
    "einsum ellipsis": (layers.EinsumDense("...x,xy->...y", 3), (1, 4)),
}
TRANSPOSES = [
    (1, 3, "valid", None, 1),
    (2, 3, "valid", None, 1),
    (3, 2, "valid", None, 1),
    (2, 4, "same", None, 1),
    (2, 3, "same", None, 1),
    (3, 4, "same", None, 1),
    (3, 2, "same", None, 1),
    (1, 4, "same", None, 2),
    (2, 3, "same", 0, 1),
    (3, 5, "same", 1, 1),
    (2, 3, "valid", 1, 1),
]


def matrix_of(layer: Any, shape: tuple[int, ...], channels_first: bool = False) -> np.ndarray:
    """Rows and columns with the channels before the grid."""

    def apply(batch: np.ndarray) -> np.ndarray:
        return keras.ops.convert_to_numpy(layer(keras.ops.convert_to_tensor(batch)))

    size = int(np.prod(shape))
    unit = np.eye(size, dtype="float32").reshape(size, *shape)
    out = apply(unit) - apply(np.zeros((1, *shape), "float32"))
    if not channels_first and hasattr(layer, "data_format"):
        out = np.moveaxis(out, -1, 1)
        order = np.moveaxis(np.arange(size).reshape(shape), -1, 0).ravel()
        return out[order].reshape(size, -1).T
    return out.reshape(size, -1).T


def assert_described(layer: Any, shape: tuple[int, ...], channels_first: bool = False) -> None:
    expected = matrix_of(layer, shape, channels_first)
    at = next(v for v in locate(layer) if v.weight.geometry is not None)
    geometry = at.geometry()
    w = keras.ops.convert_to_numpy(at.read())
    if isinstance(geometry, specops.Conv):
        assert geometry.grid is not None
    got = specops.linear_operator(w, geometry).to_matrix()
    np.testing.assert_allclose(got, expected, atol=2e-5)
    values = np.linalg.svd(expected, compute_uv=False)
    np.testing.assert_allclose(
        specops.singular_values(w.astype("float64"), geometry), values, atol=1e-4
    )


@pytest.mark.parametrize("label", CASES)
def test_matrix(label: str) -> None:
    layer, shape = CASES[label]
    fresh = type(layer).from_config(layer.get_config())
    assert_described(fresh, shape)


@pytest.mark.parametrize(
    "layer",
    [
        layers.Conv2D(3, 3, strides=2, padding="same", data_format="channels_first"),
        layers.DepthwiseConv2D(3, depth_multiplier=2, data_format="channels_first"),
        layers.Conv2DTranspose(3, 3, strides=2, padding="same", data_format="channels_first"),
    ],
    ids=lambda layer: type(layer).__name__,
)
def test_channels_first(layer: Any) -> None:
    fresh = type(layer).from_config(layer.get_config())
    assert_described(fresh, (2, 6, 5), channels_first=True)


@pytest.mark.parametrize("kind", [layers.SeparableConv1D, layers.SeparableConv2D])
def test_separable(kind: Any) -> None:
    """The layer is the product of its two maps."""
    shape = (6, 3) if kind is layers.SeparableConv1D else (5, 6, 3)
    layer = kind(4, 3, strides=2, padding="same", depth_multiplier=2)
    expected = matrix_of(layer, shape)
    depthwise, pointwise = [v for v in locate(layer) if v.weight.geometry is not None]
    first, second = (
        specops.linear_operator(keras.ops.convert_to_numpy(v.read()), v.geometry()).to_matrix()
        for v in (depthwise, pointwise)
    )
    places = np.eye(len(first) // second.shape[1])
    np.testing.assert_allclose(np.kron(second, places) @ first, expected, atol=2e-5)


def test_equations_that_are_no_matrix() -> None:
    reasons = {
        "ab,b->ab": "no matrix",
        "abc,cd->ad": "sums the input",
        "ab,bcd->ac": "sums the kernel",
    }
    for equation, reason in reasons.items():
        assert reason in _einsum(equation).obstacle
    stack = _einsum("abc,bcd->abd").geometry
    assert stack == specops.Dense(out_axes=(2,), in_axes=(1,), batch_axes=(0,))


@pytest.mark.parametrize("kind", [layers.Conv1DTranspose, layers.Conv2DTranspose])
@pytest.mark.parametrize(("stride", "size", "padding", "extra", "dilation"), TRANSPOSES)
def test_transposed(
    kind: Any, stride: int, size: int, padding: str, extra: int | None, dilation: int
) -> None:
    layer = kind(
        3,
        size,
        strides=stride,
        padding=padding,
        output_padding=extra,
        dilation_rate=dilation,
    )
    assert_described(layer, (5, 2) if kind is layers.Conv1DTranspose else (4, 3, 2))


def test_transposed_3d() -> None:
    layer = layers.Conv3DTranspose(2, (2, 3, 1), strides=(2, 1, 1), padding="same")
    assert_described(layer, (2, 3, 2, 2))


def test_layers_that_compute_otherwise_are_left_alone() -> None:
    class Doubled(layers.Dense):
        def call(self, inputs: Any, training: Any = None) -> Any:
            return 2 * super().call(inputs)

    class Named(layers.Dense):
        """Computes as its base."""

    adapted = layers.Dense(4)
    adapted.build((None, 4))
    adapted.enable_lora(2)
    for layer, said in ((Doubled(4), "a call of its own"), (adapted, "LoRA"), (Named(4), "")):
        if not layer.built:
            layer.build((None, 4))
        ((_, role),) = roles(layer)
        assert said in role.obstacle
        assert (role.geometry is None) == bool(said)


def test_without_a_backend_the_adapter_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(plugin.util, "find_spec", lambda name: True if name == "keras" else None)
    status = plugin.specops_adapter_status()
    assert not status.available
    assert "pip install jax" in status.detail
