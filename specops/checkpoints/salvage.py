"""Truncated zip files, which have lost the list of their members at the end."""

from __future__ import annotations

import struct
import zipfile
from pathlib import Path
from typing import Final

from specops.checkpoints.members import member_position

_LOCAL: Final = struct.Struct("<4s5H3I2H")
_ZIP64: Final = 0xFFFFFFFF
_SIZE_FOLLOWS: Final = 8  # a flag: the size comes after the member's bytes, not before


def leading_members(path: Path) -> list[zipfile.ZipInfo]:
    """The complete members at the beginning of a zip file.

    Parameters
    ----------
    path : Path
        The file, whose end may be missing.

    Returns
    -------
    list of ZipInfo
        The members before the first that is cut off or does not state its length.
    """
    size, at = path.stat().st_size, 0
    found: list[zipfile.ZipInfo] = []
    with path.open("rb") as file:
        while True:
            file.seek(at)
            header = file.read(_LOCAL.size)
            if len(header) < _LOCAL.size or not header.startswith(b"PK\x03\x04"):
                return found
            _, _, flags, method, _, _, crc, packed, unpacked, *lengths = _LOCAL.unpack(header)
            name, extra = (file.read(length) for length in lengths)
            if _ZIP64 in (packed, unpacked):
                unpacked, packed = _wide(extra)
            info = zipfile.ZipInfo(name.decode("utf-8" if flags & 0x800 else "cp437", "replace"))
            info.flag_bits, info.compress_type, info.CRC = flags, method, crc
            info.header_offset, info.compress_size, info.file_size = at, packed, unpacked
            at = member_position(file, info) + packed
            if flags & _SIZE_FOLLOWS or at > size:
                return found
            found.append(info)


def open_leading(path: Path, info: zipfile.ZipInfo) -> zipfile.ZipExtFile:
    """One of those members, opened to read its unpacked content."""
    file = path.open("rb")
    try:
        file.seek(member_position(file, info))
        return zipfile.ZipExtFile(file, "r", info, None, True)
    except BaseException:
        file.close()
        raise


def _wide(extra: bytes) -> tuple[int, int]:
    """(unpacked size, packed size) from the extra field that members of 4 GB and more have."""
    at = 0
    while at + 20 <= len(extra):
        tag, length, unpacked, packed = struct.unpack_from("<2H2Q", extra, at)
        if tag == 1 and length >= 16:
            return unpacked, packed
        at += 4 + length
    return _ZIP64, _ZIP64
