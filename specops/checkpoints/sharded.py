"""Folders of Hugging Face: shards with an index of which file holds which tensor, or one file."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path, PureWindowsPath
from typing import Any

import numpy as np

from specops.checkpoints.base import Checkpoint, Entry, layout_from, one_line, printable
from specops.errors import CheckpointError

_SINGLE = (
    *("model.safetensors", "pytorch_model.bin"),
    *("adapter_model.safetensors", "adapter_model.bin"),
)
_INDICES = ("*.safetensors.index.json", "pytorch_model*.bin.index.json")
_SUFFIXES = {".safetensors", ".bin", ".pt", ".pth"}
_LIMIT = 1 << 28  # most bytes of an index


Open = Callable[[Path], Checkpoint]


def open_folder(path: Path, open_file: Open) -> Checkpoint | None:
    """The checkpoint in a folder, or that of an index file; None if there is none.

    Parameters
    ----------
    path : Path
        The folder, or the index itself.
    open_file : callable
        Opens one of its files.
    """
    if not path.is_dir():
        return ShardedCheckpoint(path, path, open_file)
    for name in _SINGLE:
        if (path / f"{name}.index.json").is_file():
            return ShardedCheckpoint(path, path / f"{name}.index.json", open_file)
        if (path / name).is_file():
            return open_file(path / name)
    found = sorted(index for pattern in _INDICES for index in path.glob(pattern))
    if len(found) > 1:
        names = ", ".join(index.name for index in found)
        raise CheckpointError(f"{path}: more than one index ({names}); name one of them")
    if found:
        return ShardedCheckpoint(path, found[0], open_file)
    files = sorted(path.glob("*.safetensors"))
    if len(files) > 1:
        raise CheckpointError(f"{path}: {len(files)} safetensors files and no index; name one")
    return open_file(files[0]) if files else None


class ShardedCheckpoint(Checkpoint):
    """A reader that keeps one of its files open at a time.

    Parameters
    ----------
    path : Path
        What the user named.
    index : Path
        The index file, next to its shards.
    open_shard : callable
        Opens one of them.
    """

    def __init__(self, path: Path, index: Path, open_shard: Open) -> None:
        self._open_shard, self._folder = open_shard, index.parent
        self._current: tuple[str, Checkpoint] | None = None
        self._shards = _weight_map(index)
        held: dict[str, Entry] = {}
        problems: list[str] = []
        kinds, layouts, streams = set(), set(), True
        files = dict.fromkeys(self._shards.values())
        wrong: dict[str, str] = {}
        for file in files:
            if not (self._folder / file).is_file():
                wrong[file] = "its shard is missing"
                problems.append(f"shard {file} is missing; download it into this folder")
                continue
            try:
                shard = self._shard(file)
            except CheckpointError as error:
                reason = one_line(error).removeprefix(f"{printable(str(self._folder / file))}: ")
                wrong[file] = f"its shard was refused: {reason}"
                problems.append(f"shard {file}: {reason}")
                continue
            held |= {e.name: e for e in shard.entries if self._shards.get(e.name) == file}
            problems += [f"shard {file}: {problem}" for problem in shard.problems]
            kinds.add(shard.format.partition(" ")[0])
            layouts.add(shard.layout)
            streams &= shard.streams
        self.close()
        entries = [
            held.get(name) or Entry(name, None, "", wrong.get(file) or "its shard does not hold it")
            for name, file in self._shards.items()
        ]
        kind = " and ".join(sorted(kinds)) or "unreadable"
        layout = layouts.pop() if len(layouts) == 1 else layout_from(self._shards)
        count = f"{len(files)} file{'s' if len(files) != 1 else ''}"
        super().__init__(
            path,
            f"{kind} shards ({count})",
            entries,
            layout=layout,
            streams=streams,
            problems=problems,
        )

    def _shard(self, file: str) -> Checkpoint:
        if self._current is None or self._current[0] != file:
            self.close()
            self._current = (file, self._open_shard(self._folder / file))
        return self._current[1]

    def _read(self, entry: Entry) -> np.ndarray[Any, Any]:
        return self._shard(self._shards[entry.name]).read(entry.name)

    def close(self) -> None:
        """Close the shard that is open."""
        if self._current is not None:
            self._current[1].close()
        self._current = None


def _weight_map(index: Path) -> dict[str, str]:
    """The file of each tensor; all must be in the index's own folder."""
    if index.stat().st_size > _LIMIT:
        raise CheckpointError(f"{index}: too large for an index")
    try:
        content = json.loads(index.read_bytes())
    except ValueError as error:
        raise CheckpointError(f"{index}: no JSON ({error}); download the index again") from error
    shards = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(shards, dict) or not all(type(file) is str for file in shards.values()):
        raise CheckpointError(f"{index}: no weight_map from names to files in it")
    for file in shards.values():
        # Parsed as a Windows path, which covers every way to leave a folder.
        parts = PureWindowsPath(file)
        if parts.anchor or ".." in parts.parts or "\0" in file:
            raise CheckpointError(f"{index}: names {file!r}, outside its folder; refused")
        if parts.suffix not in _SUFFIXES:
            raise CheckpointError(f"{index}: names {file!r}, which is no file of weights")
    return {printable(name): file for name, file in shards.items()}
