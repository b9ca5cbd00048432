"""Recognising files by their content, because their names may be wrong."""

from __future__ import annotations

import zipfile
from pathlib import Path

from specops.checkpoints.salvage import leading_members
from specops.errors import CheckpointError


def head(path: Path, size: int = 16) -> bytes:
    """The first bytes of a file; none of a folder."""
    if path.is_dir():
        return b""
    with path.open("rb") as file:
        return file.read(size)


def zip_names(path: Path) -> list[str]:
    """The names in a zip file; none if the path is no zip file.

    For a truncated one, the names of its complete members, if they are NumPy arrays.
    """
    if not head(path).startswith((b"PK\x03\x04", b"PK\x05\x06")):
        return []
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.namelist()
    except (zipfile.BadZipFile, NotImplementedError, ValueError, EOFError) as error:
        names = [info.filename for info in leading_members(path)]
        if names and all(name.endswith(".npy") for name in names):
            return names
        raise CheckpointError(
            f"{path}: the zip file is truncated or damaged; copy or download it again"
        ) from error
