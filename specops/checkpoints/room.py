"""Checks that there is room for a compressed file's content, before it is unpacked."""

from __future__ import annotations

import os
import shutil
import tempfile

_USABLE = 0.8
"""Fraction of the free space that one file may take: a choice that leaves room for processing."""


def check_memory(size: int) -> None:
    """Raise if this many bytes would take most of the memory that is available."""
    _check(size, _available(), "memory")


def check_disk(size: int) -> None:
    """Raise if this many bytes would take most of the disk where temporary files go."""
    folder = tempfile.gettempdir()
    _check(size, shutil.disk_usage(folder).free, folder)


def _check(size: int, free: int | None, where: str) -> None:
    if free is not None and size > _USABLE * free:
        raise ValueError(
            f"it unpacks to {size / 1e9:.1f} GB, too much for the {free / 1e9:.1f} GB "
            f"free in {where}; refused"
        )


def _available() -> int | None:
    """Bytes of memory that are available, or None if the system does not say."""
    try:
        # MemAvailable includes the memory of cached files, which the system can free.
        with open("/proc/meminfo", encoding="ascii") as file:
            for line in file:
                if line.startswith("MemAvailable:"):
                    return int(line.split()[1]) << 10
    except (OSError, ValueError, IndexError):
        pass
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):
        return None
