"""The imports that a pickle asks for, found without running it."""

from __future__ import annotations

import pickletools
import zipfile
from collections import deque
from collections.abc import Collection
from pathlib import Path
from typing import IO, Final

from specops.checkpoints.members import member_position

_QUIET: Final = {"FRAME", "PROTO"}
_PUTS: Final = {"PUT", "BINPUT", "LONG_BINPUT"}
_GETS: Final = {"GET", "BINGET", "LONG_BINGET"}


def asked_for(path: Path, allowed: Collection[str]) -> tuple[int, str]:
    """(protocol, forbidden name): what prevents loading a torch file.

    Parameters
    ----------
    path : Path
        A pickle, or a zip file with one.
    allowed : collection of str
        See `first_global`.

    Returns
    -------
    protocol : int
        The pickle's protocol, 0 if it names none.
    name : str
        The first name that is not allowed.
    """
    with path.open("rb") as file:
        begin = 0
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                pickles = [i for i in archive.infolist() if i.filename.endswith("/data.pkl")]
            begin = member_position(file, pickles[0]) if pickles else 0
        file.seek(begin)
        start = file.read(2)
        file.seek(begin)
        # In legacy files a magic number, a version and system information precede the objects.
        names = [first_global(file, allowed) for _ in range(1 if begin else 4)]
    protocol = start[1] if start[:1] == b"\x80" and len(start) == 2 else 0
    return protocol, next(filter(None, names), "")


def first_global(file: IO[bytes], allowed: Collection[str]) -> str:
    """The first name that a pickle imports and that is not allowed; empty if there is none.

    Parameters
    ----------
    file : file
        At the beginning of the pickle. Read to its end, or as far as it is sound.
    allowed : collection of str
        Full names: "collections.OrderedDict".
    """
    memo: dict[int, str | None] = {}
    pushed: deque[str | None] = deque([None, None], maxlen=2)  # None for anything but strings
    try:
        for code, argument, _ in pickletools.genops(file):
            name = ""
            if code.name in ("GLOBAL", "INST"):
                name = str(argument).replace(" ", ".")
            elif code.name == "STACK_GLOBAL":
                name = ".".join(part or "?" for part in pushed)
            name = name.replace("__builtin__.", "builtins.")  # its name in Python 2
            if name and name not in allowed:
                return name
            if code.name in _PUTS:
                memo[int(argument or 0)] = pushed[-1]
            elif code.name == "MEMOIZE":
                memo[len(memo)] = pushed[-1]
            elif code.name in _GETS:
                pushed.append(memo.get(int(argument or 0)))
            elif code.name not in _QUIET:
                pushed.append(argument if isinstance(argument, str) and not name else None)
    except (ValueError, OverflowError, MemoryError, UnicodeError):  # damaged, or no pickle
        pass
    return ""
