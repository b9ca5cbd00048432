"""Arrays without names one behind the other, and files that are refused with what to export."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest

import specops
from specops.checkpoints import open_checkpoint
from specops.errors import CheckpointError

ARRAYS = [np.arange(6.0).reshape(2, 3), np.float32([1, 2]), np.asarray(3), np.ones((4, 2, 3, 3))]


def behind_each_other(first: bytes = b"") -> bytes:
    file = io.BytesIO()
    file.write(first)
    for array in ARRAYS:
        np.save(file, array)
    return file.getvalue()


@pytest.mark.parametrize("first", [b"", json.dumps({"width": 3}).encode() + b"\n"])
def test_arrays_behind_each_other(first: bytes, tmp_path: Path) -> None:
    (tmp_path / "a.eqx").write_bytes(behind_each_other(first))
    with open_checkpoint(tmp_path / "a.eqx") as found:
        assert (found.format, found.layout) == ("equinox leaves", "torch")
        assert [e.name for e in found.entries] == [f"leaf.{i}" for i in range(4)]
        for entry, array in zip(found.entries, ARRAYS, strict=True):
            np.testing.assert_array_equal(found.read(entry.name), array)


def test_what_was_cut_off_is_said(tmp_path: Path) -> None:
    whole = behind_each_other()
    (tmp_path / "a.eqx").write_bytes(whole[:-10])
    problems = [e.problem for e in open_checkpoint(tmp_path / "a.eqx").entries]
    assert problems[:3] == ["", "", ""]
    assert "truncated" in problems[3]
    (tmp_path / "a.eqx").write_bytes(whole + b"\x93NUM")
    (problem,) = open_checkpoint(tmp_path / "a.eqx").problems
    assert problem.startswith("truncated or damaged behind 4 arrays")


def test_leaves_of_equinox_are_inspected(tmp_path: Path) -> None:
    eqx = pytest.importorskip("equinox")
    import jax

    keys = jax.random.split(jax.random.key(0), 3)
    model = [
        eqx.nn.Conv2d(1, 6, 3, key=keys[0]),
        eqx.nn.Conv2d(6, 6, 3, groups=6, key=keys[1]),
        eqx.nn.Linear(6, 5, key=keys[2], dtype=jax.numpy.bfloat16),
    ]
    eqx.tree_serialise_leaves(str(tmp_path / "m.eqx"), model)
    found = specops.inspect(tmp_path / "m.eqx")
    assert not found.problems
    geometries = {w.name: w.geometry for w in found.measured}
    assert geometries == {
        "leaf.0": "conv any size, zeros",
        "leaf.2": "conv any size, zeros, 6 groups",
        "leaf.4": "dense",
    }
    wanted = np.linalg.norm(np.asarray(model[2].weight, float), 2)
    assert found.measured[2].figures is not None
    assert found.measured[2].figures.sigma_max == pytest.approx(wanted, rel=1e-6)


def test_gates_of_cells_are_told_by_what_follows(tmp_path: Path) -> None:
    eqx = pytest.importorskip("equinox")
    import jax

    key = jax.random.key(0)
    cells = [eqx.nn.GRUCell(2, 3, key=key), eqx.nn.LSTMCell(12, 4, key=key)]
    eqx.tree_serialise_leaves(str(tmp_path / "m.eqx"), [*cells, eqx.nn.Linear(4, 16, key=key)])
    found = specops.inspect(tmp_path / "m.eqx")
    assert [w.geometry for w in found.measured] == [*["dense, 3 blocks"] * 2,
                                                    *["dense, 4 blocks"] * 2, "dense"]  # fmt: skip
    for row, w in zip(found.measured, [w for c in cells for w in (c.weight_ih, c.weight_hh)],
                      strict=False):  # fmt: skip
        count = len(w) // (3 if len(w) == 9 else 4)
        each = [np.linalg.norm(b, 2) for b in np.split(np.asarray(w, float), len(w) // count)]
        assert row.figures is not None
        assert row.figures.each == pytest.approx(each, rel=1e-6)
    bare = eqx.nn.LSTMCell(2, 4, use_bias=False, key=key)
    gated = [
        eqx.nn.Linear(*shape, use_bias=False, key=key) for shape in ((4, 16), (4, 16), (16, 4))
    ]
    eqx.tree_serialise_leaves(str(tmp_path / "b.eqx"), bare)
    without = specops.inspect(tmp_path / "b.eqx").measured
    assert [w.geometry for w in without] == ["ambiguous: dense, 4 blocks / dense"] * 2
    eqx.tree_serialise_leaves(str(tmp_path / "g.eqx"), gated)
    assert {w.geometry for w in specops.inspect(tmp_path / "g.eqx").measured} == {"dense"}


@pytest.mark.parametrize(
    ("name", "start", "said"),
    [
        ("m.gguf", b"GGUF\3\0\0\0" + bytes(60), "export those it was made of as safetensors"),
        ("m.onnx", b"\x08\x08\x12\x07pytorch" + bytes(60), "model.state_dict()"),
        ("m.tflite", b"\x1c\0\0\0TFL3" + bytes(60), "model.weights.h5"),
    ],
)
def test_programs_are_refused_with_what_to_export(
    name: str, start: bytes, said: str, tmp_path: Path
) -> None:
    (tmp_path / name).write_bytes(start)
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(tmp_path / name)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)
