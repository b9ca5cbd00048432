"""What files claim is compared with what they hold before anything is unpacked or believed."""

from __future__ import annotations

import json
import os
import pickle
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from specops.checkpoints import open_checkpoint, room
from specops.errors import CheckpointError

from .writing import cut, f32, npy, raw_safetensors, zipped

torch = pytest.importorskip("torch")
ONE = np.arange(4, dtype=np.float32).tobytes()


def refusal(path: Path | str) -> str:
    """The one line with which a path is refused."""
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(path)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_equal_reasons_are_equal_texts(tmp_path: Path) -> None:
    header = {name: f32(16 * i, 16 * i + 16, 4) for i, name in enumerate("abcd")}
    found = open_checkpoint(raw_safetensors(tmp_path / "a", header, ONE + ONE[:3]))
    assert found.problems == ("truncated: 19 of 64 bytes of tensors are there",)
    assert {entry.problem for entry in found.entries[1:]} == {
        "its bytes lie beyond the end of the file"
    }
    assert found.entries[3].shape == (4,)


def test_shapes_of_false_headers_are_unknown(tmp_path: Path) -> None:
    header = {"a": f32(0, 4 * 10**15, 10**15), "b": f32(0, 16, 10**9), "c": f32(0, 16, -4)}
    found = open_checkpoint(raw_safetensors(tmp_path / "a", header, ONE))
    assert [entry.shape for entry in found.entries] == [None] * 3
    path = zipped(tmp_path / "a.npz", {"a.npy": npy((10**12,), ONE), "b.npy": npy((4,), ONE)})
    assert [entry.shape for entry in open_checkpoint(path).entries] == [None, (4,)]
    torch.save({"w": torch.ones(1).expand(10**12), "v": torch.ones(2)}, tmp_path / "a.pt")
    assert [e.shape for e in open_checkpoint(tmp_path / "a.pt").entries] == [None, (2,)]


def test_missing_shards_are_told_once(tmp_path: Path) -> None:
    index = {"weight_map": dict.fromkeys("abc", "lost.safetensors")}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    found = open_checkpoint(tmp_path)
    assert found.problems == ("shard lost.safetensors is missing; download it into this folder",)
    assert {(e.shape, e.problem) for e in found.entries} == {(None, "its shard is missing")}


def test_checksums_of_torch(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    torch.save({"bad": torch.full((99,), 7.0), "good": torch.ones(99)}, path)
    seven = np.full(9, 7, np.float32).tobytes()
    data = path.read_bytes()
    path.write_bytes(data.replace(seven, seven[:-1] + b"\x41", 1))
    with open_checkpoint(path) as found:
        assert found.read("good").sum() == 99
        with pytest.raises(CheckpointError, match="damaged: its checksum does not match"):
            found.read("bad")


def test_torch_files_without_checksums(tmp_path: Path) -> None:
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        torch.save({"a": torch.ones(9)}, tmp_path / "a.pt")
    finally:
        torch.serialization.set_crc32_options(before)
    with open_checkpoint(tmp_path / "a.pt") as found:
        assert found.read("a").sum() == 9


def test_big_endian_torch_files_are_refused(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(9)}, tmp_path / "a.pt")
    with zipfile.ZipFile(tmp_path / "a.pt") as archive:
        members = {info.filename: archive.read(info) for info in archive.infolist()}
    members["a/byteorder"] = b"big"
    assert "big-endian" in refusal(zipped(tmp_path / "b.pt", members))


