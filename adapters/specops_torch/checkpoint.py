"""What `torch.save` writes: zip files tensor by tensor, legacy pickles as a whole.

Everything goes through ``torch.load(..., weights_only=True)``, which builds tensors and plain
containers and refuses whatever else a pickle asks for.
"""

from __future__ import annotations

import re
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from specops.checkpoints.base import Checkpoint, Entry, explained, one_line
from specops.checkpoints.dtypes import decode, itemsize
from specops.checkpoints.sniffing import fill, member_position
from specops.errors import CheckpointError

if TYPE_CHECKING:
    import torch

_WRAPPERS = ("state_dict", "model_state_dict", "model", "params")
_NO_NUMBERS = "saved without its numbers, from the meta device"
_SMALL = 1 << 20


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
    """A reader that lists tensors without their numbers and finds those in the file itself."""

    def __init__(self, path: Path, records: dict[int, int]) -> None:
        self._records = records
        self._tensors: dict[str, torch.Tensor] = {}
        entries = []
        for name, leaf in _leaves(_load(path, "meta")):
            entry = _entry(name, leaf)
            if not entry.problem:
                entry = Entry(name, entry.shape, entry.dtype, self._problem(leaf))
                self._tensors.setdefault(name, leaf)
            entries.append(entry)
        if self._tensors and not any(map(_position, self._tensors.values())):
            # Releases of torch before 2.7 do not say where a tensor's numbers are.
            raise NotImplementedError
        super().__init__(path, "torch", entries, layout="torch")

    def _problem(self, tensor: torch.Tensor) -> str:
        storage, position = tensor.untyped_storage(), _position(tensor)
        if position is None:
            return _NO_NUMBERS
        held = self._records.get(position)
        if held is None or held < storage.nbytes():
            return f"its storage claims {storage.nbytes()} bytes and {held or 0} are there"
        wanted = tensor.numel() * tensor.element_size()
        if wanted > max(_SMALL, storage.nbytes()):
            return f"{wanted} bytes, a view that repeats {storage.nbytes()}"
        return ""

    def _read(self, entry: Entry) -> np.ndarray[Any, Any]:
        tensor = self._tensors[entry.name]
        if 0 in entry.shape:
            return decode(np.empty(0, np.uint8), entry.dtype).reshape(entry.shape)
        strides = tensor.stride()
        span = 1 + sum((n - 1) * s for n, s in zip(entry.shape, strides, strict=True))
        width = tensor.element_size()
        begin = (_position(tensor) or 0) + tensor.storage_offset() * width
        with self.path.open("rb", buffering=0) as file:
            file.seek(begin)
            flat = decode(fill(file, span * width), entry.dtype)
        steps = [s * flat.itemsize for s in strides]
        array = np.lib.stride_tricks.as_strided(flat, entry.shape, steps)
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
        for name, leaf in _leaves(_load(path, "cpu")):
            entry = _entry(name, leaf)
            if not entry.problem and leaf.is_meta:
                entry = Entry(name, entry.shape, entry.dtype, _NO_NUMBERS)
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


def _position(tensor: torch.Tensor) -> int | None:
    """Where the bytes of a listed tensor's storage begin in the file."""
    return getattr(tensor.untyped_storage(), "_checkpoint_offset", None)


def _records(path: Path) -> dict[int, int]:
    """Where each record's bytes begin in the zip file, and how many they are."""
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
            if info.filename.endswith("/byteorder") and archive.read(info) == b"big":
                raise CheckpointError(f"{path}: in big-endian order; save it again on this machine")
            found[member_position(file, info)] = info.file_size
    return found


def _load(path: Path, device: str) -> Any:
    """The objects in the file; tensors on the meta device have no numbers."""
    import pickle

    import torch

    # As an open file: torch.load takes names that end in .safetensors for that format.
    with path.open("rb") as file, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return torch.load(file, map_location=device, weights_only=True)
        except pickle.UnpicklingError as error:
            raise CheckpointError(f"{path}: {_refusal(error)}") from None
        except (OSError, MemoryError, RecursionError, NotImplementedError):
            raise  # the last for quantised tensors, which the meta device lacks
        except Exception as error:
            raise CheckpointError(
                f"{path}: truncated or damaged ({one_line(error)}); copy or download it again"
            ) from error


def _refusal(error: Exception) -> str:
    """Why the pickle was refused, without torch's advice on how to run it all the same."""
    text = str(error)
    named = re.search(r"GLOBAL (\S+)", text)
    if named:
        return (
            f"its pickle asks for {named[1]}, which loading could run as code; refused. "
            "Save only the tensors: torch.save(model.state_dict(), ...)"
        )
    reason = text.rpartition("WeightsUnpickler error: ")[2].partition("\n\nCheck the doc")[0]
    return f"a pickle that is damaged or holds more than tensors ({one_line(Exception(reason))})"


def _entry(name: str, leaf: Any) -> Entry:
    import torch

    if not isinstance(leaf, torch.Tensor):
        return Entry(name, (), "", f"not a tensor but of type {type(leaf).__name__}")
    dtype, shape, problem = str(leaf.dtype).removeprefix("torch."), tuple(leaf.shape), ""
    if leaf.is_quantized:
        problem = f"quantised ({dtype})"
    elif leaf.layout != torch.strided:
        problem = f"sparse ({str(leaf.layout).removeprefix('torch.')})"
    elif leaf.is_nested:
        problem = "nested, of several shapes"
    elif itemsize(dtype) is None:
        problem = f"its type {dtype} is packed or unknown"
    return Entry(name, shape, dtype, problem)


def _leaves(loaded: Any) -> Iterator[tuple[str, Any]]:
    """Names and leaves of what was loaded, below the wrapper that training scripts put around."""
    import torch

    while isinstance(loaded, Mapping):
        inner = next((k for k in _WRAPPERS if _holds_tensors(loaded.get(k), torch.Tensor)), None)
        if inner is None:
            break
        loaded = loaded[inner]
    if isinstance(loaded, torch.Tensor):
        yield "tensor", loaded
        return
    # A pickle can hold one container many times, or in itself: each is entered once.
    entered: set[int] = set()
    pending: list[tuple[str, Any]] = [("", loaded)]
    while pending:
        name, thing = pending.pop()
        if not _holds_tensors(thing, torch.Tensor) or isinstance(thing, torch.Tensor):
            yield name or "file", thing
        elif id(thing) not in entered:
            entered.add(id(thing))
            pairs = thing.items() if isinstance(thing, Mapping) else enumerate(thing)
            prefix = f"{name}." if name else ""
            pending += [(f"{prefix}{key}", value) for key, value in reversed(list(pairs))]


def _holds_tensors(thing: Any, kind: type) -> bool:
    """Whether it is a container, not a tensor, with a tensor anywhere in it."""
    entered: set[int] = set()
    pending = [thing] if isinstance(thing, Mapping | list | tuple) else []
    while pending:
        inner = pending.pop()
        if isinstance(inner, kind):
            return True
        if isinstance(inner, Mapping | list | tuple) and id(inner) not in entered:
            entered.add(id(inner))
            pending += inner.values() if isinstance(inner, Mapping) else inner
    return False
