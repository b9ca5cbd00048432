"""Folders of torch.distributed.checkpoint, whole, in pieces, and hostile ones."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from specops.checkpoints import open_checkpoint
from specops.errors import CheckpointError

torch = pytest.importorskip("torch")
dcp = pytest.importorskip("torch.distributed.checkpoint")
pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
W = torch.arange(12.0).reshape(3, 4)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A checkpoint of a model, an optimizer and a number, in one process."""
    state = {
        "model": {"w": W, "half": W.bfloat16(), "scalar": torch.tensor(2.5)},
        "optim": {"state": {"0": W}},
        "epoch": 3,
    }
    dcp.save(state, checkpoint_id=tmp_path / "step")
    return tmp_path / "step"


def test_every_tensor_is_read(folder: Path) -> None:
    with open_checkpoint(folder) as found:
        assert (found.format, found.layout) == ("torch.distributed.checkpoint", "torch")
        entries = {e.name: e for e in found.entries}
        assert set(entries) == {
            *("model.w", "model.half", "model.scalar", "epoch", "optimizer.optim.state.0"),
        }
        assert entries["epoch"].harmless
        assert entries["model.half"].dtype == "bfloat16"
        for name in ("model.w", "model.half"):
            np.testing.assert_array_equal(found.read(name), W.numpy())
        assert found.read("model.scalar") == 2.5


def rewritten(folder: Path, change: Any) -> None:
    """Change the metadata."""
    told = pickle.loads((folder / ".metadata").read_bytes())
    change(told)
    (folder / ".metadata").write_bytes(pickle.dumps(told))


def test_pieces_are_put_together(folder: Path) -> None:
    from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex

    folder = folder.parent / "pieces"
    dcp.save({"a": W[:2].clone(), "b": W[2:].clone()}, checkpoint_id=folder)

    def split(told: Any) -> None:
        tensors, stored = told.state_dict_metadata, told.storage_data
        index = {i.fqn: i for i in stored}
        tensors["a"].size = W.shape
        tensors["a"].chunks.append(ChunkStorageMetadata(torch.Size((2, 0)), torch.Size((1, 4))))
        stored[MetadataIndex("a", torch.Size((2, 0)))] = stored.pop(index["b"])
        del tensors["b"]

    rewritten(folder, split)
    with open_checkpoint(folder) as found:
        np.testing.assert_array_equal(found.read("a"), W.numpy())


@pytest.mark.parametrize("kind", ["outside", "missing", "short", "false"])
def test_what_is_wrong_is_said_of_each_tensor(folder: Path, kind: str) -> None:
    def change(told: Any) -> None:
        index = next(i for i in told.storage_data if i.fqn == "model.w")
        info = told.storage_data[index]
        if kind == "outside":
            info.relative_path = "../elsewhere.distcp"
        if kind == "missing":
            info.relative_path = "__9_0.distcp"
        if kind == "short":
            info.offset = 10**9
        if kind == "false":
            size = torch.Size((1 << 20, 1 << 20))
            told.state_dict_metadata["model.w"].size = size
            told.state_dict_metadata["model.w"].chunks[0].sizes = size

    rewritten(folder, change)
    said = {"outside": "outside the folder", "missing": "missing", "short": "beyond the end"}
    with open_checkpoint(folder) as found:
        problems = {e.name: e.problem for e in found.entries}
        assert said.get(kind, "more bytes than") in problems["model.w"]
        assert problems["model.half"] == ""


def test_metadata_that_would_run_code_is_refused(folder: Path, tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> Any:
            return os.system, (f"touch {tmp_path / 'ran'}",)

    (folder / ".metadata").write_bytes(pickle.dumps(Evil()))
    with pytest.raises(CheckpointError, match="which loading could run"):
        open_checkpoint(folder)
    assert not (tmp_path / "ran").exists()
    with pytest.raises(CheckpointError, match="name its folder"):
        open_checkpoint(folder / "__0_0.distcp")
