"""Members of zip files: where their bytes are, and whether they can be what they claim."""

from __future__ import annotations

import zipfile
from typing import Any

import numpy as np

_STEP = 1 << 22
_DEFLATE = 1032  # the largest compression ratio of deflate


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
        raise ValueError(f"it is compressed by the unusual method {info.compress_type}")
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
        # In small steps, because zip members copy what they read.
        got = file.readinto(view[done : done + _STEP])
        if not got:
            raise EOFError(f"the file ends {count - done} bytes too early")
        done += got
    return raw
