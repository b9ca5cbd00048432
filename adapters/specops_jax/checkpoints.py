"""Files of flax.serialization and folders of orbax, read without flax, orbax and JAX."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from specops.checkpoints.base import Checkpoint, Entry, explained, one_line, required
from specops.checkpoints.branches import leaves, no_tensor
from specops.checkpoints.dtypes import decode, is_numeric, itemsize, plain
from specops.checkpoints.room import check_memory
from specops.errors import CheckpointError

_ARRAY, _COMPLEX, _SCALAR = 1, 2, 3  # flax's extension types
_CHUNKED = "__msgpack_chunked_array__"
_HARMLESS_BYTES = 1 << 26
"""An array of at most this size is read even if hardly anything is stored: a choice, 64 MiB."""
_ZSTD_RATIO = 1000
"""A compression ratio that orbax's compressors do not reach on trained weights: a choice."""


class FlaxCheckpoint(Checkpoint):
    """A reader of ``flax.serialization.to_bytes``; names are joined by slashes.

    Parameters
    ----------
    path : Path
        The file.
    """

    def __init__(self, path: Path) -> None:
        msgpack = required("msgpack", path, "msgpack")
        with explained(path, "truncated, damaged or not of flax: "):
            loaded = msgpack.unpackb(path.read_bytes(), ext_hook=_Stored, raw=False)
        self._arrays: dict[str, list[bytes]] = {}
        with explained(path):
            entries = [
                self._entry(msgpack, name, leaf) for name, leaf in leaves(loaded, _is_array, "/")
            ]
        super().__init__(path, "flax msgpack", entries, layout="jax", streams=False)

    def _entry(self, msgpack: Any, name: str, leaf: Any) -> Entry:
        try:
            if _is_chunked(leaf):
                shape = tuple(leaf["shape"][str(i)] for i in range(len(leaf["shape"])))
                chunks = [leaf["chunks"][str(i)] for i in range(len(leaf["chunks"]))]
                stored = [chunk.unpacked(msgpack) for chunk in chunks]
                dtype = stored[0][1]
            elif isinstance(leaf, _Stored) and leaf.code in (_ARRAY, _SCALAR):
                stored = [leaf.unpacked(msgpack)]
                shape, dtype = stored[0][0], stored[0][1]
            else:
                return no_tensor(name, leaf)
        except Exception as error:
            return Entry(name, None, "", f"damaged: {one_line(error)}")
        width, held = itemsize(dtype), sum(len(data) for _, _, data in stored)
        problem = ""
        if width is None:
            problem = f"its type {dtype} is packed or unknown"
        elif not all(type(n) is int and n >= 0 for n in shape):
            return Entry(name, None, dtype, f"it claims the shape {shape}")
        elif math.prod(shape) * width != held:
            problem = f"it claims {math.prod(shape)} {dtype} and has {held} bytes"
            return Entry(name, None, dtype, problem)
        self._arrays.setdefault(name, [data for _, _, data in stored])
        return Entry(name, shape, dtype, problem)

    def _read(self, entry: Entry) -> np.ndarray[Any, Any]:
        data = b"".join(self._arrays[entry.name])
        array = decode(np.frombuffer(data, dtype=np.uint8), entry.dtype)
        return array.reshape(entry.shape or ())

    def close(self) -> None:
        """Let go of the tensors."""
        self._arrays.clear()


class _Stored:
    """A value of one of flax's extension types, not decoded yet."""

    def __init__(self, code: int, data: bytes) -> None:
        self.code, self._data = code, data

    def unpacked(self, msgpack: Any) -> tuple[tuple[int, ...], str, bytes]:
        shape, dtype, data = msgpack.unpackb(self._data, raw=True)
        return tuple(shape), dtype.decode(), data


def _is_chunked(thing: Any) -> bool:
    return isinstance(thing, dict) and _CHUNKED in thing


def _is_array(thing: Any) -> bool:
    return isinstance(thing, _Stored) or _is_chunked(thing)


