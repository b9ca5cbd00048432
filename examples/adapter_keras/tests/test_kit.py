"""The conformance kit of specops, run on this adapter."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
from keras import layers

import specops
from specops.testing import AdapterSuite, Capabilities, LayerCase

RATE = 0.5


class Training:
    """A model that is trained batch by batch."""

    def __init__(self, model: keras.Model, rule_or_plan: Any, **options: Any) -> None:
        rng = np.random.default_rng(1)
        self.model = model
        self.x = rng.standard_normal((8, *model.input_shape[1:])).astype("float32")
        self.y = 5.0 * rng.standard_normal((8, *model.output_shape[1:])).astype("float32")
        model.compile(keras.optimizers.SGD(RATE, momentum=0.5), "mse")
        model.optimizer.build(model.trainable_variables)
        self.attachment = specops.attach(model.optimizer, model, rule_or_plan, **options)
        self.geometries = self.attachment.geometries()

    def step(self) -> None:
        self.model.train_on_batch(self.x, self.y)
        if self.attachment.is_attached:
            self.attachment.step()
            self.geometries = self.attachment.geometries()

    def weights(self) -> dict[str, np.ndarray]:
        return {name: _numpy(v.value).copy() for name, v in self._variables().items()}

    def outputs(self) -> np.ndarray:
        return _numpy(self.model(self.x, training=False))

    def report(self) -> specops.Report:
        return self.attachment.report()

    def history(self) -> list[dict[str, Any]]:
        return self.attachment.history

    def save(self) -> Any:
        variables = [*self.model.variables, *self.model.optimizer.variables]
        values = [_numpy(v.value).copy() for v in variables]
        return copy.deepcopy((values, self.attachment.state_dict()))

    def restore(self, saved: Any) -> None:
        variables = [*self.model.variables, *self.model.optimizer.variables]
        for variable, value in zip(variables, saved[0], strict=True):
            variable.assign(value)
        self.attachment.load_state_dict(saved[1])

    def set_weight(self, name: str, values: np.ndarray) -> None:
        self._variables()[name].assign(values)

    def enforce(self) -> None:
        self.attachment.enforce()

    def detach(self) -> None:
        self.attachment.detach()

    def _variables(self) -> dict[str, Any]:
        return {v.path.removeprefix(f"{self.model.name}/"): v for v in self.model.weights}


def _numpy(x: Any) -> np.ndarray:
    return keras.ops.convert_to_numpy(keras.ops.stop_gradient(x))


def _case(label: str, layer: Any, shape: tuple[int, ...], weight: str = "kernel") -> LayerCase:
    model = keras.Sequential([keras.Input(shape), layer], name="net")
    rng = np.random.default_rng(0)
    for v in model.weights:
        v.assign(rng.standard_normal(v.shape).astype("float32"))

    def apply(batch: np.ndarray) -> np.ndarray:
        return _numpy(model(keras.ops.convert_to_tensor(batch.astype("float32"))))

    return LayerCase(label, model, f"{layer.name}/{weight}", shape, apply)


def _separable(part: str) -> LayerCase:
    """The other of its two kernels is the identity."""
    layer = layers.SeparableConv2D(4, 3 if part == "depthwise" else 1, strides=2, padding="same")
    case = _case(f"separable {part}", layer, (5, 6, 4), f"{part}_kernel")
    if part == "depthwise":
        layer.pointwise_kernel.assign(np.eye(4, dtype="float32")[None, None])
    else:
        layer = layers.SeparableConv2D(3, 1)
        case = _case("separable pointwise", layer, (1, 1, 4), "pointwise_kernel")
        layer.depthwise_kernel.assign(np.ones((1, 1, 4, 1), "float32"))
    return case


class TestKeras(AdapterSuite):
    """Every check, on the backend that KERAS_BACKEND names."""

    name = "keras"
    capabilities = Capabilities(stages=("weights",))

    def model(self) -> keras.Model:
        net = keras.Sequential(
            [
                keras.Input((6, 6, 2)),
                layers.Conv2D(4, 3, strides=2, padding="same", activation="tanh", name="conv"),
                layers.Flatten(),
                layers.Dense(3, name="dense"),
            ],
            name="net",
        )
        rng = np.random.default_rng(0)
        for v in net.weights:
            v.assign(rng.standard_normal(v.shape).astype("float32"))
        return net

    def layers(self) -> Sequence[LayerCase]:
        return [
            _case("dense", layers.Dense(3), (4,)),
            _case("einsum", layers.EinsumDense("abc,cde->abde", (None, 2, 3)), (1, 4)),
            _case("conv1d causal", layers.Conv1D(3, 3, padding="causal"), (6, 2)),
            _case("conv2d", layers.Conv2D(3, 3, strides=2, padding="same"), (5, 6, 2)),
            _case("conv2d dilated", layers.Conv2D(3, 3, dilation_rate=2), (6, 6, 2)),
            _case("conv2d grouped", layers.Conv2D(4, 3, groups=2), (4, 4, 4)),
            _case("conv3d", layers.Conv3D(2, 2), (3, 3, 2, 2)),
            _case("depthwise", layers.DepthwiseConv2D(3, depth_multiplier=2), (4, 5, 3)),
            _separable("depthwise"),
            _separable("pointwise"),
            _case("transposed", layers.Conv1DTranspose(3, 3, strides=2, padding="same"), (4, 2)),
            _case("transposed 2d", layers.Conv2DTranspose(2, 3, strides=2), (3, 3, 2)),
        ]

    def start(self, model: keras.Model, rule_or_plan: Any, **options: Any) -> Training:
        return Training(model, rule_or_plan, **options)

    def freeze(self, model: keras.Model, name: str) -> None:
        model.get_layer(name.partition("/")[0]).trainable = False

    def array(self, values: np.ndarray) -> Any:
        return keras.ops.convert_to_tensor(values, dtype=str(values.dtype))

    def numpy(self, x: Any) -> np.ndarray:
        return _numpy(x)
