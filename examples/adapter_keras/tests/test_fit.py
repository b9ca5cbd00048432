"""The callback in `fit`, and the life of models around it."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
from keras import layers
from specops_keras import Spectral, plugin

import specops
from specops.errors import (
    AdapterError,
    HookLostWarning,
    NonFiniteError,
    NonFiniteWarning,
    PlanError,
)

JAX = keras.backend.backend() == "jax"
CLIP = specops.ClipSpectralNorm(1.0)
X = np.random.default_rng(0).standard_normal((24, 6, 6, 2)).astype("float32")
Y = np.random.default_rng(1).standard_normal((24, 3)).astype("float32")


def network(dtype: Any = None, **compiled: Any) -> keras.Model:
    net = keras.Sequential(
        [
            keras.Input((6, 6, 2)),
            layers.Conv2D(4, 3, strides=2, padding="same", name="conv", dtype=dtype),
            layers.DepthwiseConv2D(2, depth_multiplier=2, name="depthwise", dtype=dtype),
            layers.Flatten(),
            layers.Dense(3, name="dense", dtype=dtype),
        ]
    )
    rng = np.random.default_rng(2)
    for v in net.weights:
        v.assign(rng.standard_normal(v.shape))
    optimizer = compiled.pop("optimizer", None) or keras.optimizers.SGD(0.001, momentum=0.5)
    net.compile(optimizer, "mse", **compiled)
    return net


def fit(net: keras.Model, *callbacks: Any, epochs: int = 1, batch: int = 4) -> None:
    net.fit(X, Y, batch_size=batch, epochs=epochs, shuffle=False, verbose=0, callbacks=callbacks)


def values(net: keras.Model) -> list[np.ndarray]:
    return [np.array(keras.ops.convert_to_numpy(v.value)) for v in net.weights]


class Norms(keras.callbacks.Callback):
    """Norms after every batch, of what the variables hold."""

    def __init__(self, spectral: Spectral) -> None:
        super().__init__()
        self.spectral, self.seen = spectral, []

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        report = self.spectral.report()
        self.seen.append({row.name: row.norm for row in report.constrained})


@pytest.mark.parametrize("eagerly", [False, True])
def test_the_bound_holds_after_every_batch(eagerly: bool) -> None:
    free = Spectral(specops.Monitor())
    watched = Norms(free)
    fit(network(run_eagerly=eagerly), free, watched)
    assert all(norm > 1.01 for norm in watched.seen[-1].values())
    spectral = Spectral(CLIP)
    norms = Norms(spectral)
    net = network(run_eagerly=eagerly)
    fit(net, spectral, norms)
    assert len(norms.seen) == 6
    assert set(norms.seen[0]) == {"conv/kernel", "depthwise/kernel", "dense/kernel"}
    # Convolutions are reported by a certified bound, which is above the norm.
    assert all(row["dense/kernel"] <= 1.0001 for row in norms.seen)
    bounded = [spectral_norm for row in norms.seen for spectral_norm in row.values()]
    assert max(bounded) <= 1.01
    assert net.optimizer.iterations == 6


def test_other_weights_train_as_without() -> None:
    plain, net = network(), network()
    fit(plain)
    # The last layer's kernel changes after the only step, so nothing else can.
    fit(net, Spectral(specops.Plan([("dense/kernel", CLIP)])), batch=24)
    plain = network()
    fit(plain, batch=24)
    for v, a, b in zip(net.weights, values(plain), values(net), strict=True):
        assert np.array_equal(a, b) == (not v.path.endswith("dense/kernel"))


def steps(spectral: Spectral) -> list[int]:
    return [r["step"] for r in spectral.history if r["name"] == "dense/kernel"]


def test_intervals_and_the_last_word() -> None:
    spectral = Spectral(CLIP, every=4)
    fit(network(), spectral, epochs=2, batch=4)
    assert steps(spectral) == [4, 8, 12, 12]
    stopped = Spectral(specops.Plan([("*", CLIP)], start=1, stop=5, every=2))
    fit(network(), stopped)
    assert steps(stopped) == [3]


def test_a_second_fit_goes_on_counting() -> None:
    spectral, net = Spectral(specops.Monitor(), every=4), network()
    fit(net, spectral)
    fit(net, spectral)
    assert steps(spectral) == [4, 6, 8, 12, 12]


@pytest.mark.skipif(not JAX, reason="Keras has steps_per_execution on JAX and TensorFlow only")
def test_several_steps_between_callbacks() -> None:
    spectral = Spectral(CLIP, every=3)
    fit(network(steps_per_execution=4), spectral, epochs=2)  # 6 batches: 4 and 2
    assert steps(spectral) == [4, 6, 10, 12, 12]


def test_accumulated_gradients_are_one_step() -> None:
    spectral = Spectral(specops.Monitor(), every=2)
    optimizer = keras.optimizers.SGD(0.001, gradient_accumulation_steps=3)
    fit(network(optimizer=optimizer), spectral, epochs=2)
    assert steps(spectral) == [2, 4, 4]


def test_skipped_steps_do_not_count() -> None:
    optimizer = keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD(0.001), initial_scale=2.0)
    x = X.copy()
    x[4:8] = np.inf
    spectral, net = Spectral(specops.Monitor()), network(optimizer=optimizer)
    net.fit(x, Y, batch_size=4, shuffle=False, verbose=0, callbacks=[spectral])
    assert steps(spectral) == [1, 2, 3, 4, 5, 5]


@pytest.mark.skipif(not JAX, reason="variables are always up to date on torch")
def test_variables_are_fetched_only_when_a_rule_may_be_due(monkeypatch: Any) -> None:
    spectral, net, fetched = Spectral(CLIP, every=3), network(), []
    sync = net.jax_state_sync

    def counted() -> None:
        if not net._jax_state_synced:
            fetched.append(spectral.steps)
        sync()

    monkeypatch.setattr(net, "jax_state_sync", counted)
    fit(net, spectral)
    assert fetched == [0, 3]


@pytest.mark.parametrize("dtype", ["mixed_bfloat16", "bfloat16", "float64"])
def test_dtypes(dtype: str) -> None:
    if JAX and dtype == "float64":
        pytest.skip("JAX runs without x64 here")
    spectral, net = Spectral(CLIP), network(dtype)
    fit(net, spectral)
    stored = {"mixed_bfloat16": "float32"}.get(dtype, dtype)
    assert {row.dtype for row in spectral.report().rows} == {stored}
    for row, v in zip(spectral.report().constrained, net.weights[::2], strict=True):
        weight = keras.ops.convert_to_numpy(v.value).astype("float64")
        geometry = spectral.geometries()[row.name]
        if row.name == "depthwise/kernel":
            weight = weight.reshape(2, 2, 1, 8)
        assert specops.spectral_norm(weight, geometry) <= 1.0001


def test_frozen_and_shared_layers() -> None:
    shared = layers.Conv2D(2, 3, padding="same", name="shared")
    given = keras.Input((6, 6, 2))
    twice = shared(layers.UpSampling2D(2)(shared(given)))
    out = layers.Dense(3, name="head")(layers.GlobalAveragePooling2D()(twice))
    net = keras.Model(given, out)
    net.get_layer("head").trainable = False
    net.compile("sgd", "mse")
    spectral = Spectral(CLIP)
    before = values(net)
    fit(net, spectral)
    report = spectral.report()
    assert [row.name for row in report.constrained] == ["shared/kernel"]
    assert report["head/kernel"].reason == "frozen (trainable=False)"
    assert np.array_equal(before[2], values(net)[2])
    assert spectral.geometries()["shared/kernel"].grid == (12, 12)
    spectral.detach()
    assert "call" not in vars(shared)


class Subclassed(keras.Model):
    """A convolution that is built for one size."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = layers.Conv2D(3, 3, name="conv")
        self.pool = layers.GlobalMaxPooling2D()

    def call(self, x: Any) -> Any:
        return self.pool(self.conv(x))