class Makes:
    """Creates a folder when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __reduce__(self) -> Any:
        return (os.mkdir, (str(self._path),))


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("kind", ["bare", "legacy", "zip"])
def test_pickles_that_ask_for_more_name_it(tmp_path: Path, protocol: int, kind: str) -> None:
    path, made = tmp_path / "a.pt", tmp_path / "made"
    harmless = ["posix", "mkdir", {"posix": torch.Size([1])}]
    hostile = [harmless, Makes(made), Makes(made)]
    if kind == "bare":
        path.write_bytes(pickle.dumps(hostile, protocol))
    else:
        torch.save(
            hostile,
            path,
            pickle_protocol=protocol,
            _use_new_zipfile_serialization=kind == "zip",
        )
    assert "its pickle asks for posix.mkdir, which loading could run as code" in refusal(path)
    assert not made.exists()


def test_pickles_of_arrays_and_of_new_protocols(tmp_path: Path) -> None:
    path = tmp_path / "a.pkl"
    path.write_bytes(pickle.dumps({"w": np.ones(3)}, 4))
    assert "asks for numpy" in refusal(path)
    path.write_bytes(pickle.dumps({"w": [1, 2]}, 4))
    assert "a pickle of protocol 4" in refusal(path)
    for zipped_file in (True, False):
        torch.save(
            {"w": torch.ones(2)},
            path,
            pickle_protocol=5,
            _use_new_zipfile_serialization=zipped_file,
        )
        text = refusal(path)
        assert "a pickle of protocol 5" in text
        assert "save it again with torch.save" in text
    path.write_bytes(b"\x80\x04\x8d" + b"\xff" * 8)
    assert refusal(path)


@pytest.fixture
def little_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "_available", lambda: 10_000)

    class Usage:
        free = 10_000

    monkeypatch.setattr(room.shutil, "disk_usage", lambda folder: Usage)


@pytest.mark.usefixtures("little_room")
def test_what_unpacks_to_more_than_there_is_room_for(tmp_path: Path) -> None:
    h5py = pytest.importorskip("h5py")
    large, small = np.zeros(2000), np.zeros(100)
    np.savez_compressed(tmp_path / "a.npz", large=large, small=small)
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file.create_dataset("large", data=large, compression="gzip")
        file.create_dataset("small", data=small, compression="gzip")
    for name in ("a.npz", "a.h5"):
        with open_checkpoint(tmp_path / name) as found:
            assert found.read("small").shape == (100,)
            with pytest.raises(CheckpointError, match=r"'large' cannot.*too much for the 0\.0 GB"):
                found.read("large")
    np.savez(tmp_path / "b.npz", large=large)
    assert open_checkpoint(tmp_path / "b.npz").read("large").shape == (2000,)
    inside = {"model.weights.h5": bytes(50_000)}
    assert "it unpacks to" in refusal(zipped(tmp_path / "a.keras", inside, zipfile.ZIP_DEFLATED))


def test_room_is_known() -> None:
    assert 0 < (room._available() or 1) < 2**60
    room.check_memory(1)
    room.check_disk(1)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_npz_files_that_were_cut_off(tmp_path: Path, save: Any) -> None:
    arrays = {name: np.random.default_rng(0).random(1000) for name in "abcd"}
    save(tmp_path / "a.npz", **arrays)
    with open_checkpoint(cut(tmp_path / "a.npz", 0.7)) as found:
        assert found.problems == ("truncated or damaged: only the first 2 arrays can be read",)
        assert [entry.name for entry in found.entries] == ["a", "b"]
        for entry in found.entries:
            np.testing.assert_array_equal(found.read(entry.name), arrays[entry.name])
        data = bytearray((tmp_path / "a.npz").read_bytes())
        data[3000] ^= 255
        (tmp_path / "a.npz").write_bytes(data)
        with pytest.raises(CheckpointError, match="'a' cannot be read"):
            found.read("a")
    assert "truncated" in refusal(cut(tmp_path / "a.npz", 0.1))


@pytest.mark.parametrize(
    ("path", "words"), [("", "no path given"), ("~nobody-of-that-name/x", "~nobody-of-that-name")]
)
def test_paths_that_are_none(path: str, words: str) -> None:
    assert words in refusal(path)


def test_hdf5_arrays_that_were_never_written(tmp_path: Path) -> None:
    h5py = pytest.importorskip("h5py")
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file.create_dataset("whole", (4,), "f4")
        file.create_dataset("chunks", (4, 3), "f4", chunks=(3, 3))[0] = 1
        file.create_dataset("filled", (4,), "f4", fillvalue=2)
        file.create_dataset("sparse", (4,), "f4", chunks=(2,), fillvalue=2)
        file.create_dataset("complete", (4, 3), "f4", chunks=(3, 2))[...] = 1
        file["none"] = np.zeros((0, 3))
        file["words"] = ["a", "b"]
        file["null"] = h5py.Empty("f4")
    with open_checkpoint(tmp_path / "a.h5") as found:
        problems = {e.name: e.problem for e in found.entries if e.problem and not e.harmless}
        assert problems == {"whole": "never written", "chunks": "never written"}
        assert {e.name for e in found.entries if e.harmless} == {"words", "null"}
        assert found.read("filled").sum() == 8
        assert found.read("none").shape == (0, 3)


def test_names_that_utf8_cannot_encode(tmp_path: Path) -> None:
    header = {"a\ud800": f32(0, 16, 4), "b": {"dtype": "\udfff", "shape": [], "data_offsets": [0]}}
    path = raw_safetensors(tmp_path / "1.safetensors", header, ONE)
    with open_checkpoint(path) as found:
        assert found.entries[0].name == "a\\ud800"
        assert found.read("a\\ud800").sum() == 6
        for entry in found.entries:
            f"{entry}".encode()
    index = {"weight_map": {"a\ud800": "1.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert open_checkpoint(tmp_path / "model.safetensors.index.json").read("a\\ud800").sum() == 6
    torch.save({"a\ud800": torch.ones(2)}, tmp_path / "a.pt")
    assert open_checkpoint(tmp_path / "a.pt").read("a\\ud800").sum() == 2
