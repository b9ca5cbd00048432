"""Every map of models of torch, flax and Keras in each of their formats, against their layers."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import specops
from specops import Conv, Dense
from specops.inspection import Inspection

pytestmark = pytest.mark.filterwarnings("ignore")


def norm(w: np.ndarray, geometry: Any) -> float:
    """The largest singular value, of a convolution over all sizes; of blocks the largest."""
    w = np.asarray(w, float)
    if isinstance(geometry, Dense):
        return float(np.max([np.max(n) for n in np.atleast_1d(specops.spectral_norm(w, geometry))]))
    plain = replace(geometry, input_shape=None, padding="same", output_padding=0)
    return float(specops.spectral_norm_bounds(w, plain, rtol=1e-6).upper)


def agree(found: Inspection, wanted: dict[str, float]) -> None:
    """No map more or less, and none whose value differs without a word."""
    assert not found.problems
    rows = {w.name: w for w in found.measured}
    assert set(rows) == set(wanted)
    for name, value in wanted.items():
        figures = rows[name].figures
        assert figures is not None
        low, high = figures.ends
        assert value <= high * (1 + 1e-4), (name, rows[name].why)
        if not rows[name].readings and "group assumed" not in rows[name].why:
            assert value >= low * (1 - 1e-4), (name, rows[name].why)
            assert high <= low * 1.01, name


@pytest.fixture(scope="module")
def torch_model() -> Any:
    torch = pytest.importorskip("torch")
    torch.manual_seed(0)
    nn = torch.nn
    return nn.ModuleDict(
        {
            "features": nn.Sequential(
                nn.Conv2d(1, 8, 3),
                nn.BatchNorm2d(8),
                nn.Conv2d(8, 8, 3, groups=8, bias=False),
                nn.Conv2d(8, 16, 1),
                nn.Conv2d(16, 8, 3, groups=4),
                nn.ConvTranspose2d(8, 4, 3),
                nn.ConvTranspose2d(4, 1, 2),
            ),
            "lstm": nn.LSTM(6, 5, num_layers=2, proj_size=3),
            "gru": nn.GRUCell(6, 5),
            "rnn": nn.RNN(6, 5),
            "attention": nn.MultiheadAttention(8, 2),
            "table": nn.Embedding(9, 4),
        }
    )


def of_torch(model: Any) -> dict[str, float]:
    from specops_torch import geometry_of

    wanted = {}
    for name, parameter in model.named_parameters():
        stem, _, last = name.rpartition(".")
        if parameter.dim() > 1:
            geometry = geometry_of(model.get_submodule(stem), last)
            wanted[name] = norm(parameter.detach().numpy(), geometry)
    return wanted


@pytest.mark.parametrize("kind", ["pt", "safetensors", "dcp"])
def test_torch(kind: str, torch_model: Any, tmp_path: Path) -> None:
    import torch

    state, path = torch_model.state_dict(), tmp_path / f"m.{kind}"
    if kind == "pt":
        torch.save(state, path)
    elif kind == "safetensors":
        pytest.importorskip("safetensors.torch").save_file(state, path)
    else:
        pytest.importorskip("torch.distributed.checkpoint").save(state, checkpoint_id=path)
    found = specops.inspect(path)
    wanted = of_torch(torch_model)
    agree(found, wanted)
    decided = {w.name for w in found.measured if not w.readings}
    assert len(decided) >= len(wanted) - (0 if kind == "pt" else 3)


@pytest.mark.parametrize("kind", ["msgpack", "orbax"])
def test_flax(kind: str, tmp_path: Path) -> None:
    linen = pytest.importorskip("flax.linen")
    import jax
    import jax.numpy as jnp

    class Model(linen.Module):
        @linen.compact
        def __call__(self, x: Any) -> Any:
            x = linen.Conv(8, (3, 3), use_bias=False)(x)
            x = linen.Conv(8, (3, 3), feature_group_count=8)(x)
            x = linen.ConvTranspose(6, (3, 3))(x).reshape(1, -1, 6)
            x = linen.MultiHeadDotProductAttention(2)(x, x)
            return linen.Dense(3)(linen.LayerNorm()(x))

    variables = jax.eval_shape(Model().init, jax.random.key(0), jnp.ones((1, 4, 4, 1)))
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda s: rng.normal(size=s.shape).astype("f"), variables["params"])
    if kind == "msgpack":
        serialization = pytest.importorskip("flax.serialization")
        (tmp_path / "m").write_bytes(serialization.to_bytes(params))
    else:
        ocp = pytest.importorskip("orbax.checkpoint")
        ocp.Checkpointer(ocp.PyTreeCheckpointHandler()).save(tmp_path / "m", params)
    kernels = {name: layer["kernel"] for name, layer in params.items() if "kernel" in layer}
    heads = params["MultiHeadDotProductAttention_0"]
    dot = "/" if kind == "msgpack" else "."
    wanted = {f"{n}{dot}kernel": norm(kernels[n], Dense((-1,))) for n in ("Dense_0",)}
    for name, groups in (("Conv_0", 1), ("Conv_1", 8), ("ConvTranspose_0", 1)):
        wanted[f"{name}{dot}kernel"] = norm(kernels[name], Conv(None, groups=groups, layout="*IO"))
    for name, out in (("query", (1, 2)), ("key", (1, 2)), ("value", (1, 2)), ("out", (2,))):
        stem = f"MultiHeadDotProductAttention_0{dot}{name}{dot}kernel"
        wanted[stem] = norm(heads[name]["kernel"], Dense(out))
    found = specops.inspect(tmp_path / "m")
    agree(found, wanted)
    assert not any(w.readings for w in found.measured)


def test_scanned_layers(tmp_path: Path) -> None:
    serialization = pytest.importorskip("flax.serialization")
    rng = np.random.default_rng(0)
    kernels = {
        "layers": {"wi": {"kernel": rng.normal(size=(12, 4, 6)), "bias": np.ones((12, 6))}},
        "attn": {"blocks": {"query": {"kernel": rng.normal(size=(3, 4, 2, 5))}}},
        "norms": {"layers": {"scale": np.ones((12, 4))}},
    }
    (tmp_path / "m").write_bytes(serialization.to_bytes(kernels))
    heads = kernels["attn"]["blocks"]["query"]["kernel"].reshape(3, 4, 10)
    wanted = {
        "layers/wi/kernel": np.linalg.norm(kernels["layers"]["wi"]["kernel"], 2, (1, 2)).max(),
        "attn/blocks/query/kernel": np.linalg.norm(heads, 2, (1, 2)).max(),
    }
    agree(specops.inspect(tmp_path / "m"), wanted)


_KERAS = """
import os, sys, json; os.environ["KERAS_BACKEND"] = "torch"
import keras, numpy as np
L = keras.layers
x = i = keras.Input((6, 6, 1))
convolutions = [
    L.Conv2D(4, 3, strides=2, padding="same", name="stem"),
    L.DepthwiseConv2D(2, depth_multiplier=2),
    L.Conv2DTranspose(6, 3, strides=2, name="up"), L.Conv2D(6, 2, groups=2, name="in_groups"),
]
sizes = {}
for layer in convolutions:
    sizes[layer.name] = x.shape[1]
    x = layer(x)