def test_sizes_may_grow() -> None:
    net = Subclassed()
    net(X[:1, :4, :4])
    net.compile("sgd", "mse")
    first, second = specops.attach(None, net, CLIP), Spectral(CLIP)
    assert first.geometries()["conv/kernel"].grid == (4, 4)
    fit(net, second)
    assert first.geometries() == second.geometries()
    assert first.geometries()["conv/kernel"].grid == (6, 6)
    saved = first.state_dict()
    first.detach()
    assert "call" in vars(net.conv)
    second.detach()
    assert "call" not in vars(net.conv)
    older = copy.deepcopy(saved)
    for weight in older["weights"].values():
        weight["grid"] = weight.pop("sizes")
    for state in (saved, older):
        again = specops.attach(None, net, CLIP)
        again.load_state_dict(state)
        assert again.geometries()["conv/kernel"].grid == (6, 6)
        again.detach()


def test_sizes_that_same_padding_begins_apart_on_stand_for_all() -> None:
    conv = layers.Conv1D(1, 4, strides=3, padding="same", use_bias=False)
    long, short, like_it = (keras.Input((n, 1)) for n in (4, 3, 6))
    net = keras.Model([short, like_it], [conv(short), conv(like_it)])
    (geometry,) = specops.attach(None, net, CLIP).geometries().values()
    assert geometry.grid == (6,)
    net = keras.Model([long, short], [conv(long), conv(short)])
    (geometry,) = specops.attach(None, net, CLIP).geometries().values()
    assert geometry.grid is None


