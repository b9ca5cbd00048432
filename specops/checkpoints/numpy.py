"""NumPy's own files: .npy with one array, .npz with several in a zip file."""

from __future__ import annotations

import math
import zipfile
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, cast

import numpy as np

from specops.checkpoints.base import Checkpoint, Entry, layout_from, one_line
from specops.checkpoints.dtypes import decode, is_numeric, plain
from specops.checkpoints.members import check_member, fill
from specops.checkpoints.room import check_memory
from specops.checkpoints.salvage import leading_members, open_leading

_LARGEST = 2**63 - 1
_MAGIC = b"\x93NUMPY"
_LONGEST_LINE = 1 << 20  # most bytes of a line of settings before the arrays


class _Header(NamedTuple):
    shape: tuple[int, ...]
    fortran: bool
    dtype: np.dtype[Any]
    length: int  # the position where the values begin

    def entry(self, name: str, size: int) -> Entry:
        """The entry of an array whose file or member has this many bytes."""
        problem, dtype = "", self.dtype.name
        shape: tuple[int, ...] | None = self.shape
        wanted = math.prod(self.shape) * self.dtype.itemsize
        if self.dtype.hasobject:
            problem = "it holds Python objects, which are not unpickled"
        elif not is_numeric(self.dtype):
            problem = f"not a tensor but of type {self.dtype.str!r}, which names no numbers"
        elif wanted != size - self.length:
            problem = (
                f"its header claims {wanted} bytes and {size - self.length} are there; "
                "truncated or damaged"
            )
            shape = None
        return Entry(name, shape, dtype, problem)

    def read(self, file: BinaryIO) -> np.ndarray[Any, Any]:
        """The array whose header this is, from the file at its beginning."""
        _header(file)
        flat = fill(file, math.prod(self.shape) * self.dtype.itemsize).view(self.dtype)
        order = self.shape[::-1] if self.fortran else self.shape
        array = plain(flat).reshape(order)
        return array.T if self.fortran else array


class NpyCheckpoint(Checkpoint):
    """A reader of one array, which has the name of its file.

    Parameters
    ----------
    path : Path
        The file.
    """

    def __init__(self, path: Path) -> None:
        with path.open("rb") as file:
            self._header = _header(file)
        super().__init__(path, "npy", [self._header.entry(path.stem, path.stat().st_size)])

    def _read(self, entry: Entry) -> np.ndarray[Any, Any]:
        with self.path.open("rb") as file:
            return self._header.read(file)


class LeavesCheckpoint(Checkpoint):
    """A reader of several arrays one behind the other, as ``equinox.tree_serialise_leaves`` writes.

    The file has no names: they are called leaf.0, leaf.1 and so on. A line of settings may come
    before them.

    Parameters
    ----------
    path : Path
        The file.
    """

    def __init__(self, path: Path) -> None:
        self._leaves: dict[str, tuple[int, _Header]] = {}
        entries: list[Entry] = []
        problems = []
        size = path.stat().st_size
        with path.open("rb") as file:
            at = first_leaf(path)
            while at < size:
                name = f"leaf.{len(entries)}"
                file.seek(at)
                try:
                    header = _header(file)
                except Exception as error:  # the arrays before it can still be read
                    problems.append(f"truncated or damaged behind {len(entries)} arrays: {error}")
                    break
                begin, at = at, file.tell() + math.prod(header.shape) * header.dtype.itemsize
                bfloat16 = header.dtype.str == "|V2"  # NumPy writes bfloat16 as this type
                header = header._replace(length=header.length - begin)
                entry = header.entry(name, min(at, size) - begin)
                if bfloat16 and at <= size:
                    entry = Entry(name, header.shape, "bfloat16")
                entries.append(entry)
                self._leaves[name] = begin, header
        super().__init__(path, "equinox leaves", entries, layout="torch", problems=problems)

    def _read(self, entry: Entry) -> np.ndarray[Any, Any]:
        begin, header = self._leaves[entry.name]
        with self.path.open("rb") as file:
            file.seek(begin)
            if entry.dtype != "bfloat16":
                return header.read(file)
            file.seek(begin + header.length)
            raw = fill(file, math.prod(header.shape) * 2)
        return decode(raw, "bfloat16").reshape(header.shape)


def first_leaf(path: Path) -> int:
    """Where the first array begins in a file of equinox; -1 if it is no such file."""
    with path.open("rb") as file:
        start = 0
        if file.read(1) == b"{":
            file.seek(0)
            start = len(file.readline(_LONGEST_LINE))
        file.seek(start)
        if file.read(len(_MAGIC)) != _MAGIC:
            return -1
        if start:
            return start
        file.seek(0)
        try:
            header = _header(file)
        except Exception:
            return -1
        end = header.length + math.prod(header.shape) * header.dtype.itemsize
        if end >= path.stat().st_size:
            return -1
        file.seek(end)
        return 0 if file.read(len(_MAGIC)) == _MAGIC else -1


class NpzCheckpoint(Checkpoint):
    """A reader of the arrays in a zip file, compressed or not.

    Parameters
    ----------
    path : Path
        The file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._archive: zipfile.ZipFile | None = None
        self._members: dict[str, tuple[zipfile.ZipInfo, _Header]] = {}
        problems = []
        try:
            self._archive = zipfile.ZipFile(path)
            members = self._archive.infolist()
        except (zipfile.BadZipFile, NotImplementedError, ValueError, EOFError):
            members = leading_members(path)
            if not members:
                raise
            count = f"{len(members)} array{'s' if len(members) != 1 else ''}"
            problems.append(f"truncated or damaged: only the first {count} can be read")
        try:
            size = path.stat().st_size
            entries = [self._entry(info, size) for info in members]
        except BaseException:
            self.close()
            raise
        layout = layout_from(entry.name for entry in entries)
        super().__init__(path, "npz", entries, layout=layout, problems=problems)

    def _open(self, info: zipfile.ZipInfo) -> BinaryIO:
        if self._archive is None:
            return cast(BinaryIO, open_leading(self.path, info))
        return cast(BinaryIO, self._archive.open(info))

    def _entry(self, info: zipfile.ZipInfo, size: int) -> Entry:
        name = info.filename.removesuffix(".npy")
        if name == info.filename:
            return Entry(name, None, "", "not a tensor: no .npy file")
        try:
            check_member(info, size)
            with self._open(info) as member:
                header = _header(member)
        except Exception as error:  # the other members can still be read
            return Entry(name, None, "", one_line(error))
        self._members.setdefault(name, (info, header))
        return header.entry(name, info.file_size)

    def _read(self, entry: Entry) -> np.ndarray[Any, Any]:
        info, header = self._members[entry.name]
        if info.compress_type != zipfile.ZIP_STORED:
            check_memory(info.file_size)
        with self._open(info) as member:
            return header.read(member)  # at its end the zip file's checksum is compared

    def close(self) -> None:
        """Close the zip file."""
        if self._archive is not None:
            self._archive.close()


def _header(file: BinaryIO) -> _Header:
    version = np.lib.format.read_magic(file)
    if version == (1, 0):
        shape, fortran, dtype = np.lib.format.read_array_header_1_0(file)
    elif version in ((2, 0), (3, 0)):  # 3.0 differs only in that names of fields are UTF-8
        shape, fortran, dtype = np.lib.format.read_array_header_2_0(file)
    else:
        raise ValueError(f"version {version} of the .npy format is unknown")
    if not all(0 <= extent <= _LARGEST for extent in shape):
        raise ValueError(f"its header claims the shape {shape}")
    return _Header(shape, fortran, dtype, file.tell())
