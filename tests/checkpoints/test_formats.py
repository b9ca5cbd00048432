"""Every format gives back what was written."""

from __future__ import annotations

import json
import subprocess
import sys
import time
import zipfile
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from specops import errors, plugins
from specops.checkpoints import Checkpoint, Entry, open_checkpoint
from specops.checkpoints.dtypes import decode
from specops.hookspecs import hookimpl

from .writing import f32, raw_safetensors

torch = pytest.importorskip("torch")
ml_dtypes = pytest.importorskip("ml_dtypes")
RNG = np.random.default_rng(0)
ARRAYS: dict[str, np.ndarray[Any, Any]] = {
    "layer1.0.conv.weight": RNG.standard_normal((4, 3, 3, 3)).astype(np.float32),
    "half": RNG.standard_normal((2, 5)).astype(np.float16),
    "double": RNG.standard_normal(3),
    "scalar": np.asarray(2.5, np.float32),
    "empty": np.zeros((0, 3), np.float32),
    "complex": (RNG.standard_normal(3) + 1j).astype(np.complex64),
    "packed": RNG.integers(-9, 9, (2, 2)).astype(np.int8),
    "flags": np.array([True, False]),
}
BFLOAT = np.array([[1.0, -0.0, np.inf], [1e-40, 3.1415, -2.0]], ml_dtypes.bfloat16)


def check(checkpoint: Checkpoint, wanted: dict[str, np.ndarray[Any, Any]]) -> None:
    entries = [entry for entry in checkpoint.entries if not entry.harmless]
    assert {entry.name for entry in entries} == set(wanted)
    assert not checkpoint.problems
    for entry in entries:
        array = wanted[entry.name]
        tied = "half" if entry.name == "tied" else ""
        assert entry == Entry(entry.name, array.shape, array.dtype.name, same_as=tied)
        got = checkpoint.read(entry.name)
        if array.dtype.isbuiltin == 2:
            array = array.astype(np.float32)
        assert got.dtype == array.dtype.newbyteorder("=")
        assert got.dtype.isnative
        assert got.shape == array.shape
        np.testing.assert_array_equal(got, array)


def as_tensors() -> dict[str, Any]:
    tensors = {name: torch.from_numpy(array.copy()) for name, array in ARRAYS.items()}
    return tensors | {"bf": torch.from_numpy(BFLOAT.astype(np.float32)).bfloat16()}


WITH_BFLOAT = ARRAYS | {"bf": BFLOAT}


@pytest.mark.parametrize("name", ["a.safetensors", "a.pt", "a"])
def test_safetensors_whatever_it_is_called(tmp_path: Path, name: str) -> None:
    from safetensors.torch import save_file

    eights = {
        "f8a": torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn),
        "f8b": torch.arange(256, dtype=torch.uint8).view(torch.float8_e5m2),
    }
    save_file(as_tensors() | eights, tmp_path / name, metadata={"format": "pt"})
    codes = np.arange(256, dtype=np.uint8)
    with open_checkpoint(tmp_path / name) as checkpoint:
        assert (checkpoint.format, checkpoint.layout) == ("safetensors", "torch")
        assert checkpoint.streams
        check(
            checkpoint,
            WITH_BFLOAT
            | {
                "f8a": codes.view(ml_dtypes.float8_e4m3fn),
                "f8b": codes.view(ml_dtypes.float8_e5m2),
            },
        )


@pytest.mark.parametrize(
    "name",
    ["float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz", "float8_e8m0fnu"],
)
def test_float8_is_exact(name: str) -> None:
    codes = np.arange(256, dtype=np.uint8)
    wanted = codes.view(getattr(ml_dtypes, name)).astype(np.float32)
    np.testing.assert_array_equal(decode(codes, name), wanted)


def test_layouts_of_safetensors(tmp_path: Path) -> None:
    from safetensors.numpy import save_file

    one = np.ones(2, np.float32)
    for name, metadata, layout in [
        ("a.weight", None, "torch"),
        ("a/kernel", None, "jax"),
        ("a", None, ""),
        ("a.weight", {"format": "mlx"}, ""),
        ("a", {"format": "flax"}, "jax"),
    ]:
        save_file({name: one}, tmp_path / "a", metadata=metadata)
        assert open_checkpoint(tmp_path / "a").layout == layout


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_npz(tmp_path: Path, save: Any, rng: np.random.Generator) -> None:
    more = {"big": np.arange(3, dtype=">f4"), "fortran": np.asfortranarray(rng.random((3, 4)))}
    save(tmp_path / "a.bin", **(ARRAYS | more))
    (tmp_path / "a.bin.npz").rename(tmp_path / "a.bin")
    with open_checkpoint(tmp_path / "a.bin") as checkpoint:
        assert (checkpoint.format, checkpoint.layout, checkpoint.streams) == ("npz", "torch", True)
        check(checkpoint, ARRAYS | more)


