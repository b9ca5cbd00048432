"""Whether what a compressed file unpacks to has room, before it is unpacked."""

from __future__ import annotations

import os
import shutil
import tempfile

_USABLE = 0.8
"""Fraction of what is free that one file may take: a choice that leaves the rest for what is made
of it."""


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
    """Bytes of memory that can be had, or None if the system does not say."""
    try:
        # The files that the system keeps in memory give way, though they do not count as free.
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
