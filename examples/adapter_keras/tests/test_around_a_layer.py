"""What stands around a layer: wrappers that rewrite its kernel, biases, a second callback."""

from __future__ import annotations

import keras
import numpy as np
import pytest
from keras import layers

import specops
from specops.errors import CautionWarning, PlanError

CLIP = specops.ClipSpectralNorm(0.5)


def normalised() -> keras.Model:
    wrapped = layers.SpectralNormalization(layers.Dense(4, name="inner"), name="wrapper")
    return keras.Sequential([keras.Input((3,)), wrapped, layers.Dense(2, name="plain")])


def test_a_kernel_that_a_wrapper_normalises_is_left_to_it() -> None:
    model = normalised()
    kernel = keras.ops.convert_to_numpy(model.get_layer("wrapper").layer.kernel.value)
    report = specops.project(model, CLIP)
    rows = {row.name: row for row in report.rows}
    assert "wrapper divides it by its norm" in rows["wrapper/inner/kernel"].reason
    assert [row.name for row in report.constrained] == ["plain/kernel"]
    after = keras.ops.convert_to_numpy(model.get_layer("wrapper").layer.kernel.value)
    assert np.array_equal(after, kernel)
    with pytest.raises(PlanError, match=r"wrapper divides it by its norm.*take the wrapper off"):
        specops.project(model, specops.Plan([("wrapper/*kernel", CLIP)]))


def test_biases_of_several_axes_are_biases() -> None:
    given = keras.Input((5, 6))
    attention = layers.MultiHeadAttention(2, 3, name="attention")
    model = keras.Model(given, attention(given, given))
    rows = {row.name: row for row in specops.project(model, CLIP).rows}
    assert rows["attention/query/bias"].reason == "a bias, no matrix"


def test_a_second_attachment_is_warned_of() -> None:
    model = normalised()
    first = specops.attach(None, model, CLIP)
    with pytest.warns(CautionWarning, match="plain/kernel is under ClipSpectralNorm.*already"):
        specops.attach(None, model, CLIP)
    assert first.is_attached


def test_statistics_of_old_weights_are_warned_of() -> None:
    model = keras.Sequential(
        [keras.Input((3,)), layers.Dense(4, name="dense"), layers.BatchNormalization(name="norm")]
    )
    specops.project(model, CLIP)  # statistics that no batch has been averaged into
    dense = model.get_layer("dense").kernel
    dense.assign(9.0 * dense.value)
    model(np.ones((8, 3), "float32"), training=True)
    specops.project(model, specops.Monitor())
    with pytest.warns(CautionWarning, match=r"project\(\).*norm.*training=True"):
        specops.project(model, CLIP)
    specops.project(model, CLIP)  # inside already
    model.get_layer("norm").trainable = False  # a fixed map, in training as well
    dense.assign(9.0 * dense.value)
    specops.project(model, CLIP)
