"""Keras weights in HDF5: .weights.h5, .h5, and the .keras zip file that holds one."""

from __future__ import annotations

import io
import json
import math
import shutil
import tempfile
import zipfile
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np

from specops.checkpoints.base import PLAIN_VALUE, Checkpoint, Entry, one_line, required
from specops.checkpoints.dtypes import decode, is_numeric, plain
from specops.checkpoints.first_bytes import head
from specops.checkpoints.members import check_member, member_position
from specops.checkpoints.room import check_disk, check_memory
from specops.errors import CheckpointError

_INSIDE = "model.weights.h5"
_SETTINGS = "config.json"
_HARMLESS_BYTES = 1 << 26
"""An array of at most this size is read even if the file stores hardly anything: a choice, 64
MiB."""
_HDF5_RATIO = 2000
"""More than HDF5's compression can reach: deflate reaches at most 1032."""
_STRING, _GIVEN = 3, 2  # HDF5's codes for strings, and for a fill value that the writer chose


class KerasCheckpoint(Checkpoint):
    """A reader of HDF5 files; a tensor's name is its path there.

    Links to other files are not followed, nor arrays read that lie in other files.

    Parameters
    ----------
    path : Path
        The file.
    """

    def __init__(self, path: Path) -> None:
        h5py = required("h5py", path, "'specops[inspect]'")
        self._source = _hdf5_file(path)
        self._file: Any = None
        try:
            self._file = h5py.File(self._source, "r")
            entries, problems = self._list(h5py)
        except OSError as error:
            self.close()
            raise CheckpointError(
                f"{path}: the HDF5 file is truncated or damaged ({one_line(error)}); "
                "copy or download it again"
            ) from error
        except BaseException:
            self.close()
            raise
        super().__init__(path, "keras h5", entries, layout="keras", problems=problems)
        self.configuration = _configuration(path, self._file)
        self.labels = {entry.name: self._labels(entry.name) for entry in entries}

    def _list(self, h5py: Any) -> tuple[list[Entry], list[str]]:
        names: list[str] = []
        problems: list[str] = []
        try:
            self._file.visit(names.append)  # neither soft nor external links
        except Exception as error:
            problems.append(f"the list of tensors may be incomplete: {one_line(error)}")
        self._listed = frozenset(names)
        entries = []
        for name in names:
            try:
                found = self._file[name]
                if isinstance(found, h5py.Dataset):
                    entries.append(_entry(name, found))
            except Exception as error:  # the other tensors can still be read
                entries.append(Entry(name, None, "", one_line(error)))
        return entries, problems

    def _labels(self, name: str) -> tuple[str, ...]:
        """The names of the layers around a tensor, as Keras stores them with their variables."""
        found, parts = [], name.split("/")
        for end in range(len(parts) - 1, 0, -1):
            group = "/".join([*parts[:end], "vars"])
            if group in self._listed:  # so it is no link
                label = self._file[group].attrs.get("name")
                found += [label] if isinstance(label, str) else []
        return tuple(found)

    def _read(self, entry: Entry) -> np.ndarray[Any, Any]:
        dataset = self._file[entry.name]
        if dataset.chunks is not None:
            check_memory(dataset.nbytes)
        stored = np.asarray(dataset[()])
        if entry.dtype == "bfloat16":
            raw = np.frombuffer(stored.tobytes(), dtype=np.uint8)
            return decode(raw, "bfloat16").reshape(stored.shape)
        return plain(stored)

    def close(self) -> None:
        """Close the file."""
        if self._file:
            self._file.close()
        self._source.close()


def _configuration(path: Path, file: Any) -> dict[str, Any]:
    """The configuration in a whole model's file; empty for a file of weights alone."""
    text = file.attrs.get("model_config", "")
    if head(path).startswith(b"PK"):
        with zipfile.ZipFile(path) as archive:
            if _SETTINGS in archive.namelist():
                info = archive.getinfo(_SETTINGS)
                check_member(info, path.stat().st_size)
                text = archive.read(info)
    try:
        found = json.loads(text) if isinstance(text, str | bytes) and text else {}
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _entry(name: str, dataset: Any) -> Entry:
    shape, dtype = dataset.shape, dataset.dtype
    if shape is None or _is_text(dataset):
        return Entry(name, None, "", PLAIN_VALUE, harmless=True)
    told = dataset.attrs.get("dtype") if dtype.kind == "V" else None
    bfloat16 = told == "bfloat16" and dtype.itemsize == 2
    wanted, stored = math.prod(shape) * dtype.itemsize, dataset.id.get_storage_size()
    problem, known = "", True
    if not (is_numeric(dtype) or bfloat16):
        problem, known = f"not a tensor but of type {dtype.str!r}", False
    elif dataset.external or dataset.is_virtual:
        problem, known = "its numbers lie in another file, which is not opened", False
    elif wanted > max(_HARMLESS_BYTES, _HDF5_RATIO * stored):
        problem, known = f"{stored} stored bytes cannot unpack to {wanted}", False
    elif _unwritten(dataset, stored):
        problem = "never written"
    shape = tuple(shape) if known else None
    return Entry(name, shape, "bfloat16" if bfloat16 else dtype.name, problem)


def _is_text(dataset: Any) -> bool:
    """Whether it holds strings, of fixed or variable length."""
    return dataset.dtype.kind in "SU" or dataset.id.get_type().get_class() == _STRING


def _unwritten(dataset: Any, stored: int) -> bool:
    """Whether some of its values are not in the file, so that HDF5 would fill in a default."""
    if not dataset.size or dataset.id.get_create_plist().fill_value_defined() == _GIVEN:
        return False
    if dataset.chunks is None:
        return stored == 0
    pairs = zip(dataset.shape, dataset.chunks, strict=True)
    return bool(dataset.id.get_num_chunks() < math.prod(-(-n // chunk) for n, chunk in pairs))


def _hdf5_file(path: Path) -> BinaryIO:
    """The HDF5 file at the path, or the one in the zip file there."""
    if not head(path).startswith(b"PK"):
        return path.open("rb")
    with zipfile.ZipFile(path) as archive:
        info = archive.getinfo(_INSIDE)
        check_member(info, path.stat().st_size)
        with archive.open(info) as member:
            if info.compress_type == zipfile.ZIP_STORED:
                # Seeking in a zip member reads all before it. A stored one has its bytes in the
                # file unchanged, so they can be read directly.
                with path.open("rb") as file:
                    begin = member_position(file, info)
                window = _Window(path, begin, info.file_size)
                return cast(BinaryIO, io.BufferedReader(window))
            check_disk(info.file_size)
            unpacked = tempfile.TemporaryFile()  # noqa: SIM115 (the reader closes it)
            try:
                shutil.copyfileobj(member, unpacked)
            except BaseException:
                unpacked.close()
                raise
            return cast(BinaryIO, unpacked)


class _Window(io.RawIOBase):
    """A part of a file as a file of its own."""

    def __init__(self, path: Path, begin: int, size: int) -> None:
        self._file = path.open("rb", buffering=0)
        self._begin, self._size, self._at = begin, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = offset + (0, self._at, self._size)[whence]
        return self._at

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")
        self._file.seek(self._begin + self._at)
        got = self._file.readinto(view[: max(0, self._size - self._at)])
        self._at += got
        return got

    def close(self) -> None:
        self._file.close()
        super().close()
