"""Layers of Keras whose maps neither names nor shapes tell: by the file's configuration."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import specops
from specops import Conv, Dense
from specops.inspection.assumptions import Context, assume
from specops.inspection.configuration import Configuration
from specops.inspection.hints import Hints


def guess(
    name: str, shape: Any, layer: Any = None, others: Any = None, hints: Hints | None = None
) -> Any:
    layers = {} if layer is None else {name.split("/")[1]: layer}
    configuration = Configuration("the file's Keras configuration", layers=layers)
    shapes = {name: tuple(shape), **(others or {})}
    context = Context(shapes, "keras", hints or Hints(), configuration)
    return assume(name, tuple(shape), "float32", context)


def einsum(equation: str) -> dict[str, Any]:
    return {"class_name": "EinsumDense", "config": {"equation": equation}}


@pytest.mark.parametrize(
    ("equation", "shape", "geometry"),
    [
        ("abc,cde->abde", (5, 2, 3), Dense((1, 2), (0,))),
        ("abcd,cde->abe", (2, 3, 5), Dense((2,), (0, 1))),
        ("...x,xy->...y", (4, 5), Dense((1,), (0,))),
        ("abc,dc->abd", (5, 4), Dense((0,), (1,))),
        ("ahc,hcd->ahd", (2, 4, 5), Dense((2,), (1,), (0,))),
    ],
)
def test_einsums_by_their_equation(equation: str, shape: Any, geometry: Dense) -> None:
    found = guess("layers/ein/vars/0", shape, einsum(equation))
    assert [r.geometry for r in found.readings] == [geometry]
    rng = np.random.default_rng(0)
    w = rng.normal(size=shape)
    operand = equation.partition(",")[0]
    spec = equation.replace("...", "z")
    sizes = dict(zip(equation.partition(",")[2].partition("->")[0], shape, strict=True))
    ends = [x for x in operand if x in sizes]
    basis = np.eye(int(np.prod([sizes[x] for x in ends]))).reshape(-1, *(sizes[x] for x in ends))
    free = [x for x in spec.partition(",")[0] if x not in sizes]
    for _ in free[1:]:
        basis = basis[:, None]
    images = np.einsum(spec, basis, w).reshape(len(basis), -1)
    assert np.max(specops.spectral_norm(w, geometry)) == pytest.approx(
        np.linalg.norm(images, 2), rel=1e-9
    )


def test_einsums_without_an_equation_are_ambiguous() -> None:
    found = guess("layers/einsum_dense_1/vars/0", (5, 2, 3))
    assert [r.geometry for r in found.readings] == [Dense((-2, -1)), Dense((-1,))]
    assert "bias" in guess("layers/einsum_dense_1/vars/1", (2, 3)).skipped
    for strange in ("abc->abc", "ab,bc->ac,d", ""):
        assert guess("layers/ein/vars/0", (5, 2, 3), einsum(strange)).readings


def test_grouped_queries_are_attention() -> None:
    stem = "layers/grouped_query_attention"
    assert guess(f"{stem}/_key_dense/vars/0", (8, 2, 4)).geometry == Dense((-2, -1))
    assert guess(f"{stem}/_output_dense/vars/0", (4, 4, 8)).geometry == Dense((-1,))
    assert "bias" in guess(f"{stem}/_query_dense/vars/1", (4, 4)).skipped


def test_gates_of_convolutions() -> None:
    kernel, recurrent = "layers/conv_lstm2d/cell/vars/0", "layers/conv_lstm2d/cell/vars/1"
    layer = {"class_name": "ConvLSTM2D", "config": {"strides": [2, 2], "padding": "same"}}
    shapes = {kernel: (3, 3, 4, 8), recurrent: (3, 3, 2, 8)}
    for told, stride in ((None, 1), (layer, 2)):
        found = guess(kernel, shapes[kernel], told, shapes)
        assert found.geometry == Conv(None, stride=stride, layout="*IO")
        again = guess(recurrent, shapes[recurrent], told, shapes)
        assert again.geometry == Conv(None, layout="*IO"), "of a state, at its own size"
        assert "4 gates" in again.why


def test_what_spectral_normalization_stores_beside_a_weight() -> None:
    stem = "layers/spectral_normalization"
    others = {f"{stem}/layer/vars/0": (5, 4)}
    assert guess(f"{stem}/layer/vars/0", (5, 4)).geometry == Dense((-1,))
    for name, shape in (("0", (5, 4)), ("1", (1, 4))):
        assert "SpectralNormalization" in guess(f"{stem}/vars/{name}", shape, None, others).skipped
    assert guess(f"{stem}/vars/0", (5, 4)).readings


def test_a_convolution_by_its_configuration_is_no_stack() -> None:
    layer = {"class_name": "Conv1DTranspose", "config": {"strides": [2]}}
    found = guess("model_weights/ct/ct/kernel", (3, 4, 6), layer)
    assert [r.geometry.transposed for r in found.readings] == [True]


def test_causal_layers_are_padded_on_one_side() -> None:
    config = {"padding": "causal", "dilation_rate": [2]}
    layer = {"class_name": "Conv1D", "config": config}
    (reading,) = guess("layers/c/vars/0", (3, 4, 6), layer, hints=Hints({"*": (9,)})).readings
    assert reading.geometry == Conv((9,), dilation=2, padding=((4, 0),), layout="*IO")


_CODE = """
import os, sys; os.environ["KERAS_BACKEND"] = "torch"
import keras, numpy as np
L = keras.layers
x = i = keras.Input((6, 8))
x = L.GroupQueryAttention(4, 4, 2)(x, x)
x = L.EinsumDense("abc,cde->abde", (None, 2, 3), bias_axes="de", name="ein")(x)
x = L.Reshape((6, 6, 1))(x)
x = L.Reshape((1, 6, 6, 1))(x)
x = L.ConvLSTM2D(2, 3, name="clstm")(x)
x = L.SpectralNormalization(L.Dense(4))(L.Flatten()(x))
model = keras.Model(i, x)
for kind in ("weights.h5", "keras", "h5"):
    (model.save_weights if kind == "weights.h5" else model.save)(f"{sys.argv[1]}/m.{kind}")
"""


@pytest.mark.slow
def test_every_format_holds_the_same_maps(tmp_path: Path) -> None:
    if find_spec("keras") is None or find_spec("torch") is None:
        pytest.skip("keras or torch is not installed")
    code = [sys.executable, "-W", "ignore", "-c", _CODE, str(tmp_path)]
    subprocess.run(code, check=True, capture_output=True, env={**os.environ})
    found = {k: specops.inspect(tmp_path / f"m.{k}") for k in ("keras", "h5", "weights.h5")}
    kinds = {k: sorted(w.geometry for w in f.measured) for k, f in found.items()}
    assert kinds["keras"] == kinds["h5"]
    assert len(kinds["keras"]) == 4 + 1 + 2 + 1
    (einsum_dense,) = (w for w in found["weights.h5"].measured if w.readings)
    assert "einsum_dense" in einsum_dense.name