class OrbaxCheckpoint(Checkpoint):
    """A reader of a folder of orbax; names are joined by dots, as orbax joins them.

    Parameters
    ----------
    path : Path
        The folder that the user named.
    items : dict
        The folders in it that hold arrays, by the prefix for their names.
    """

    def __init__(self, path: Path, items: dict[str, Path]) -> None:
        tensorstore = required("tensorstore", path, "tensorstore")
        self._stores: dict[str, Any] = {}
        entries = []
        for prefix, folder in items.items():
            held = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
            for name, spec in _specs(tensorstore, folder):
                entries.append(self._entry(tensorstore, prefix + name, spec, held))
        super().__init__(path, "orbax", entries, layout="jax")

    def _entry(self, tensorstore: Any, name: str, spec: dict[str, Any], held: int) -> Entry:
        try:
            store = tensorstore.open(spec, open=True, read=True).result()
        except Exception as error:  # the other arrays can still be read
            return Entry(name, None, "", one_line(error))
        shape: tuple[int, ...] | None
        shape, dtype = tuple(store.shape), store.dtype.numpy_dtype
        wanted = math.prod(store.shape) * dtype.itemsize
        problem = ""
        if not is_numeric(dtype) and dtype.isbuiltin != 2:
            problem = f"not a tensor but of type {store.dtype.name}"
        elif wanted > max(_HARMLESS_BYTES, _ZSTD_RATIO * held):
            problem, shape = f"{held} stored bytes cannot unpack to {wanted}", None
        self._stores.setdefault(name, store)
        return Entry(name, shape, dtype.name, problem)

    def _read(self, entry: Entry) -> np.ndarray[Any, Any]:
        store = self._stores[entry.name]
        check_memory(math.prod(store.shape) * store.dtype.numpy_dtype.itemsize)
        return plain(np.asarray(store.read().result()))

    def close(self) -> None:
        """Close the arrays."""
        self._stores.clear()


def open_orbax(path: Path) -> Checkpoint | None:
    """The reader of a folder of orbax; None if it is not one.

    In the folder of a `CheckpointManager`, it reads the latest step.

    Parameters
    ----------
    path : Path
        The folder.
    """
    with explained(path):
        if _is_item(path):
            return OrbaxCheckpoint(path, {"": path})
        steps = [p for p in path.iterdir() if p.name.isdecimal() and _is_step(p)]
        step = max(steps, key=lambda p: int(p.name)) if steps else path
        if not steps and not _is_step(path):
            return None
        items = sorted(p for p in step.iterdir() if p.is_dir() and _is_item(p))
        if not items:
            raise CheckpointError(
                f"{path}: a folder of orbax without arrays; was saving interrupted?"
            )
        named = {f"{p.name}." if len(items) > 1 else "": p for p in items}
        found = OrbaxCheckpoint(path, named)
        found.format = f"orbax (step {step.name})" if steps else "orbax"
        return found


def _is_item(folder: Path) -> bool:
    return any((folder / name).is_file() for name in ("_METADATA", "manifest.ocdbt"))


def _is_step(folder: Path) -> bool:
    return (folder / "_CHECKPOINT_METADATA").is_file()


def _specs(tensorstore: Any, folder: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Names of the arrays in a folder, and how to open each."""
    where = f"{folder.resolve()}/"
    base: dict[str, Any] = {"driver": "file", "path": where}
    if (folder / "manifest.ocdbt").is_file():
        base = {"driver": "ocdbt", "base": {"driver": "file", "path": where}, "path": ""}
    # Orbax says whether it wrote every chunk. If so, a missing chunk is lost, not zeros.
    complete = _writes_every_chunk(folder)
    for key in sorted(tensorstore.KvStore.open(base).result().list().result()):
        name, _, last = key.decode().rpartition("/")
        driver = {".zarray": "zarr", "zarr.json": "zarr3"}.get(last)
        if driver:
            spec = {"driver": driver, "kvstore": {**base, "path": f"{base['path']}{name}/"}}
            yield name, spec | ({"fill_missing_data_reads": False} if complete else {})


def _writes_every_chunk(folder: Path) -> bool:
    try:
        told = json.loads((folder / "_METADATA").read_bytes())
    except (OSError, ValueError):
        return False
    return isinstance(told, dict) and told.get("store_array_data_equal_to_fill_value") is True
