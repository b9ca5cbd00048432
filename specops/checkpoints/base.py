"""`Checkpoint`: the base of all readers of checkpoints."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from specops.errors import CheckpointError

PLAIN_VALUE = "a plain value, no tensor"
_LONGEST = 300  # characters of somebody else's error message


@dataclass(frozen=True)
class Entry:
    """What a checkpoint says about one of its tensors, before it is read."""

    name: str
    """As stored: "layer1.0.conv1.weight", "layers/dense/vars/0"."""
    shape: tuple[int, ...] | None
    """None if it is unknown: for a missing file, a damaged header, or an entry that is no
    tensor."""
    dtype: str
    """The stored type: "float32", "bfloat16", "float8_e4m3fn", "int8"."""
    problem: str = ""
    """Why it cannot be read; empty if it can."""
    harmless: bool = False
    """Whether nothing is missing if it is not read: a plain value."""
    same_as: str = ""
    """Another tensor with the same memory, as in models with tied weights."""


class Checkpoint(ABC):
    """An open checkpoint: its tensors by name, read when they are asked for.

    A reader sets the attributes and implements `_read`. Use it in a ``with`` statement.

    Parameters
    ----------
    path : Path
        The file or folder.
    format : str
        The format's name for people: "safetensors", "torch (legacy pickle)".
    entries : iterable of Entry
        One for each tensor. Of two with one name the second is left out and reported. Names
        that no terminal or file could take are listed with escapes.
    layout : {"torch", "jax", "keras", ""}, optional
        The framework whose order of a kernel's axes to assume; empty if unknown.
    streams : bool, optional
        Whether one tensor can be read without the others in memory.
    problems : iterable of str, optional
        What is wrong with the file as a whole, though some of it can be read.

    Attributes
    ----------
    configuration : dict
        What the file itself says of the model's layers; empty for most formats.
    labels : dict of str to tuple of str
        The layers that a tensor is in by that configuration, its own first.
    """

    path: Path
    format: str
    layout: str
    streams: bool
    entries: tuple[Entry, ...]
    problems: tuple[str, ...]
    configuration: Mapping[str, Any] = {}
    labels: Mapping[str, tuple[str, ...]] = {}

    def __init__(
        self,
        path: Path,
        format: str,
        entries: Iterable[Entry],
        *,
        layout: str = "",
        streams: bool = True,
        problems: Iterable[str] = (),
    ) -> None:
        self.path, self.format, self.layout, self.streams = path, format, layout, streams
        self._stored: dict[str, Entry] = {}  # as the reader gave them, by the listed name
        found, listed = list(problems), []
        for entry in entries:
            name = printable(entry.name)
            if name in self._stored:
                found.append(f"two tensors are called {name!r}; the second is left out")
            else:
                self._stored[name] = entry
                texts = printable(entry.dtype), printable(entry.problem)
                if (name, *texts) == (entry.name, entry.dtype, entry.problem):
                    listed.append(entry)
                else:
                    listed.append(
                        Entry(name, entry.shape, *texts, entry.harmless, printable(entry.same_as))
                    )
        self.entries, self.problems = tuple(listed), tuple(map(printable, found))

    def read(self, name: str) -> np.ndarray[Any, Any]:
        """The tensor of this name, in memory.

        Parameters
        ----------
        name : str
            One of the names in `entries`.

        Returns
        -------
        ndarray
            Of the stored type; bfloat16 and float8, which NumPy lacks, as the equal float32.

        Raises
        ------
        CheckpointError
            If there is no such tensor, or it cannot be read.
        """
        entry = self._stored.get(name)
        if entry is None:
            raise CheckpointError(f"{self.path}: there is no tensor {name!r}")
        if entry.problem:
            raise CheckpointError(
                f"{self.path}: {name!r} cannot be read: {printable(entry.problem)}"
            )
        with explained(self.path, f"{name!r} cannot be read: "):
            array = self._read(entry)
            if entry.shape is not None and array.shape != entry.shape:
                raise ValueError(f"its shape is {array.shape}, not {entry.shape} as listed")
        return array

    @abstractmethod
    def _read(self, entry: Entry) -> np.ndarray[Any, Any]:
        """The tensor of an entry without a problem; any exception becomes a CheckpointError."""

    def close(self) -> None:  # noqa: B027 (most readers keep nothing open)
        """Close the file. Reading afterwards is an error or opens it again."""

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


@contextmanager
def explained(path: Path, doing: str = "") -> Iterator[None]:
    """Turn any error that a damaged file causes into one line that names the file."""
    try:
        yield
    except CheckpointError:
        raise
    except PermissionError as error:
        raise CheckpointError(f"{path}: {doing}no permission to read it; try chmod +r") from error
    except MemoryError as error:
        raise CheckpointError(f"{path}: {doing}it does not fit into memory") from error
    except RecursionError as error:
        raise CheckpointError(f"{path}: {doing}it is nested too deeply") from error
    except Exception as error:
        raise CheckpointError(f"{path}: {doing}{one_line(error)}") from error


def required(module: str, path: Path, install: str) -> Any:
    """A library that a format needs; `install` is its name for pip."""
    try:
        return import_module(module)
    except ImportError as error:
        raise CheckpointError(
            f"{path}: reading {path.suffix or 'it'} needs {module}: pip install {install}"
        ) from error


def one_line(error: BaseException) -> str:
    """An error's message without line breaks, cut short, or its type if it has none."""
    text = printable(" ".join(str(error).split())) or type(error).__name__
    return text if len(text) <= _LONGEST else text[: _LONGEST - 1] + "…"


def printable(text: str) -> str:
    """The text with escapes for halves of surrogate pairs, which UTF-8 cannot encode."""
    return text.encode("utf-8", "backslashreplace").decode()


def layout_from(names: Iterable[str]) -> str:
    """The layout that names imply: torch says "weight", JAX's libraries say "kernel"."""
    last = {name.replace("/", ".").rpartition(".")[2] for name in names}
    if "weight" in last:
        return "" if "kernel" in last else "torch"
    return "jax" if "kernel" in last else ""