x = L.BatchNormalization()(x)
x = L.Reshape((-1, 6))(x)
x = L.MultiHeadAttention(2, 4)(x, x)
x = L.Bidirectional(L.LSTM(5, return_sequences=True))(x)
x = L.Dense(3)(L.GRU(4)(x))
model = keras.Model(i, x)
model.compile("adam", "mse")
rng = np.random.default_rng(0)
model.set_weights([rng.normal(size=w.shape).astype("f") for w in model.get_weights()])
norms = {}
for layer in convolutions:
    n, channels = sizes[layer.name], layer.input.shape[-1]
    basis = np.eye(n * n * channels, dtype="f").reshape(-1, n, n, channels)
    image = keras.ops.convert_to_numpy(layer(basis) - layer(0 * basis[:1]))
    norms[layer.name] = np.linalg.norm(image.reshape(len(basis), -1), 2)
def add(name, w):
    norms[name] = max(norms.get(name, 0), np.linalg.norm(w, 2))
for layer in model.layers:
    if isinstance(layer, L.Dense):
        add(layer.name, layer.get_weights()[0])
    if isinstance(layer, (L.GRU, L.Bidirectional)):
        for w in layer.get_weights():
            if w.ndim == 2 and w.shape[0] > 2:
                for block in np.split(w, 4 if isinstance(layer, L.Bidirectional) else 3, axis=1):
                    add(layer.name, block)
    if isinstance(layer, L.MultiHeadAttention):
        for w in layer.get_weights():
            if w.ndim == 3:
                add(layer.name, w.reshape(6, 8) if w.shape[0] == 6 else w.reshape(8, 6))