def test_unknown_sizes_stand_for_all() -> None:
    net = keras.Sequential(
        [keras.Input((None, 6, 2)), layers.Conv2D(3, 3), layers.GlobalMaxPooling2D()]
    )
    net.compile("sgd", "mse")
    spectral = Spectral(CLIP)
    fit(net, spectral)
    (geometry,) = spectral.geometries().values()
    assert geometry.grid is None


def test_attention_is_its_projections() -> None:
    given = keras.Input((5, 8))
    attended = layers.MultiHeadAttention(2, 4, name="mha")(given, given)
    net = keras.Model(given, layers.Dense(1)(attended))
    report = specops.project(net, CLIP)
    names = {row.name for row in report.constrained}
    assert {f"mha/{k}/kernel" for k in ("query", "key", "value", "attention_output")} <= names
    assert all(row.norm <= 1.0001 for row in report.constrained)


def test_recurrent_gates_are_blocks() -> None:
    net = keras.Sequential([keras.Input((5, 4)), layers.LSTM(3, name="lstm")])
    for v in net.weights:
        v.assign(3.0 * np.random.default_rng(0).standard_normal(v.shape))
    specops.project(net, CLIP)
    for v in net.weights[:2]:
        gates = np.split(keras.ops.convert_to_numpy(v.value), 4, axis=1)
        assert all(np.linalg.norm(gate, 2) == pytest.approx(1.0, abs=1e-4) for gate in gates)


@pytest.mark.parametrize("form", ["keras", "weights.h5"])
def test_resuming_equals_going_on(tmp_path: Path, form: str) -> None:
    rule = specops.Plan([("*", CLIP)], every=2)
    straight, spectral = network(), Spectral(rule)
    fit(straight, spectral, batch=6)
    fit(straight, spectral, batch=6)
    net, first = network(), Spectral(rule)
    fit(net, first, batch=6)
    path = tmp_path / f"net.{form}"
    if form == "keras":
        net.save(path)
        resumed = keras.models.load_model(path)
    else:
        net.save_weights(path)
        resumed = network()
        resumed.optimizer.build(resumed.trainable_variables)
        resumed.load_weights(path)
        for a, b in zip(resumed.optimizer.variables, net.optimizer.variables, strict=True):
            a.assign(b)
    second = specops.attach(resumed.optimizer, resumed, rule)
    second.load_state_dict(first.state_dict())
    fit(resumed, second, batch=6)
    assert second.steps == spectral.steps == 8
    for a, b in zip(values(straight), values(resumed), strict=True):
        np.testing.assert_array_equal(a, b)


def test_state_of_others_is_refused() -> None:
    spectral = specops.attach(None, network(), CLIP)
    state = spectral.state_dict()
    state["weights"]["other"] = state["weights"].pop("dense/kernel")
    with pytest.raises(AdapterError, match=r"missing \['dense/kernel'\].*give layers names"):
        spectral.load_state_dict(state)


