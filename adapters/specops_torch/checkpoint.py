"""Files of `torch.save`: zip files are read tensor by tensor, legacy pickles as a whole.

Everything goes through ``torch.load(..., weights_only=True)``, which builds tensors and plain
containers and refuses whatever else a pickle asks for.
"""

from __future__ import annotations

import pickle
import re
import warnings
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from specops.checkpoints.base import Checkpoint, Entry, explained, one_line
from specops.checkpoints.branches import no_tensor, unwrapped
from specops.checkpoints.dtypes import decode, itemsize
from specops.checkpoints.members import fill, member_position
from specops.checkpoints.pickles import asked_for
from specops.errors import CheckpointError

if TYPE_CHECKING:
    import torch

_NO_NUMBERS = "saved without its numbers, from the meta device"
_HARMLESS_REPEATS = 1 << 20
"""Bytes up to which a view may repeat its storage, as expanded scales do: a choice, 1 MiB."""


class _Record(NamedTuple):
    size: int
    crc: int  # 0 if it was saved without


def open_torch(path: Path, zipped: bool) -> Checkpoint:
    """The reader of a file that `torch.save` wrote.

    Parameters
    ----------
    path : Path
        The file.
    zipped : bool
        Whether it is a zip file, and no bare pickle.
    """
    try:
        import torch  # noqa: F401
    except ImportError as error:
        raise CheckpointError(
            f"{path}: reading {path.suffix or 'it'} needs torch: pip install 'specops[torch]'"
        ) from error
    with explained(path):
        if not zipped:
            return _WholeCheckpoint(path, "torch (legacy pickle)")
        records = _records(path)
        try:
            return _ZipCheckpoint(path, records)
        except NotImplementedError:
            return _WholeCheckpoint(path, "torch")


class _ZipCheckpoint(Checkpoint):
    """A reader that lists tensors without loading them, and reads each from the file on demand."""

    def __init__(self, path: Path, records: dict[int, _Record]) -> None:
        self._records = records
        self._tensors: dict[str, torch.Tensor] = {}
        entries = []
        owners: dict[Any, str] = {}
        for name, leaf in _leaves(_load(path, "meta")):
            entry = _entry(name, leaf)
            if not entry.problem:
                problem = self._problem(leaf)
                known = problem in ("", _NO_NUMBERS)
                tied = "" if problem else owners.setdefault(_place(leaf, _position(leaf)), name)
                entry = Entry(
                    name,
                    entry.shape if known else None,
                    entry.dtype,
                    problem,
                    same_as="" if tied == name else tied,
                )
                self._tensors.setdefault(name, leaf)
            entries.append(entry)
        if self._tensors and not any(map(_position, self._tensors.values())):
            # torch before 2.7 does not say where in the file a tensor's values are.
            raise NotImplementedError
        super().__init__(path, "torch", entries, layout="torch")

    def _problem(self, tensor: torch.Tensor) -> str:
        storage, position = tensor.untyped_storage(), _position(tensor)
        if position is None:
            return _NO_NUMBERS
        held = self._records.get(position, _Record(0, 0)).size
        if held < storage.nbytes():
            return f"its storage claims {storage.nbytes()} bytes and {held} are there"
        wanted = tensor.numel() * tensor.element_size()
        if wanted > max(_HARMLESS_REPEATS, storage.nbytes()):
            return f"{wanted} bytes, a view that repeats {storage.nbytes()}"
        return ""

    def _read(self, entry: Entry) -> np.ndarray[Any, Any]:
        tensor = self._tensors[entry.name]
        shape, strides = tuple(tensor.shape), tensor.stride()
        if 0 in shape:
            return decode(np.empty(0, np.uint8), entry.dtype).reshape(shape)
        span = 1 + sum((n - 1) * s for n, s in zip(shape, strides, strict=True))
        width = tensor.element_size()
        begin = (_position(tensor) or 0) + tensor.storage_offset() * width
        with self.path.open("rb", buffering=0) as file:
            file.seek(begin)
            raw = fill(file, span * width)
        record = self._records.get(begin)
        if record and record.crc and record.size == raw.size and zlib.crc32(raw.data) != record.crc:
            raise ValueError("damaged: its checksum does not match")
        flat = decode(raw, entry.dtype)
        steps = [s * flat.itemsize for s in strides]
        array = np.lib.stride_tricks.as_strided(flat, shape, steps)
        if tensor.is_conj():
            array = array.conj()
        if tensor.is_neg():
            array = -array
        return array if tensor.is_contiguous() else np.ascontiguousarray(array)


