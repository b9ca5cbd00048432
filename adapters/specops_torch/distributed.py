"""Folders of torch.distributed.checkpoint: shards, and a pickle with the index of their contents.

The pickle is read as data: its classes become plain records, and anything else in it is refused.
Pieces of tensors are read by ``torch.load(..., weights_only=True)``.
"""

from __future__ import annotations

import io
import math
import pickle
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path, PureWindowsPath
from typing import Any, NamedTuple

import numpy as np

from specops.checkpoints.base import PLAIN_VALUE, Checkpoint, Entry, explained, required
from specops.checkpoints.dtypes import itemsize
from specops.checkpoints.room import check_memory
from specops.errors import CheckpointError

METADATA = ".metadata"
_LIMIT = 1 << 28  # bytes of the metadata file
_PACKAGE = "torch.distributed.checkpoint."
_OTHER_TYPES = ("quint", "qint", "bits", "float4", "float8", "uint", "int")


class _Piece(NamedTuple):
    """A part of a tensor, and the bytes of a file that hold it."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    file: Path
    begin: int
    length: int


class _Record:
    """The plain record that stands for an object of torch.distributed.checkpoint."""

    def __init__(self, *arguments: Any) -> None:
        self.arguments = arguments

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, dict):
            vars(self).update(state)
        else:
            self.arguments = tuple(state)


class _Reader(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if module.startswith(_PACKAGE):
            return _Record
        if (module, name) == ("torch", "Size"):
            return tuple
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if module == "torch" and (itemsize(name) is not None or name.startswith(_OTHER_TYPES)):
            return name
        if module.startswith("pathlib") and name.endswith("Path"):
            return _Record
        if (module, name) == ("torch.serialization", "_get_layout"):
            return _Record
        raise CheckpointError(f"its metadata asks for {module}.{name}, which loading could run")


class DistributedCheckpoint(Checkpoint):
    """A reader that assembles tensors from the pieces that ranks have written.

    Parameters
    ----------
    path : Path
        The folder.
    """

    def __init__(self, path: Path) -> None:
        required("torch", path, "'specops[torch]'")
        with explained(path, "its metadata is damaged or of no known form: "):
            if (path / METADATA).stat().st_size > _LIMIT:
                raise CheckpointError(f"{path}: {METADATA} is too large to be one")
            told = _Reader(io.BytesIO((path / METADATA).read_bytes())).load()
            stored: dict[Any, Any] = {
                (index.fqn, tuple(getattr(index, "offset", None) or ())): info
                for index, info in told.storage_data.items()
            }
            self._pieces: dict[str, list[_Piece]] = {}
            tensors = told.state_dict_metadata.items()
            entries = [self._entry(path, str(name), about, stored) for name, about in tensors]
        super().__init__(path, "torch.distributed.checkpoint", entries, layout="torch")

    def _entry(self, path: Path, name: str, about: Any, stored: dict[Any, Any]) -> Entry:
        first, dot, rest = name.partition(".")
        listed = f"optimizer.{first}{dot}{rest}" if "optim" in first != "optimizer" else name
        if not hasattr(about, "size"):
            return Entry(listed, None, "", PLAIN_VALUE, harmless=True)
        shape, dtype = tuple(about.size), _dtype(about.properties)
        if itemsize(dtype) is None:
            return Entry(listed, shape, dtype, f"its type {dtype} is packed or unknown")
        try:
            pieces = list(_pieces(path, name, about.chunks, stored))
        except CheckpointError as error:
            return Entry(listed, shape, dtype, str(error))
        if sum(math.prod(piece.sizes) for piece in pieces) != math.prod(shape):
            return Entry(listed, shape, dtype, "its pieces do not make up the whole")
        if any(math.prod(p.sizes) * (itemsize(dtype) or 0) > p.length for p in pieces):
            return Entry(listed, None, dtype, "it claims more bytes than its pieces have")
        self._pieces[listed] = pieces
        return Entry(listed, shape, dtype)

    def _read(self, entry: Entry) -> np.ndarray[Any, Any]:
        import torch

        shape = entry.shape or ()
        wide = entry.dtype if hasattr(np, entry.dtype) else "float32"
        check_memory(math.prod(shape) * np.dtype(wide).itemsize)
        array = np.empty(shape, wide)
        for piece in self._pieces[entry.name]:
            with piece.file.open("rb") as file:
                file.seek(piece.begin)
                raw = io.BytesIO(file.read(piece.length))
            tensor = torch.load(raw, map_location="cpu", weights_only=True)
            if tuple(tensor.shape) != piece.sizes:
                raise ValueError(f"a piece has the shape {tuple(tensor.shape)}, not {piece.sizes}")
            values = tensor if hasattr(np, entry.dtype) else tensor.to(torch.float32)
            where = zip(piece.offsets, piece.sizes, strict=True)
            array[tuple(slice(at, at + n) for at, n in where)] = values.detach().numpy()
        return array


def _dtype(properties: Any) -> str:
    known = getattr(properties, "dtype", None) or (properties.arguments or ("",))[0]
    return str(known)


def _pieces(path: Path, name: str, chunks: Any, stored: dict[Any, Any]) -> Iterator[_Piece]:
    for chunk in chunks:
        offsets, sizes = tuple(chunk.offsets), tuple(chunk.sizes)
        info = stored.get((name, offsets)) or (stored.get((name, ())) if not any(offsets) else None)
        if info is None:
            raise CheckpointError("one of its pieces is in no shard")
        if getattr(info, "transform_descriptors", None):
            raise CheckpointError("its shards are compressed or encrypted, which is not undone")
        parts = PureWindowsPath(info.relative_path)
        if parts.anchor or ".." in parts.parts:
            raise CheckpointError(f"its metadata names {info.relative_path!r}, outside the folder")
        file = path / info.relative_path
        if not file.is_file():
            raise CheckpointError("its shard is missing")
        if info.offset + info.length > file.stat().st_size:
            raise CheckpointError("its bytes lie beyond the end of its shard")
        yield _Piece(offsets, sizes, file, info.offset, info.length)
