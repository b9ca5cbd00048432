"""Ranks divide work: one rank, the owner, gets a whole weight and sends its result to all."""

from __future__ import annotations

import math
import pickle
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import distributed as dist

from specops.errors import AdapterError
from specops.geometry import Dense
from specops_torch.collectives import (
    Reader,
    about,
    as_bytes,
    byte_size,
    content_of,
    exchanged,
    message,
    message_length,
    objects,
)
from specops_torch.shared import SharedLocation

_ROOM = 1.25
"""The buffer for an owner's next message about a weight, in sizes of its latest message: a choice.
A message that does not fit takes two further collectives."""


@dataclass(frozen=True)
class Found:
    """The result of an owner's work on one weight."""

    value: torch.Tensor | None
    """An array of the weight's shape, of which each rank gets its part; None if there is none."""
    told: Any
    """What all ranks get: dicts, lists, tensors, numbers and strings."""


@dataclass(frozen=True)
class Failed:
    """An error that the work on a weight raised."""

    pickled: bytes
    text: str

    @classmethod
    def by(cls, error: Exception, name: str) -> Failed:
        """The error in a form that other ranks can raise, with its traceback as a note."""
        error.add_note("".join(traceback.format_exception(error)))
        notes = " ".join(getattr(error, "__notes__", ()))
        text = f"{name}: {type(error).__name__}: {error} {notes}".strip()
        try:
            pickled = pickle.dumps(error)
            pickle.loads(pickled)
        except Exception:
            pickled = b""
        return cls(pickled, text)

    def error(self) -> Exception:
        """The error to raise on this rank."""
        return pickle.loads(self.pickled) if self.pickled else AdapterError(self.text)


Work = Callable[[int], Found]


def shared(
    locations: Sequence[SharedLocation], work: Work, *, values: Sequence[bool]
) -> list[Found]:
    """Let the rank that owns a weight do the work on it, and tell all ranks.

    This takes two collectives for all weights of a mesh: one sends their parts to the owners, the
    other sends the results back. The owners follow from shapes alone: the costliest weight goes
    to the rank with the least work so far.

    Parameters
    ----------
    locations : sequence of SharedLocation
        The locations of the weights, the same in the same order on all ranks.
    work : callable
        Takes the position of a weight, whose `read` gives the whole weight during the call.
    values : sequence of bool
        Whether owners may give arrays like the weights.

    Raises
    ------
    Exception
        If `work` raises on any rank, all ranks raise the error of the first weight it failed for.
    """
    found: dict[int, Found | Failed] = {}
    by_group: dict[int, list[int]] = {}
    for i, x in enumerate(locations):
        by_group.setdefault(id(x.known.group), []).append(i)
    for members in by_group.values():
        given = [locations[i] for i in members]
        room = [values[i] for i in members]
        results = _one_group(given, partial(_at, work, members), room)
        found |= dict(zip(members, results, strict=True))
    results = [found[i] for i in range(len(locations))]
    for x, result in zip(locations, results, strict=True):
        if isinstance(result, Failed):
            error = result.error()
            error.add_note(f"on the rank that owns {x.weight.name}")
            raise error
    return results  # type: ignore[return-value]


def _at(work: Work, members: Sequence[int], at: int) -> Found:
    return work(members[at])


def cost_of(x: SharedLocation) -> float:
    """The cost of decomposing its matrices; a kernel counts as a square matrix of its size."""
    shape, geometry = tuple(x.parameter.shape), x.weight.geometry
    entries = math.prod(shape)
    if not isinstance(geometry, Dense):
        return math.pow(entries, 1.5)
    matrices = geometry.matrix_shapes(shape)
    stack = entries // sum(m * n for m, n in matrices)
    return float(stack * sum(m * n * min(m, n) for m, n in matrices))


def owners_of(costs: Sequence[float], ranks: int) -> list[int]:
    """An owner for each weight: the costliest first, each to the rank with the least work."""
    load, owners = [0.0] * ranks, [0] * len(costs)
    for i in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        owners[i] = min(range(ranks), key=lambda rank: (load[rank], rank))
        load[owners[i]] += costs[i]
    return owners


def _one_group(
    given: Sequence[SharedLocation], work: Work, values: Sequence[bool]
) -> list[Found | Failed]:
    """`shared` for the weights of one group of ranks."""
    layout = given[0].known
    names = [x.weight.name for x in given]
    owners = owners_of([cost_of(x) for x in given], dist.get_world_size(layout.group))
    with about(names):
        _gather(given, owners, dist.get_world_size(layout.group))
    mine = {i: _done(x, partial(work, i)) for i, x in enumerate(given) if owners[i] == layout.rank}
    texts, parts = _sent_back(given, owners, mine, values)
    with about(names):
        whole = _long_texts(texts, mine, layout.group)
    results: list[Found | Failed] = []
    for i, x in enumerate(given):
        text = whole.get(i, texts[i])
        x.capacity = max(x.capacity, _filled(int(_ROOM * message_length(text))))
        told = content_of(text)
        results.append(told if isinstance(told, Failed) else Found(parts[i], told))
    return results