def test_npz_without_arrays(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz")
    assert open_checkpoint(tmp_path / "a.npz").entries == ()


def test_npy(tmp_path: Path) -> None:
    np.save(tmp_path / "w.npy", ARRAYS["half"])
    with open_checkpoint(str(tmp_path / "w.npy")) as checkpoint:
        assert (checkpoint.format, checkpoint.layout) == ("npy", "")
        check(checkpoint, {"w": ARRAYS["half"]})


def test_bfloat16_loses_its_name_in_npy(tmp_path: Path) -> None:
    np.save(tmp_path / "w.npy", BFLOAT)
    assert "names no numbers" in open_checkpoint(tmp_path / "w.npy").entries[0].problem


@pytest.mark.parametrize("wrap", [lambda d: d, lambda d: {"epoch": 3, "state_dict": d, "o": {}}])
def test_torch_zip(tmp_path: Path, wrap: Any) -> None:
    tensors = as_tensors()
    base = torch.arange(12.0).reshape(3, 4)
    views = {
        "transposed": base.T,
        "row": base[1],
        "tied": tensors["half"],
        "conjugate": tensors["complex"].conj(),
        "expanded": torch.ones(1).expand(5),
        "parameter": torch.nn.Parameter(torch.ones(2)),
    }
    torch.save(wrap(OrderedDict(tensors | views)), tmp_path / "a.safetensors")
    wanted = {k: v.detach().resolve_conj().numpy() for k, v in views.items()}
    with open_checkpoint(tmp_path / "a.safetensors") as checkpoint:
        assert (checkpoint.format, checkpoint.layout) == ("torch", "torch")
        assert checkpoint.streams
        check(checkpoint, WITH_BFLOAT | wanted)


def test_torch_legacy_pickle(tmp_path: Path) -> None:
    state = {f"module.{name}": tensor for name, tensor in as_tensors().items()}
    torch.save({"model": state}, tmp_path / "a.th", _use_new_zipfile_serialization=False)
    with open_checkpoint(tmp_path / "a.th") as checkpoint:
        assert checkpoint.format == "torch (legacy pickle)"
        assert not checkpoint.streams
        check(checkpoint, {f"module.{name}": array for name, array in WITH_BFLOAT.items()})


def test_torch_containers_and_what_is_no_tensor(tmp_path: Path) -> None:
    shared = {"w": torch.ones(2)}
    around: dict[str, Any] = {"a": [torch.zeros(1), shared], "b": shared, "lr": 0.1, "n": {"x": 1}}
    around["a.0"] = torch.ones(3)
    around["itself"] = around
    torch.save(around, tmp_path / "a.pt")
    found = open_checkpoint(tmp_path / "a.pt")
    problems = {entry.name: entry.problem for entry in found.entries}
    assert problems == {
        "a.0": "",
        "a.1.w": "",
        "lr": "a plain value, no tensor",
        "n": "a plain value, no tensor",
    }
    assert [e.name for e in found.entries if e.harmless and e.shape is None] == ["lr", "n"]
    assert found.problems == ("two tensors are called 'a.0'; the second is left out",)
    torch.save(torch.ones(2), tmp_path / "b.pt")
    check(open_checkpoint(tmp_path / "b.pt"), {"tensor": np.ones(2, np.float32)})


def test_sparse_and_meta_tensors_are_listed(tmp_path: Path) -> None:
    torch.save({"w": torch.ones(2), "s": torch.eye(3).to_sparse()}, tmp_path / "a.pt")
    with open_checkpoint(tmp_path / "a.pt") as found:
        assert [e.problem for e in found.entries] == ["", "sparse (sparse_coo)"]
        np.testing.assert_array_equal(found.read("w"), np.ones(2))
    torch.save({"w": torch.ones(2), "m": torch.ones(3, device="meta")}, tmp_path / "a.pt")
    assert "meta device" in open_checkpoint(tmp_path / "a.pt").entries[1].problem
    torch.save({"m": torch.ones(3, device="meta")}, tmp_path / "a.pt")
    assert "meta device" in open_checkpoint(tmp_path / "a.pt").entries[0].problem


def test_torch_that_does_not_say_where_numbers_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from specops_torch import checkpoint

    torch.save(as_tensors(), tmp_path / "a.pt")
    monkeypatch.setattr(checkpoint, "_position", lambda tensor: None)
    with open_checkpoint(tmp_path / "a.pt") as found:
        assert not found.streams
        check(found, WITH_BFLOAT)


@pytest.mark.filterwarnings("ignore")
def test_quantised_tensors_are_listed(tmp_path: Path) -> None:
    quantised = torch.quantize_per_tensor(torch.ones(3), 1.0, 0, torch.qint8)
    torch.save({"w": torch.ones(2).half(), "q": quantised}, tmp_path / "a.pt")
    with open_checkpoint(tmp_path / "a.pt") as found:
        assert [e.problem for e in found.entries] == [
            "",
            "quantised (qint8): save the weights that it was made of",
        ]
        assert not found.streams
        np.testing.assert_array_equal(found.read("w"), np.ones(2, np.float16))


@pytest.mark.parametrize("inside", [None, zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_hdf5(tmp_path: Path, inside: int | None) -> None:
    h5py = pytest.importorskip("h5py")
    path = tmp_path / "a.weights.h5"
    with h5py.File(path, "w") as file:
        for name, array in ARRAYS.items():
            file[f"layers/{name}/vars/0"] = array
        file.create_dataset("zipped", data=np.ones((50, 50)), compression="gzip", chunks=(10, 10))
        file["text"] = "hello"
        file["bf"] = BFLOAT.view("V2")
        file["bf"].attrs["dtype"] = "bfloat16"
        file["soft"] = h5py.SoftLink("/zipped")
    if inside is not None:
        with zipfile.ZipFile(tmp_path / "a.keras", "w", inside) as archive:
            archive.writestr("config.json", "{}")
            archive.write(path, "model.weights.h5")
        path = tmp_path / "a.keras"
    wanted = {f"layers/{name}/vars/0": array for name, array in ARRAYS.items()}
    with open_checkpoint(path) as found:
        assert (found.format, found.layout, found.streams) == ("keras h5", "keras", True)
        text = next(e for e in found.entries if e.name == "text")
        assert text == Entry("text", None, "", "a plain value, no tensor", harmless=True)
        check(found, wanted | {"zipped": np.ones((50, 50)), "bf": BFLOAT})


@pytest.mark.slow
def test_keras_writes_what_is_read(tmp_path: Path) -> None:
    code = f"""
import os; os.environ["KERAS_BACKEND"] = "torch"
import sys, keras, numpy
model = keras.Sequential([keras.Input((8, 8, 1)), keras.layers.Conv2D(3, 2)])
model.save_weights({str(tmp_path / "m.weights.h5")!r})
model.save({str(tmp_path / "m.keras")!r})
model.save({str(tmp_path / "m.h5")!r})
numpy.save({str(tmp_path / "w.npy")!r}, model.get_weights()[0])
"""
    if find_spec("keras") is None:
        pytest.skip("keras is not installed")
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True, capture_output=True)
    for kind in ("weights.h5", "keras", "h5"):
        with open_checkpoint(tmp_path / f"m.{kind}") as found:
            kernels = [e.name for e in found.entries if e.shape == (2, 2, 1, 3)]
            assert found.layout == "keras"
            np.testing.assert_array_equal(found.read(kernels[0]), np.load(tmp_path / "w.npy"))


def test_flax_msgpack(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    serialization = pytest.importorskip("flax.serialization")
    monkeypatch.setattr(serialization, "MAX_CHUNK_SIZE", 64)  # the convolution comes in chunks
    tree = {"params": {"a": ARRAYS["layer1.0.conv.weight"], "b": BFLOAT}, "n": np.float32(2)}
    rest = {"h": ARRAYS["half"], "e": ARRAYS["empty"], "step": 3}
    (tmp_path / "a.msgpack").write_bytes(serialization.to_bytes(tree | {"rest": rest}))
    with open_checkpoint(tmp_path / "a.msgpack") as found:
        assert (found.format, found.layout, found.streams) == ("flax msgpack", "jax", False)
        assert [e.name for e in found.entries if e.harmless] == ["rest/step"]
        check(
            found,
            {
                "params/a": ARRAYS["layer1.0.conv.weight"],
                "params/b": BFLOAT,
                "n": np.asarray(2, np.float32),
                "rest/h": ARRAYS["half"],
                "rest/e": ARRAYS["empty"],
            },
        )


@pytest.mark.parametrize("use_ocdbt", [True, False])
@pytest.mark.filterwarnings("ignore")
def test_orbax(tmp_path: Path, use_ocdbt: bool) -> None:
    ocp = pytest.importorskip("orbax.checkpoint")
    jnp = pytest.importorskip("jax.numpy")
    tree = {
        "params": {"d": {"kernel": ARRAYS["half"]}, "b": jnp.asarray(BFLOAT)},
        "l": [np.ones(2)],
    }
    saver = ocp.Checkpointer(ocp.PyTreeCheckpointHandler(use_ocdbt=use_ocdbt))
    saver.save(tmp_path / "a", tree)
    with open_checkpoint(tmp_path / "a") as found:
        assert (found.format, found.layout, found.streams) == ("orbax", "jax", True)
        check(
            found,
            {"params.d.kernel": ARRAYS["half"], "params.b": BFLOAT, "l.0": np.ones(2)},
        )


@pytest.mark.filterwarnings("ignore")
def test_the_latest_step_of_orbax(tmp_path: Path) -> None:
    ocp = pytest.importorskip("orbax.checkpoint")
    with ocp.CheckpointManager(tmp_path / "a") as manager:
        for step in (2, 10):
            manager.save(step, args=ocp.args.StandardSave({"w": np.full(3, step)}))
        manager.wait_until_finished()
    with open_checkpoint(tmp_path / "a") as found:
        assert found.format == "orbax (step 10)"
        np.testing.assert_array_equal(found.read("w"), np.full(3, 10))


def test_shards(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file({"a.weight": torch.ones(2)}, tmp_path / "m-1.safetensors", {"format": "pt"})
    save_file({"b.weight": torch.zeros(3)}, tmp_path / "m-2.safetensors", {"format": "pt"})
    shards = {"a.weight": "m-1.safetensors", "b.weight": "m-2.safetensors"}
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": shards}))
    for path in (tmp_path, index):
        with open_checkpoint(path) as found:
            assert found.format == "safetensors shards (2 files)"
            assert (found.layout, found.streams) == ("torch", True)
            check(found, {"a.weight": np.ones(2, "f4"), "b.weight": np.zeros(3, "f4")})


def test_torch_shards_and_single_files(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(2)}, tmp_path / "pytorch_model-1.bin")
    index = {"weight_map": {"a": "pytorch_model-1.bin"}}
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    with open_checkpoint(tmp_path) as found:
        assert found.format == "torch shards (1 file)"
        check(found, {"a": np.ones(2, np.float32)})
    (tmp_path / "one").mkdir()
    torch.save({"a": torch.ones(2)}, tmp_path / "one" / "pytorch_model.bin")
    assert open_checkpoint(tmp_path / "one").format == "torch"
    (tmp_path / "one" / "pytorch_model.bin").unlink()
    np.save(tmp_path / "one" / "unrelated.npy", np.ones(2))
    for name in ("adapter.safetensors", "another.safetensors"):
        raw_safetensors(tmp_path / "one" / name, {"a": f32(0, 4, 1)}, b"\0" * 4)
        if name.startswith("adapter"):
            assert open_checkpoint(tmp_path / "one").format == "safetensors"
    with pytest.raises(errors.CheckpointError, match="2 safetensors files and no index"):
        open_checkpoint(tmp_path / "one")


def test_a_plugin_adds_a_format(tmp_path: Path) -> None:
    class Mine(Checkpoint):
        def _read(self, entry: Entry) -> np.ndarray[Any, Any]:
            return np.ones(3)

    class Plugin:
        @hookimpl
        def specops_open_checkpoint(self, path: Path) -> Checkpoint | None:
            if path.suffix == ".bad":
                raise ZeroDivisionError("oops")
            return Mine(path, "mine", [Entry("w", (2,), "float64")])

    (tmp_path / "a.mine").write_text("mine")
    plugin = Plugin()
    plugins.manager().register(plugin, name="mine")
    try:
        with open_checkpoint(tmp_path / "a.mine") as found:
            assert found.format == "mine"
            with pytest.raises(errors.CheckpointError, match=r"'w'.*its shape is"):
                found.read("w")
        (tmp_path / "a.bad").write_text("bad")
        with (
            pytest.warns(errors.PluginWarning, match=r"'mine' failed.*oops"),
            pytest.raises(errors.CheckpointError, match="text file that no reader knows"),
        ):
            open_checkpoint(tmp_path / "a.bad")
    finally:
        plugins.manager.cache_clear()


def test_threads_may_open_the_first_files_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    np.savez(tmp_path / "a.npz", w=np.ones(2))
    plugins.manager.cache_clear()
    has_plugin = plugins.manager().has_plugin

    def slowly(name: str) -> bool:
        found = has_plugin(name)
        time.sleep(0.02)
        return found

    monkeypatch.setattr(plugins.manager(), "has_plugin", slowly)

    def open_one(_: int) -> str:
        with open_checkpoint(tmp_path / "a.npz") as found:
            return found.format

    try:
        with ThreadPoolExecutor(4) as threads:
            assert len(set(threads.map(open_one, range(4)))) == 1
    finally:
        plugins.manager.cache_clear()


def test_no_framework_is_imported_for_files_of_none(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", w=np.ones(2))
    code = (
        "import sys; from specops.checkpoints import open_checkpoint; "
        f"open_checkpoint({str(tmp_path / 'a.npz')!r}).read('w'); "
        "assert not {'torch', 'jax', 'flax', 'keras', 'h5py', 'orbax'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