class _WholeCheckpoint(Checkpoint):
    """A reader that has every tensor in memory."""

    def __init__(self, path: Path, format: str) -> None:
        self._tensors: dict[str, torch.Tensor] = {}
        entries = []
        owners: dict[Any, str] = {}
        for name, leaf in _leaves(_load(path, "cpu")):
            entry = _entry(name, leaf)
            if not entry.problem and leaf.is_meta:
                entry = Entry(name, entry.shape, entry.dtype, _NO_NUMBERS)
            elif not entry.problem:
                tied = owners.setdefault(_place(leaf, leaf.untyped_storage().data_ptr()), name)
                entry = replace(entry, same_as="" if tied == name else tied)
            entries.append(entry)
            if not entry.problem:
                self._tensors.setdefault(name, leaf)
        super().__init__(path, format, entries, layout="torch", streams=False)

    def _read(self, entry: Entry) -> np.ndarray[Any, Any]:
        import torch

        tensor = self._tensors[entry.name].detach().cpu().resolve_conj().resolve_neg()
        if not hasattr(np, entry.dtype):  # bfloat16 and float8
            tensor = tensor.to(torch.float32)
        return np.array(tensor.numpy())

    def close(self) -> None:
        """Let go of the tensors."""
        self._tensors.clear()


def _place(tensor: torch.Tensor, storage: int | None) -> Any:
    """A key that is equal for two names of the same values."""
    if not tensor.dim() or not tensor.numel():
        return object()
    view = tensor.storage_offset(), tuple(tensor.shape), tensor.stride(), tensor.dtype
    return storage, *view, tensor.is_conj(), tensor.is_neg()


def _position(tensor: torch.Tensor) -> int | None:
    """The position in the file at which the bytes of a listed tensor's storage begin."""
    return getattr(tensor.untyped_storage(), "_checkpoint_offset", None)


def _records(path: Path) -> dict[int, _Record]:
    """The records of the zip file, by where their bytes begin."""
    found = {}
    with zipfile.ZipFile(path) as archive, path.open("rb") as file:
        if any(name.endswith("/constants.pkl") for name in archive.namelist()):
            raise CheckpointError(
                f"{path}: a TorchScript program, which is not run; "
                "save the state_dict() of the module instead"
            )
        for info in archive.infolist():
            if info.compress_type != zipfile.ZIP_STORED or info.file_size != info.compress_size:
                raise CheckpointError(f"{path}: compressed, which torch.save never does; refused")
            position = member_position(file, info)
            found[position] = _Record(info.file_size, info.CRC)
            file.seek(position)
            if info.filename.endswith("/byteorder") and file.read(3) == b"big":
                raise CheckpointError(f"{path}: in big-endian order; save it again on this machine")
    return found


def _load(path: Path, device: str) -> Any:
    """The objects in the file; with device "meta", tensors have no values."""
    import torch

    # Not by name: torch.load would read a name that ends in .safetensors as that format.
    with path.open("rb") as file, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return torch.load(file, map_location=device, weights_only=True)
        except pickle.UnpicklingError as error:
            raise CheckpointError(f"{path}: {_refusal(path, error)}") from None
        except (OSError, MemoryError, RecursionError, NotImplementedError):
            raise  # the last for quantised tensors, which the meta device lacks
        except Exception as error:
            raise CheckpointError(
                f"{path}: truncated or damaged ({one_line(error)}); copy or download it again"
            ) from error


def _refusal(path: Path, error: Exception) -> str:
    """Why the pickle was refused, without torch's advice on how to run it nevertheless."""
    from torch import _weights_only_unpickler

    text = str(error)
    told = re.search(r"GLOBAL (\S+)", text)
    allowed: Any = getattr(_weights_only_unpickler, "_get_allowed_globals", dict)()
    version, name = asked_for(path, allowed)
    name = told[1] if told else name if allowed else ""
    if name:
        return (
            f"its pickle asks for {name}, which loading could run as code; refused. "
            "Save only the tensors: torch.save(model.state_dict(), ...)"
        )
    if version > 3:
        return (
            f"a pickle of protocol {version}, which torch reads only in ways that could run code; "
            "load it where it was written and save it again with torch.save"
        )
    reason = text.rpartition("WeightsUnpickler error: ")[2].partition("\n\nCheck the doc")[0]
    return f"a pickle that is damaged or holds more than tensors ({one_line(Exception(reason))})"


def _entry(name: str, leaf: Any) -> Entry:
    import torch

    if not isinstance(leaf, torch.Tensor):
        return no_tensor(name, leaf, (torch.dtype, torch.device))
    dtype, shape, problem = str(leaf.dtype).removeprefix("torch."), tuple(leaf.shape), ""
    if leaf.is_quantized:
        problem = f"quantised ({dtype}): save the weights that it was made of"
    elif leaf.layout != torch.strided:
        problem = f"sparse ({str(leaf.layout).removeprefix('torch.')})"
    elif leaf.is_nested:
        problem = "nested, of several shapes"
    elif itemsize(dtype) is None:
        problem = f"its type {dtype} is packed or unknown"
    return Entry(name, shape, dtype, problem)


def _leaves(loaded: Any) -> Iterator[tuple[str, Any]]:
    import torch

    def is_tensor(thing: Any) -> bool:
        return isinstance(thing, torch.Tensor)

    def is_weight(thing: Any) -> bool:
        if not is_tensor(thing) or not thing.dim():
            return False
        return bool(thing.is_floating_point() or thing.is_complex() or thing.is_quantized)

    return unwrapped(loaded, is_tensor, is_weight)