def _done(x: SharedLocation, work: Callable[[], Found]) -> tuple[Found | Failed, torch.Tensor]:
    """(the result of this rank's work on a weight, the message about it for all ranks)."""
    try:
        result: Found | Failed = work()
        told = result.told  # type: ignore[union-attr]
    except Exception as error:
        result = told = Failed.by(error, x.weight.name)
    x.whole = None
    return result, message(told, x.known.device)


def _sent_back(
    given: Sequence[SharedLocation],
    owners: Sequence[int],
    mine: Mapping[int, tuple[Found | Failed, torch.Tensor]],
    values: Sequence[bool],
) -> tuple[list[torch.Tensor], list[torch.Tensor | None]]:
    """(messages, this rank's parts of values) of all weights, from their owners."""
    layout = given[0].known
    ranks, device = dist.get_world_size(layout.group), layout.device
    outgoing = [
        torch.cat(
            [
                part
                for i, (result, text) in mine.items()
                for part in _to_rank(given[i], rank, result, text, values[i])
            ]
            or [torch.empty(0, dtype=torch.uint8, device=device)]
        )
        for rank in range(ranks)
    ]
    sizes = [0] * ranks
    for i, x in enumerate(given):
        sizes[owners[i]] += x.capacity + (_size(x, x.known.own) if values[i] else 0)
    with about([x.weight.name for x in given]):
        readers = [Reader(part) for part in exchanged(outgoing, sizes, layout.group)]
    texts, parts = [], []
    for i, x in enumerate(given):
        reader = readers[owners[i]]
        texts.append(reader.skip(x.capacity))
        own = x.known.own.shape
        parts.append(reader.take(own, x.parameter.dtype) if values[i] else None)
    return texts, parts


def _gather(given: Sequence[SharedLocation], owners: Sequence[int], ranks: int) -> None:
    """Gather each weight on its owner."""
    layout = given[0].known
    sources = [x.known.sources(owner) for x, owner in zip(given, owners, strict=True)]
    outgoing: list[list[torch.Tensor]] = [[] for _ in range(ranks)]
    sizes = [0] * ranks
    for x, owner, senders in zip(given, owners, sources, strict=True):
        if layout.rank in senders:
            outgoing[owner].append(x.local)
        if layout.rank == owner:
            for rank in senders:
                sizes[rank] += _size(x, x.known.pieces[rank])
    packed = [as_bytes(parts, layout.device) for parts in outgoing]
    readers = [Reader(part) for part in exchanged(packed, sizes, layout.group)]
    for x, owner, senders in zip(given, owners, sources, strict=True):
        if layout.rank != owner:
            continue
        dtype, local = x.parameter.dtype, x.local
        x.whole = torch.empty(tuple(x.parameter.shape), dtype=dtype, device=local.device)
        for rank in senders:
            piece = x.known.pieces[rank]
            piece.put(x.whole, readers[rank].take(piece.shape, dtype).to(local.device))


def _to_rank(
    x: SharedLocation, rank: int, result: Found | Failed, text: torch.Tensor, value: bool
) -> list[torch.Tensor]:
    """What an owner sends to a rank about one weight."""
    room = text.new_zeros(max(0, x.capacity - len(text)))
    parts = [text[: x.capacity], room]
    if not value:
        return parts
    piece = x.known.pieces[rank]
    if isinstance(result, Failed) or result.value is None:
        return [*parts, text.new_zeros(_size(x, piece))]
    own = piece.take(result.value.to(x.parameter.dtype))
    return [*parts, as_bytes([own], text.device)]


def _long_texts(
    texts: Sequence[torch.Tensor], mine: dict[int, tuple[Any, torch.Tensor]], group: Any
) -> dict[int, torch.Tensor]:
    """The messages that did not fit into their buffers, by the index of the weight."""
    cut = [i for i, text in enumerate(texts) if message_length(text) > len(text)]
    if not cut:
        return {}
    told = {i: mine[i][1].cpu() for i in cut if i in mine}
    return {i: text.to(texts[i].device) for own in objects(told, group) for i, text in own.items()}


def _size(x: SharedLocation, piece: Any) -> int:
    return byte_size(piece.shape, x.parameter.dtype)


def _filled(size: int) -> int:
    return byte_size((size,), torch.uint8)