class Untouched:
    """A rule of somebody else, which looks at nothing."""

    stage = "weights"

    def init(self, weight: Any, geometry: Any, name: str) -> dict[str, Any]:
        return {}

    def update(self, weight: Any, geometry: Any, state: Any, **_: Any) -> tuple[Any, Any, Any]:
        return weight, state, {}


def test_nan_is_named_and_nothing_changes() -> None:
    net = network()
    spectral = specops.attach(None, net, CLIP)
    poisoned = net.get_layer("dense").kernel
    poisoned.assign(np.full(poisoned.shape, np.nan))
    before = values(net)
    with pytest.raises(NonFiniteError, match=r"dense/kernel holds NaN .* wrote to no weight"):
        spectral.step()
    for a, b in zip(before, values(net), strict=True):
        np.testing.assert_array_equal(a, b)
    with pytest.raises(NonFiniteError, match="conv/kernel holds NaN or infinity at step 1"):
        fit(net, Spectral(CLIP))
    spectral.detach()
    untouched = specops.attach(None, net, Untouched())
    with pytest.raises(NonFiniteError, match="wrote to no weight"):
        untouched.step()
    untouched.detach()
    lenient = specops.attach(None, net, specops.Plan([("dense/*", CLIP)]), on_nonfinite="warn")
    with pytest.warns(NonFiniteWarning, match="dense/kernel"):
        lenient.step()
    assert lenient.history[-1]["skipped"] == "not finite"


def test_bad_plans_stop_fit_before_the_first_step() -> None:
    net = network()
    spectral = Spectral(specops.Plan([("densse/*", CLIP)]))
    with pytest.raises(PlanError, match=r"'densse/\*' matches no parameter"):
        fit(net, spectral)
    assert not spectral.is_attached
    with pytest.raises(PlanError, match="bias or scale"):
        fit(net, Spectral(specops.Plan([("dense/bias", CLIP)])))
    assert net.optimizer.iterations == 0
    with pytest.raises(AdapterError, match="stage 'forward'"):
        Spectral(specops.SpectralNormalization(norm="operator"))
    with pytest.raises(AdapterError, match="stage 'gradients'"):
        Spectral(specops.SpectralNormPenalty(0.1, norm="operator"))
    with pytest.raises(AdapterError, match="has no weights yet"):
        specops.attach(None, keras.Sequential([layers.Dense(2)]), CLIP)
    with pytest.raises(AdapterError, match="no Keras optimizer"):
        specops.attach("sgd", net, CLIP)


def test_one_callback_for_one_model() -> None:
    spectral, net = Spectral(CLIP), network()
    with pytest.raises(AdapterError, match="not attached"):
        spectral.step()
    fit(net, spectral)
    with pytest.raises(AdapterError, match="cannot follow"):
        fit(network(), spectral)
    spectral.detach()
    assert not spectral.is_attached
    fit(network(), spectral)


def test_steps_that_nobody_told_of_are_noticed() -> None:
    net = network()
    attachment = specops.attach(net.optimizer, net, CLIP)
    fit(net)
    with pytest.warns(HookLostWarning, match=r"made 6 steps, of which .* 0"):
        attachment.report()


def test_geometries_speak_of_the_variable_as_it_is() -> None:
    net = network()
    view = specops.Dense(out_axes=(-1,), in_axes=(0, 1, 2))
    attachment = specops.attach(
        None, net, specops.Plan([("depthwise/kernel", CLIP)]), geometries={"depthwise/kernel": view}
    )
    attachment.step()
    stored = keras.ops.convert_to_numpy(net.get_layer("depthwise").kernel.value)
    assert np.linalg.norm(stored.reshape(-1, 2), 2) == pytest.approx(1.0, abs=1e-4)


def test_tensorflow_is_refused(monkeypatch: Any) -> None:
    net = network()
    assert plugin.specops_adapter(net).name == "keras"
    assert plugin.specops_adapter(object()) is None
    assert plugin.specops_adapter_status().available
    monkeypatch.setattr(keras.backend, "backend", lambda: "tensorflow")
    with pytest.raises(AdapterError, match="KERAS_BACKEND=torch or KERAS_BACKEND=jax"):
        plugin.specops_adapter(net)
    assert not plugin.specops_adapter_status().available