for kind in ("weights.h5", "keras", "h5"):
    (model.save_weights if kind == "weights.h5" else model.save)(f"{sys.argv[1]}/m.{kind}")
json.dump([{k: float(v) for k, v in norms.items()}, sizes], open(f"{sys.argv[1]}/truth", "w"))
"""


@pytest.mark.slow
def test_keras(tmp_path: Path) -> None:
    if find_spec("keras") is None or find_spec("torch") is None:
        pytest.skip("keras or torch is not installed")
    code = [sys.executable, "-W", "ignore", "-c", _KERAS, str(tmp_path)]
    subprocess.run(code, check=True, capture_output=True)
    norms, sizes = json.loads((tmp_path / "truth").read_text(encoding="utf-8"))
    paths = {"stem": "conv2d", "in_groups": "conv2d_1", "up": "conv2d_transpose"}
    for kind in ("h5", "keras", "weights.h5"):
        named = {n: n if kind == "h5" else paths.get(n, n) for n in norms}
        size = {f"*/{named[n]}/*": (s, s) for n, s in sizes.items()}
        found = specops.inspect(tmp_path / f"m.{kind}", input_size=size)
        assert not found.problems
        for name, value in norms.items():
            rows = [w for w in found.measured if f"/{named[name]}/" in w.name]
            assert rows
            tops = [w.figures.sigma_max for w in rows if w.figures is not None]
            exact = not any("assumed" in w.why or w.readings for w in rows)
            assert exact or kind == "weights.h5"
            if exact:
                assert max(tops) == pytest.approx(value, rel=1e-4), (kind, name, rows[0].why)
        assert len(found.measured) == 4 + 4 + 4 + 2 + 1


@pytest.mark.parametrize("kind", ["msgpack", "orbax"])
def test_layers_of_nnx_that_are_sums_or_have_several_axes(kind: str, tmp_path: Path) -> None:
    nnx = pytest.importorskip("flax.nnx")
    import jax

    class Model(nnx.Module):
        def __init__(self, rngs: Any) -> None:
            self.inside = nnx.LoRALinear(6, 5, lora_rank=2, rngs=rngs)
            base = nnx.Linear(6, 5, use_bias=False, rngs=rngs)
            self.around = nnx.LoRA(6, 2, 5, base_module=base, rngs=rngs)
            self.heads = nnx.LinearGeneral(6, (2, 4), rngs=rngs)

    model = Model(nnx.Rngs(0))
    rng = np.random.default_rng(0)
    state = jax.tree.map(lambda x: rng.normal(size=x.shape).astype("f"), nnx.state(model))
    nnx.update(model, state)
    if kind == "msgpack":
        serialization = pytest.importorskip("flax.serialization")
        (tmp_path / "m").write_bytes(serialization.to_bytes(nnx.to_pure_dict(state)))
        end, dot = "", "/"
    else:
        ocp = pytest.importorskip("orbax.checkpoint")
        ocp.Checkpointer(ocp.PyTreeCheckpointHandler()).save(tmp_path / "m", state)
        end, dot = ".value", "."
    rows = {w.name: w for w in specops.inspect(tmp_path / "m").measured}
    basis = np.eye(6, dtype="f")
    for name, layer in (
        (f"inside{dot}kernel", model.inside),
        (f"around{dot}base_module{dot}kernel", model.around),
        (f"heads{dot}kernel", model.heads),
    ):
        images = np.asarray(layer(basis) - layer(0 * basis), float).reshape(6, -1)
        row = rows[name + end + ("" if "heads" in name else " (merged)")]
        assert row.figures is not None
        assert row.figures.sigma_max == pytest.approx(np.linalg.norm(images, 2), rel=1e-4)
    assert not any("lora_" in name for name in rows)
