"""Damaged and hostile files end in one clear line, run nothing and allocate nothing."""

from __future__ import annotations

import json
import os
import pickle
import struct
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from specops.checkpoints import open_checkpoint
from specops.errors import CheckpointError

from .writing import cut, f32, npy, raw_safetensors, zipped

torch = pytest.importorskip("torch")
ONE = np.arange(4, dtype=np.float32).tobytes()


def told(path: Path) -> str:
    """Every error and problem of a file, which raises nothing but CheckpointError."""
    words = []
    try:
        with open_checkpoint(path) as found:
            words += [*found.problems]
            for entry in found.entries:
                try:
                    found.read(entry.name)
                except CheckpointError as error:
                    words.append(str(error))
    except CheckpointError as error:
        words.append(str(error))
    return "; ".join(words)


def refusal(path: Path) -> str:
    """The one line with which a path is refused."""
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(path)
    text = str(caught.value)
    assert text.startswith(f"{path}: ")
    assert "\n" not in text
    assert len(text) < 700
    return text


class Touches:
    """Creates a folder when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __reduce__(self) -> Any:
        return (os.mkdir, (str(self._path),))


@pytest.mark.parametrize("zipped_file", [True, False])
def test_pickles_run_no_code(tmp_path: Path, zipped_file: bool) -> None:
    touched = tmp_path / "touched"
    torch.save(
        {"w": torch.ones(2), "x": Touches(touched)},
        tmp_path / "a.pt",
        _use_new_zipfile_serialization=zipped_file,
    )
    assert "asks for posix.mkdir" in refusal(tmp_path / "a.pt")
    assert not touched.exists()
    torch.load(tmp_path / "a.pt", weights_only=False)
    assert touched.exists()


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_bare_pickles_run_no_code(tmp_path: Path, protocol: int) -> None:
    touched = tmp_path / "touched"
    (tmp_path / "a.pkl").write_bytes(pickle.dumps(Touches(touched), protocol))
    refusal(tmp_path / "a.pkl")
    assert not touched.exists()


def test_arrays_of_objects_run_no_code(tmp_path: Path) -> None:
    touched = tmp_path / "touched"
    hostile = np.array([Touches(touched)], dtype=object)
    np.savez(tmp_path / "a.npz", hostile=hostile, fine=np.ones(2))
    np.save(tmp_path / "a.npy", hostile)
    for name in ("a.npz", "a.npy"):
        with open_checkpoint(tmp_path / name) as found:
            assert "Python objects" in found.entries[0].problem
            with pytest.raises(CheckpointError, match="not unpickled"):
                found.read(found.entries[0].name)
    with open_checkpoint(tmp_path / "a.npz") as found:
        np.testing.assert_array_equal(found.read("fine"), np.ones(2))
    assert not touched.exists()


def test_a_pickled_module_is_named(tmp_path: Path) -> None:
    torch.save(torch.nn.Linear(2, 2), tmp_path / "a.pt")
    text = refusal(tmp_path / "a.pt")
    assert "torch.nn.modules.linear.Linear" in text
    assert "state_dict()" in text


@pytest.mark.filterwarnings("ignore")
def test_torchscript_is_refused(tmp_path: Path) -> None:
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), tmp_path / "a.pt")
    assert "TorchScript" in refusal(tmp_path / "a.pt")


@pytest.mark.parametrize(
    ("header", "length", "words"),
    [
        ({}, 2**60, "claims 1152921504606846976 bytes"),
        ({}, 50_000, "truncated: the header"),
        (b'{"a": ', None, "header is damaged"),
        (b"{\xff}", None, "header is damaged"),
        (b"{" * 10, None, "header is damaged"),
        (b'{"a":' * 50_000, None, "nested too deeply"),
        (b'{"a": 1, "a": 2}', None, "occurs twice"),
    ],
)
def test_headers_of_safetensors(tmp_path: Path, header: Any, length: int, words: str) -> None:
    path = raw_safetensors(tmp_path / "a.safetensors", header, length=length)
    assert words in refusal(path)


@pytest.mark.parametrize(
    ("about", "words"),
    [
        (f32(16, 2**40, 4), "the header gives 1099511627760 bytes to 4 float32"),
        (f32(16, 32, 4), "lie beyond the end"),
        (f32(2**62, 2**62 + 16, 4), "beyond the end"),
        (f32(0, 8, 4), "gives 8 bytes to 4 float32"),
        (f32(16, 0, 4), "gives -16 bytes"),
        (f32(0, 16, -4), "negative or impossible"),
        (f32(0, 16, -2, -2), "negative or impossible"),
        (f32(-16, 0, 4), "negative or impossible"),
        (f32(0, 4 * 10**15, 10**15), "beyond the end"),
        (f32(0, 0, 2**70, 0), "negative or impossible"),
        (f32(0, 0, 2**62, 2**62, 0), "negative or impossible"),
        (f32(0, 4, *[1] * 65), "negative or impossible"),
        ({"dtype": "F4", "shape": [4], "data_offsets": [0, 2]}, "packed or unknown"),
        ({"dtype": 7, "shape": [4], "data_offsets": [0, 16]}, "packed or unknown"),
        ({"dtype": "F32", "shape": [True], "data_offsets": [0, 4]}, "negative or impossible"),
        ({"dtype": "F32", "shape": 4, "data_offsets": [0, 16]}, "does not describe"),
        ({"dtype": "F32", "shape": [4]}, "does not describe"),
        (17, "does not describe"),
    ],
)
def test_lies_about_one_tensor_leave_the_others(tmp_path: Path, about: Any, words: str) -> None:
    path = raw_safetensors(tmp_path / "a", {"good": f32(0, 16, 4), "bad": about}, ONE)
    with open_checkpoint(path) as found:
        good, bad = found.entries
        assert (good.problem, words in bad.problem) == ("", True), bad.problem
        assert bad.shape in (None, (4,))
        np.testing.assert_array_equal(found.read("good"), np.arange(4))
        with pytest.raises(CheckpointError, match="'bad' cannot be read"):
            found.read("bad")


def test_overlapping_safetensors(tmp_path: Path) -> None:
    header = {"c": f32(24, 32, 2), "b": f32(8, 24, 4), "a": f32(0, 16, 4), "none": f32(8, 8, 0)}
    with open_checkpoint(raw_safetensors(tmp_path / "a", header, ONE + ONE)) as found:
        problems = {entry.name: entry.problem for entry in found.entries if entry.problem}
        assert problems == {"b": "its bytes overlap those of 'a'"}


def test_truncated_safetensors_keep_what_is_there(tmp_path: Path) -> None:
    header = {"a": f32(0, 16, 4), "b": f32(16, 32, 4)}
    path = raw_safetensors(tmp_path / "a.safetensors", header, ONE + ONE[:5])
    with open_checkpoint(path) as found:
        assert found.problems == ("truncated: 21 of 32 bytes of tensors are there",)
        assert [bool(entry.problem) for entry in found.entries] == [False, True]
        assert found.read("a").sum() == 6
        path.write_bytes(path.read_bytes()[:-10])
        with pytest.raises(CheckpointError, match="'a' cannot be read: the file ends 5 bytes"):
            found.read("a")


@pytest.mark.parametrize("share", [0.3, 0.8, 0.99])
@pytest.mark.parametrize("kind", ["npz", "pt", "th", "h5", "msgpack", "keras", "npy"])
def test_truncated_files(tmp_path: Path, kind: str, share: float) -> None:
    path = tmp_path / f"a.{kind}"
    array = np.random.default_rng(0).random(5000)
    if kind == "npz":
        np.savez(path, a=array, b=array)
        share *= 0.5
    elif kind == "npy":
        np.save(path, array)
        cut(path, share)
        assert "truncated" in open_checkpoint(path).entries[0].problem
        return
    elif kind in ("pt", "th"):
        torch.save(torch.from_numpy(array), path, _use_new_zipfile_serialization=kind == "pt")
    elif kind == "msgpack":
        serialization = pytest.importorskip("flax.serialization")
        path.write_bytes(serialization.to_bytes({"a": array}))
    else:
        h5py = pytest.importorskip("h5py")
        with h5py.File(tmp_path / "model.weights.h5", "w") as file:
            file["a"] = array
        data = (tmp_path / "model.weights.h5").read_bytes()
        if kind == "keras":
            inside = {"model.weights.h5": data[: int(len(data) * share)]}
            assert "truncated" in refusal(zipped(path, inside))
        path.write_bytes(data)
    assert "truncated" in refusal(cut(path, share))


def test_corrupt_bytes_are_noticed_where_there_is_a_checksum(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    np.savez(path, good=np.zeros(999), bad=np.ones(999))
    data = path.read_bytes()
    middle = data.rindex(np.ones(9).tobytes())
    path.write_bytes(data[:middle] + b"\0" + data[middle + 1 :].replace(b"\xf0?", b"\xf1?", 1))
    with open_checkpoint(path) as found:
        assert not found.read("good").any()
        with pytest.raises(CheckpointError, match=r"'bad' cannot be read.*CRC"):
            found.read("bad")


@pytest.mark.parametrize(
    ("member", "words"),
    [
        (npy((10**15,)), "header claims 4000000000000000 bytes and 0 are there"),
        (npy((2,), ONE), "claims 8 bytes and 16"),
        (npy((10**9, 10**9, 10**9), ONE), "claims"),
        (npy((-4,), ONE), "claims the shape (-4,)"),
        (npy((4,), ONE, "<U1"), "names no numbers"),
        (npy((4,), ONE)[:9], "EOF"),
        (npy((4,), ONE)[:40], "EOF"),
        (b"\x93NUMPY\x09\x00" + npy((4,), ONE)[8:], "version"),
        (b"nothing of the kind", "magic"),
    ],
)
def test_headers_of_npz(tmp_path: Path, member: bytes, words: str) -> None:
    path = zipped(tmp_path / "a.npz", {"bad.npy": member, "good.npy": npy((4,), ONE)})
    with open_checkpoint(path) as found:
        assert words in found.entries[0].problem
        assert found.read("good").sum() == 6
    if member.startswith(b"\x93NUMPY\1") and len(member) > 60:
        (tmp_path / "bad.npy").write_bytes(member)
        assert words in told(tmp_path / "bad.npy")


def test_a_zip_file_that_lies_about_sizes(tmp_path: Path) -> None:
    path = zipped(tmp_path / "a.npz", {"a.npy": npy((10**12,))}, zipfile.ZIP_DEFLATED)
    data = bytearray(path.read_bytes())
    at = data.rindex(b"PK\1\2")
    size = struct.unpack_from("<I", data, at + 24)[0]
    struct.pack_into("<I", data, at + 24, 2**32 - 2)
    path.write_bytes(data)
    problem = open_checkpoint(path).entries[0].problem
    assert "cannot unpack to 4294967294" in problem, (size, problem)


def test_methods_of_compression_that_expand_without_bound(tmp_path: Path) -> None:
    path = zipped(tmp_path / "a.npz", {"a.npy": npy((2**20,), bytes(2**22))}, zipfile.ZIP_BZIP2)
    assert "unusual method" in open_checkpoint(path).entries[0].problem


def test_compressed_torch_files_are_refused(tmp_path: Path) -> None:
    torch.save({"w": torch.zeros(2**20)}, tmp_path / "a.pt")
    with zipfile.ZipFile(tmp_path / "a.pt") as archive:
        members = {info.filename: archive.read(info) for info in archive.infolist()}
    assert "compressed" in refusal(zipped(tmp_path / "b.pt", members, zipfile.ZIP_DEFLATED))


def test_torch_storages_that_are_smaller_than_they_claim(tmp_path: Path) -> None:
    torch.save({"w": torch.ones(4096), "v": torch.ones(2)}, tmp_path / "a.pt")
    with zipfile.ZipFile(tmp_path / "a.pt") as archive:
        members = {info.filename: archive.read(info) for info in archive.infolist()}
    for name in members:
        if name.endswith("/data/0"):
            members[name] = members[name][:100]
    with open_checkpoint(zipped(tmp_path / "b.pt", members)) as found:
        assert "storage claims 16384 bytes" in found.entries[0].problem


def test_torch_views_larger_than_their_storage(tmp_path: Path) -> None:
    torch.save({"w": torch.ones(1).expand(10**12), "v": torch.ones(2)}, tmp_path / "a.pt")
    with open_checkpoint(tmp_path / "a.pt") as found:
        assert found.entries[0].problem == "4000000000000 bytes, a view that repeats 4"
        assert found.read("v").sum() == 2


def test_hdf5_that_claims_more_than_it_holds(tmp_path: Path) -> None:
    h5py = pytest.importorskip("h5py")
    (tmp_path / "secret").write_bytes(ONE)
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file.create_dataset("bomb", shape=(10**15,), chunks=(10**6,), dtype="f4")
        file.create_dataset("other", (4,), "f4", external=[(str(tmp_path / "secret"), 0, 16)])
        file["link"] = h5py.ExternalLink("b.h5", "/w")
        file["good"] = np.ones(2)
    with open_checkpoint(tmp_path / "a.h5") as found:
        problems = {entry.name: entry.problem for entry in found.entries}
        assert set(problems) == {"bomb", "other", "good"}
        assert "cannot unpack" in problems["bomb"]
        assert "another file" in problems["other"]
        assert found.read("good").sum() == 2


def test_flax_arrays_that_claim_more_than_they_hold(tmp_path: Path) -> None:
    msgpack = pytest.importorskip("msgpack")

    def array(shape: Any, dtype: str = "float32") -> Any:
        return msgpack.ExtType(1, msgpack.packb((shape, dtype, ONE)))

    tree = {
        "good": array((4,)),
        "huge": array((10**15,)),
        "negative": array((-2, -2)),
        "object": array((2,), "object"),
        "cut": msgpack.ExtType(1, b"\x93"),
        "code": msgpack.ExtType(77, b"code"),
    }
    (tmp_path / "a").write_bytes(msgpack.packb(tree))
    with open_checkpoint(tmp_path / "a") as found:
        assert [entry.name for entry in found.entries if not entry.problem] == ["good"]
        assert found.read("good").sum() == 6


@pytest.mark.filterwarnings("ignore")
def test_orbax_without_some_of_its_files(tmp_path: Path) -> None:
    ocp = pytest.importorskip("orbax.checkpoint")
    saver = ocp.Checkpointer(ocp.PyTreeCheckpointHandler(use_ocdbt=False))
    saver.save(tmp_path / "a", {"lost": np.ones(3), "bad": np.ones(3), "good": np.ones(3)})
    (tmp_path / "a" / "lost" / "0").unlink()
    (tmp_path / "a" / "bad" / ".zarray").write_text("{")
    with open_checkpoint(tmp_path / "a") as found:
        assert [entry.name for entry in found.entries if entry.problem] == ["bad"]
        assert found.read("good").sum() == 3
        with pytest.raises(CheckpointError, match="'lost' cannot be read"):
            found.read("lost")
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "manifest.ocdbt").write_bytes(b"nothing")
    refusal(tmp_path / "b")


def shards(folder: Path, **files: str) -> Path:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    return folder


def test_missing_and_damaged_shards(tmp_path: Path) -> None:
    raw_safetensors(tmp_path / "1.safetensors", {"a": f32(0, 16, 4)}, ONE)
    raw_safetensors(tmp_path / "3.safetensors", {}, length=2**60)
    files = {"a": "1.safetensors", "b": "2.safetensors", "c": "3.safetensors"}
    with open_checkpoint(shards(tmp_path, **files, d="1.safetensors")) as found:
        assert found.format == "safetensors shards (3 files)"
        assert found.problems[0].startswith("shard 2.safetensors is missing")
        assert found.problems[1].startswith("shard 3.safetensors: the safetensors header claims")
        problems = [entry.problem for entry in found.entries]
        assert problems[0] == ""
        assert problems[1] == "its shard is missing"
        assert problems[2].startswith("its shard was refused: the safetensors header claims")
        assert problems[3] == "its shard does not hold it"
        assert [entry.shape for entry in found.entries] == [(4,), None, None, None]
        assert found.read("a").sum() == 6


@pytest.mark.parametrize(
    "file",
    ["../x.safetensors", "/x.safetensors", "a/../../x.bin", "..\\x.bin", "C:\\x.bin", "C:x.bin"],
)
def test_an_index_stays_in_its_folder(tmp_path: Path, file: str) -> None:
    inner = tmp_path / "inner"
    inner.mkdir()
    raw_safetensors(tmp_path / "x.safetensors", {"a": f32(0, 16, 4)}, ONE)
    with pytest.raises(CheckpointError, match="outside its folder; refused"):
        open_checkpoint(shards(inner, a=file))


@pytest.mark.parametrize("file", [".", "", "model.safetensors.index.json", "passwd"])
def test_an_index_names_weights(tmp_path: Path, file: str) -> None:
    with pytest.raises(CheckpointError, match="no file of weights"):
        open_checkpoint(shards(tmp_path, a=file))


@pytest.mark.parametrize("text", ["", "{", "[]", '{"weight_map": 3}', '{"weight_map": {"a": 3}}'])
def test_an_index_that_is_none(tmp_path: Path, text: str) -> None:
    path = tmp_path / "model.safetensors.index.json"
    path.write_text(text)
    assert refusal(path)


def test_paths_that_are_no_checkpoint(tmp_path: Path) -> None:
    assert "no such file" in refusal(tmp_path / "missing")
    assert "in this folder" in refusal(tmp_path)
    (tmp_path / "empty.pt").touch()
    assert "name one of its files: empty.pt" in refusal(tmp_path)
    assert "is empty" in refusal(tmp_path / "empty.pt")
    (tmp_path / "a.safetensors").write_text("just some text, longer than a header is")
    assert "a text file" in refusal(tmp_path / "a.safetensors")
    (tmp_path / "b.pt").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00")
    assert "git lfs pull" in refusal(tmp_path / "b.pt")
    (tmp_path / "c.bin").write_bytes(b"\xff\xfe\x00" * 20)
    assert "no reader knows" in refusal(tmp_path / "c.bin")
    assert "no reader knows" in refusal(zipped(tmp_path / "d.pt", {"readme": b"hello"}))
    os.mkfifo(tmp_path / "pipe")
    assert "neither" in refusal(tmp_path / "pipe")


def test_a_file_without_permission(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = raw_safetensors(tmp_path / "a.safetensors", {"a": f32(0, 16, 4)}, ONE)
    open_checkpoint(path)

    def forbidden(*arguments: Any, **options: Any) -> Any:
        raise PermissionError(13, "Permission denied")

    # As root, who reads everything, chmod would change nothing.
    monkeypatch.setattr(Path, "open", forbidden)
    assert "no permission" in refusal(path)


@pytest.mark.parametrize(
    ("module", "remedy"),
    [
        ("h5py", "reading .h5 needs h5py: pip install 'specops[inspect]'"),
        ("torch", "reading .pt needs torch: pip install 'specops[torch]'"),
        ("msgpack", "reading .msgpack needs msgpack: pip install msgpack"),
        ("tensorstore", "needs tensorstore: pip install tensorstore"),
    ],
)
def test_missing_libraries(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: str, remedy: str
) -> None:
    path = tmp_path / {"h5py": "a.h5", "torch": "a.pt", "msgpack": "a.msgpack"}.get(module, "a")
    if module == "torch":
        torch.save({"a": torch.ones(2)}, path)
    elif module == "tensorstore":
        path.mkdir()
        (path / "_METADATA").write_text("{}")
    else:
        path.write_bytes({"h5py": b"\x89HDF\r\n\x1a\n", "msgpack": b"\x81\xa1a\x01"}[module])
    monkeypatch.setitem(sys.modules, module, None)
    assert remedy in refusal(path)


def test_names_that_are_not_there(tmp_path: Path) -> None:
    path = raw_safetensors(tmp_path / "a", {"a": f32(0, 16, 4)}, ONE)
    with pytest.raises(CheckpointError, match="there is no tensor 'b'"):
        open_checkpoint(path).read("b")


@pytest.mark.parametrize("kind", ["npz", "pt", "th", "h5", "safetensors", "msgpack"])
def test_bytes_changed_at_random(tmp_path: Path, kind: str) -> None:
    """Whatever happens is a CheckpointError or an array, never another exception."""
    path = tmp_path / f"a.{kind}"
    arrays = {"a": np.ones((3, 4), np.float32), "b": np.zeros(5)}
    if kind == "npz":
        np.savez_compressed(path, **arrays)
    elif kind in ("pt", "th"):
        tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
        torch.save(tensors, path, _use_new_zipfile_serialization=kind == "pt")
    elif kind == "h5":
        h5py = pytest.importorskip("h5py")
        with h5py.File(path, "w") as file:
            file["a"], file["b"] = arrays["a"], arrays["b"]
    elif kind == "msgpack":
        serialization = pytest.importorskip("flax.serialization")
        path.write_bytes(serialization.to_bytes(arrays))
    else:
        raw_safetensors(path, {"a": f32(0, 16, 4), "b": f32(16, 32, 4)}, ONE + ONE)
    data, rng = path.read_bytes(), np.random.default_rng(1)
    for _ in range(60):
        changed = bytearray(data)
        for at in rng.integers(0, len(data), 3):
            changed[at] = rng.integers(256)
        path.write_bytes(changed)
        assert "\n" not in told(path)
