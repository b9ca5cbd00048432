"""Collectives: bytes to each rank, sums to all, objects to all."""

from __future__ import annotations

import math
import pickle
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import distributed as dist

_ALIGNED = 16
"""Every tensor is padded to a multiple of so many bytes, so that any dtype can be read in place."""
_PREFIX = 16
"""Bytes of two integers at the start: the lengths of the message and of its description."""


def is_distributed() -> bool:
    """Whether there are other ranks."""
    known = dist.is_available() and dist.is_initialized()
    return bool(known and dist.get_world_size() > 1)


def byte_size(shape: Sequence[int], dtype: torch.dtype) -> int:
    """The size of a tensor in bytes, with padding."""
    return _filled(math.prod(shape) * dtype.itemsize)


def as_bytes(tensors: Iterable[torch.Tensor], device: torch.device) -> torch.Tensor:
    """The bytes of tensors, one after the other, each padded."""
    parts = []
    for tensor in tensors:
        raw = tensor.detach().to(device).contiguous().reshape(-1).view(torch.uint8)
        parts += [raw, raw.new_zeros(_filled(len(raw)) - len(raw))]
    return torch.cat(parts) if parts else torch.empty(0, dtype=torch.uint8, device=device)


class Reader:
    """Reads tensors from bytes in the order in which they were written."""

    def __init__(self, buffer: torch.Tensor) -> None:
        self._buffer, self._at = buffer, 0

    def take(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """The next tensor, a view of the bytes."""
        size = math.prod(shape) * dtype.itemsize
        raw = self._buffer[self._at : self._at + size]
        self._at += _filled(size)
        return raw.view(dtype).reshape(tuple(shape))

    def skip(self, size: int) -> torch.Tensor:
        """The next `size` bytes as they are."""
        self._at += size
        return self._buffer[self._at - size : self._at]


def message(content: Any, device: torch.device) -> torch.Tensor:
    """An object as bytes; tensors in its dicts, lists and tuples stay on their device."""
    tensors: list[torch.Tensor] = []
    described = pickle.dumps(_described(content, tensors))
    text = torch.frombuffer(bytearray(described), dtype=torch.uint8)
    body = as_bytes([text, *tensors], device)
    lengths = torch.tensor([_PREFIX + len(body), len(described)], dtype=torch.int64)
    return torch.cat([as_bytes([lengths], device), body])


def message_length(buffer: torch.Tensor) -> int:
    """The length of a message, of which at least the beginning is there."""
    return int(buffer[:_PREFIX].view(torch.int64)[0])


def content_of(buffer: torch.Tensor) -> Any:
    """The object in a message: undoes `message`."""
    reader = Reader(buffer)
    _, length = reader.take((2,), torch.int64).tolist()
    text = reader.take((length,), torch.uint8)
    return _filled_in(pickle.loads(text.cpu().numpy().tobytes()), reader)


@contextmanager
def about(names: Sequence[str]) -> Iterator[None]:
    """Add the names of weights to the error of a collective that another rank did not join."""
    try:
        yield
    except RuntimeError as error:
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        error.add_note(f"while the ranks worked on {names[0]}{more} together")
        raise


def exchanged(
    outgoing: Sequence[torch.Tensor], sizes: Sequence[int], group: Any
) -> list[torch.Tensor]:
    """What every rank has sent to this one, of the given `sizes`, in one collective."""
    received = outgoing[0].new_empty(sum(sizes))
    sent = [len(part) for part in outgoing]
    dist.all_to_all_single(received, torch.cat(list(outgoing)), list(sizes), sent, group=group)
    return list(received.split(list(sizes)))


def added(tensors: Sequence[torch.Tensor], group: Any, device: torch.device) -> list[torch.Tensor]:
    """Sums over the ranks, in one collective."""
    wide = tensors[0].dtype
    for tensor in tensors:
        wide = torch.promote_types(wide, tensor.dtype)
    packed = torch.cat([t.to(device, wide).reshape(-1) for t in tensors])
    dist.all_reduce(packed, group=group)
    parts = packed.split([t.numel() for t in tensors])
    return [p.view(t.shape).to(t.device, t.dtype) for p, t in zip(parts, tensors, strict=True)]


def highest(numbers: Sequence[int], group: Any, device: torch.device) -> list[int]:
    """The maximum of each number over the ranks."""
    packed = torch.tensor(list(numbers), dtype=torch.int32, device=device)
    dist.all_reduce(packed, dist.ReduceOp.MAX, group=group)
    found: list[int] = packed.tolist()
    return found


def objects(mine: Any, group: Any) -> list[Any]:
    """The objects of all ranks, by rank."""
    found: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(found, mine, group=group)
    return found


def _filled(size: int) -> int:
    return -(-size // _ALIGNED) * _ALIGNED


class _Slot:
    """The placeholder of a tensor in a description."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.shape, self.dtype = tuple(tensor.shape), tensor.dtype


def _described(content: Any, tensors: list[torch.Tensor]) -> Any:
    if isinstance(content, torch.Tensor):
        tensors.append(content)
        return _Slot(content)
    if isinstance(content, dict):
        return {key: _described(value, tensors) for key, value in content.items()}
    if type(content) in (list, tuple):
        return type(content)(_described(value, tensors) for value in content)
    return content


def _filled_in(described: Any, reader: Reader) -> Any:
    if isinstance(described, _Slot):
        return reader.take(described.shape, described.dtype).clone()
    if isinstance(described, dict):
        return {key: _filled_in(value, reader) for key, value in described.items()}
    if type(described) in (list, tuple):
        return type(described)(_filled_in(value, reader) for value in described)
    return described
