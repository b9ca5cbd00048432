"""Layers that hold several maps: the same blocks for the hook as for a file of their weights."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import specops
import specops_jax
from specops import Dense
from specops.errors import CautionWarning

RULE = specops.ClipSpectralNorm(0.5)
X = jnp.ones((2, 6))
KEY = jax.random.key(0)


def saved(path: Path, params: Any) -> dict[str, Any]:
    """The rows of a file of these parameters."""
    serialization = pytest.importorskip("flax.serialization")
    (path / "m.msgpack").write_bytes(serialization.to_bytes(params))
    return {w.name: w for w in specops.inspect(path / "m.msgpack", layout="jax").measured}


def blocks(kernel: Any, count: int) -> list[float]:
    parts = np.split(np.asarray(kernel, float), count, axis=1)
    return [float(np.linalg.norm(part, 2)) for part in parts]


@pytest.mark.parametrize(
    ("kind", "count"), [("OptimizedLSTMCell", 4), ("GRUCell", 3), ("SimpleCell", 1)]
)
def test_cells_of_nnx(kind: str, count: int, tmp_path: Path) -> None:
    nnx = pytest.importorskip("flax.nnx")
    cell = getattr(nnx, kind)(6, 5, rngs=nnx.Rngs(0))
    geometries = specops_jax.geometries_of(cell)
    wanted = Dense((-1,), splits=(5,) * count if count > 1 else None)
    assert geometries == {"dense_h/kernel": wanted, "dense_i/kernel": wanted}
    rows = saved(tmp_path, nnx.to_pure_dict(nnx.state(cell, nnx.Param)))
    for name, row in rows.items():
        assert row.geometry == geometries[name].describe()
    params = specops_jax.enforce(nnx.state(cell, nnx.Param), RULE, geometries)
    for layer in ("dense_i", "dense_h"):
        found = blocks(params[layer]["kernel"][...], count)
        assert found == pytest.approx([0.5] * count, rel=1e-5)


@pytest.mark.parametrize("kind", ["OptimizedLSTMCell", "LSTMCell", "GRUCell", "SimpleCell"])
@pytest.mark.parametrize("scanned", [False, True], ids=["a step", "a sequence"])
def test_cells_of_linen(kind: str, scanned: bool) -> None:
    nn = pytest.importorskip("flax.linen")
    cell = getattr(nn, kind)(5)
    model = nn.RNN(cell) if scanned else cell
    inputs = (
        (jnp.ones((2, 3, 6), "float32"),) if scanned else (cell.initialize_carry(KEY, X.shape), X)
    )
    params = model.init(KEY, *inputs)["params"]
    leaves = jax.tree.leaves_with_path(params)
    kernels = [jax.tree_util.keystr(at, simple=True, separator="/") for at, w in leaves if w.ndim]
    wanted = {name: Dense((-1,)) for name in kernels if name.endswith("kernel")}
    assert len(wanted) >= 2
    assert specops_jax.geometries_of(model, *inputs) == wanted
    bounded = specops_jax.enforce(params, RULE, wanted)
    for w in (w for w in jax.tree.leaves(bounded) if w.ndim == 2):
        assert np.linalg.norm(np.asarray(w, float), 2) <= 0.5 * (1 + 1e-5)


def test_a_cell_of_linen_that_computes_in_its_own_way_is_left_alone() -> None:
    nn = pytest.importorskip("flax.linen")

    class Doubled(nn.OptimizedLSTMCell):
        def __call__(self, carry: Any, inputs: Any) -> Any:
            return super().__call__(carry, 2 * inputs)

    cell = Doubled(5)
    geometries = specops_jax.geometries_of(cell, cell.initialize_carry(KEY, X.shape), X)
    assert not geometries
    assert "of its own" in geometries.reasons["hf/kernel"]


@pytest.mark.parametrize(("kind", "count"), [("LSTM", 4), ("GRU", 3)])
def test_cells_of_haiku(kind: str, count: int, tmp_path: Path) -> None:
    hk = pytest.importorskip("haiku")

    def run(x: Any) -> Any:
        core = getattr(hk, kind)(5)
        return core(x, core.initial_state(len(x)))[0]

    model = hk.transform(run)
    params = model.init(jax.random.key(0), X)
    geometries = specops_jax.geometries_of(model, X)
    assert len(geometries) == (1 if kind == "LSTM" else 2)
    assert set(geometries.values()) == {Dense((-1,), splits=(5,) * count)}
    rows = saved(tmp_path, params)
    assert set(rows) == set(geometries)
    for name, row in rows.items():
        module, _, attribute = name.rpartition("/")
        assert row.figures.each == pytest.approx(blocks(params[module][attribute], count), rel=1e-5)


@pytest.mark.parametrize(("kind", "count"), [("LSTMCell", 4), ("GRUCell", 3)])
def test_cells_of_equinox(kind: str, count: int) -> None:
    eqx = pytest.importorskip("equinox")
    cell = getattr(eqx.nn, kind)(6, 5, key=jax.random.key(0))
    wanted = Dense((-2,), splits=(5,) * count)
    assert specops_jax.geometries_of(cell) == {"weight_ih": wanted, "weight_hh": wanted}
    stacked = eqx.filter_vmap(lambda key: getattr(eqx.nn, kind)(6, 5, key=key))(
        jax.random.split(jax.random.key(0), 2)
    )
    found = specops_jax.geometries_of(stacked)["weight_ih"]
    assert found == Dense((1,), batch_axes=(0,), splits=(5,) * count)


def attention(nnx: Any, **layers: int) -> Any:
    class Block(nnx.Module):
        def __init__(self) -> None:
            for name, outputs in layers.items():
                setattr(self, name, nnx.Linear(6, outputs, rngs=nnx.Rngs(0)))

    return Block()


def test_a_fused_layer_is_believed_by_what_is_around_it(tmp_path: Path) -> None:
    nnx = pytest.importorskip("flax.nnx")
    block = attention(nnx, qkv=18, proj=6)
    geometries = specops_jax.geometries_of(block)
    assert geometries["qkv/kernel"] == Dense((-1,), splits=(6, 6, 6))
    assert geometries["proj/kernel"] == Dense((-1,))
    row = saved(tmp_path, nnx.to_pure_dict(nnx.state(block, nnx.Param)))["qkv/kernel"]
    assert row.figures.each == pytest.approx(blocks(block.qkv.kernel[...], 3), rel=1e-5)


def test_what_nothing_tells_apart_is_one_matrix_and_said(tmp_path: Path) -> None:
    nnx = pytest.importorskip("flax.nnx")
    block = attention(nnx, qkv=18)
    geometries = specops_jax.geometries_of(block)
    assert geometries == {"qkv/kernel": Dense((-1,))}
    assert "one matrix" in geometries.remarks["qkv/kernel"]
    params = nnx.state(block, nnx.Param)
    row = saved(tmp_path, nnx.to_pure_dict(params))["qkv/kernel"]
    assert row.geometry == "ambiguous: dense, 3 blocks / dense"
    with pytest.warns(CautionWarning, match=r"qkv/kernel: .* one matrix"):
        specops_jax.init(params, RULE, geometries)
    told = geometries | {"qkv/kernel": Dense((-1,), splits=(6, 6, 6))}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        specops_jax.init(params, RULE, told)


def test_layers_stacked_by_scan(tmp_path: Path) -> None:
    nn = pytest.importorskip("flax.linen")

    class Block(nn.Module):
        @nn.compact
        def __call__(self, x: Any, _: Any) -> Any:
            q, k, v = jnp.split(nn.Dense(18, name="qkv")(x), 3, axis=-1)
            return nn.Dense(6, name="proj")(q + k + v), None

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x: Any) -> Any:
            scan = nn.scan(
                Block, variable_axes={"params": 0}, split_rngs={"params": True}, length=4
            )
            return scan(name="layers")(x, None)[0]

    model = Net()
    params = model.init(jax.random.key(0), X)["params"]
    geometries = specops_jax.geometries_of(model, X)
    wanted = Dense((-1,), batch_axes=(0,), splits=(6, 6, 6))
    assert geometries["layers/qkv/kernel"] == wanted
    row = saved(tmp_path, params)["layers/qkv/kernel"]
    assert row.geometry == wanted.describe()
    kernel = np.asarray(params["layers"]["qkv"]["kernel"], float)
    tops = [np.linalg.norm(part, 2) for i in range(3) for part in np.split(kernel, 3, axis=2)[i]]
    assert row.figures.each == pytest.approx(tops, rel=1e-5)


def test_monitored_blocks() -> None:
    eqx = pytest.importorskip("equinox")
    cell = eqx.filter(eqx.nn.LSTMCell(6, 5, key=jax.random.key(0)), eqx.is_array)
    rule = specops.Monitor()
    state = specops_jax.init(cell, rule)
    _, state = jax.jit(lambda w, s: specops_jax.project_params(w, rule, s))(cell, state)
    record = next(r for r in specops_jax.records(state) if r["name"] == "weight_ih")
    expected = blocks(cell.weight_ih.T, 4)
    assert record["spectral_norm"] == pytest.approx(expected, rel=1e-5)
    assert len(record["stable_rank"]) == 4
