"""Recognising files by what they hold, which names may misstate."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import numpy as np

from specops.errors import CheckpointError

_STEP = 1 << 22
_DEFLATE = 1032  # deflate cannot compress further than this many to one


def head(path: Path, size: int = 16) -> bytes:
    """The first bytes of a file; none of a folder."""
    if path.is_dir():
        return b""
    with path.open("rb") as file:
        return file.read(size)


def zip_names(path: Path) -> list[str]:
    """The names in a zip file; none if the path is no zip file.

    Of one that was cut off those of the whole members, if they are arrays of NumPy.
    """
    if not head(path).startswith((b"PK\x03\x04", b"PK\x05\x06")):
        return []
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.namelist()
    except (zipfile.BadZipFile, NotImplementedError, ValueError, EOFError) as error:
        from specops.checkpoints.salvage import leading_members

        names = [info.filename for info in leading_members(path)]
        if names and all(name.endswith(".npy") for name in names):
            return names
        raise CheckpointError(
            f"{path}: the zip file is truncated or damaged; copy or download it again"
        ) from error


def check_member(info: zipfile.ZipInfo, size: int) -> None:
    """Raise if a zip file's member cannot have the size that it claims.

    Parameters
    ----------
    info : ZipInfo
        The member, as the zip file's directory lists it.
    size : int
        The size of the whole file.
    """
    if info.flag_bits & 1:
        raise ValueError("it is encrypted")
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise ValueError(f"it is compressed by method {info.compress_type}, which nobody uses")
    stored = info.compress_type == zipfile.ZIP_STORED
    ratio = 1 if stored else _DEFLATE
    if info.compress_size > size or info.file_size > ratio * info.compress_size:
        raise ValueError(
            f"{info.compress_size} of the file's {size} bytes cannot unpack to {info.file_size}"
        )


def member_position(file: Any, info: zipfile.ZipInfo) -> int:
    """Where a member's bytes begin: after a header of 30 bytes, its name and extra fields."""
    file.seek(info.header_offset + 26)
    lengths = file.read(4)
    name, extra = (int.from_bytes(lengths[at : at + 2], "little") for at in (0, 2))
    return info.header_offset + 30 + name + extra


def fill(file: Any, count: int) -> np.ndarray[Any, Any]:
    """The next bytes of a file as a flat uint8 array, in memory of their own."""
    raw: np.ndarray[Any, Any] = np.empty(count, dtype=np.uint8)
    view, done = raw.data, 0
    while done < count:
        # Zip members copy what they read, so take little at a time.
        got = file.readinto(view[done : done + _STEP])
        if not got:
            raise EOFError(f"the file ends {count - done} bytes too early")
        done += got
    return raw
