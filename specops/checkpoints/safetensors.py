"""Safetensors files: a JSON header with the position of each tensor's bytes, then the bytes."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, Final

import numpy as np

from specops.checkpoints.base import Checkpoint, Entry, layout_from
from specops.checkpoints.dtypes import decode, itemsize
from specops.checkpoints.members import fill

_HEADER_LIMIT: Final = 100_000_000  # as in the safetensors library
_LARGEST: Final = 2**63 - 1
_AXES: Final = 64  # the most axes of a NumPy array
_CREDIBLE: Final = 2**45  # bytes of a file; if a header claims more it is wrong, not truncated
_DTYPES: Final = {
    "BOOL": "bool",
    "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E5M2FNUZ": "float8_e5m2fnuz",
    "F8_E8M0": "float8_e8m0fnu",
    "C64": "complex64",
    **{f"I{bits}": f"int{bits}" for bits in (8, 16, 32, 64)},
    **{f"U{bits}": f"uint{bits}" for bits in (8, 16, 32, 64)},
    **{f"F{bits}": f"float{bits}" for bits in (16, 32, 64)},
}
_LAYOUTS: Final = {"pt": "torch", "flax": "jax", "jax": "jax", "tf": "keras"}


class SafetensorsCheckpoint(Checkpoint):
    """A reader that opens the file for each tensor and maps none of it.

    Parameters
    ----------
    path : Path
        The file.
    """

    def __init__(self, path: Path) -> None:
        self._start, header = _header(path)
        held = path.stat().st_size - self._start
        metadata = header.pop("__metadata__", None) or {}
        self._offsets: dict[str, int] = {}
        entries = [self._entry(name, about, held) for name, about in header.items()]
        wanted = max(map(_end, header.values()), default=0)
        problems = []
        if wanted > held:
            problems.append(f"truncated: {held} of {wanted} bytes of tensors are there")
        told = metadata.get("format") if isinstance(metadata, dict) else None
        layout = _LAYOUTS.get(told, "") if isinstance(told, str) else layout_from(header)
        super().__init__(
            path, "safetensors", self._disjoint(entries), layout=layout, problems=problems
        )

    def _entry(self, name: str, about: Any, held: int) -> Entry:
        try:
            stored, shape = about["dtype"], tuple(about["shape"])
            begin, end = about["data_offsets"]
            numbers = (*shape, begin, end)
        except (TypeError, KeyError, ValueError):
            return Entry(name, None, "", "the header does not describe it")
        dtype = _DTYPES.get(stored, str(stored)) if isinstance(stored, str) else ""
        if not all(map(_is_size, numbers)) or not _fits_array(shape):
            return Entry(name, None, dtype, "the header gives it a negative or impossible size")
        width = itemsize(dtype)
        problem, count = "", _count(shape)
        if width is None:
            problem = f"its type {stored} is packed or unknown"
        elif end - begin != count * width:
            problem = f"the header gives {end - begin} bytes to {count} {dtype}"
        elif end > held:
            problem = "its bytes lie beyond the end of the file"
        self._offsets[name] = begin
        false = width is not None and end - begin != count * width
        return Entry(name, None if false or end > _CREDIBLE else shape, dtype, problem)

    def _disjoint(self, entries: list[Entry]) -> list[Entry]:
        """The entries, with a problem for each whose bytes overlap with those of another."""
        last, end, overlapping = "", 0, {}
        sound = [entry for entry in entries if not entry.problem and _count(entry.shape)]
        for entry in sorted(sound, key=lambda entry: self._offsets[entry.name]):
            if self._offsets[entry.name] < end:
                overlapping[entry.name] = f"its bytes overlap those of {last!r}"
            else:
                last, end = entry.name, self._offsets[entry.name] + _bytes(entry)
        return [
            Entry(e.name, e.shape, e.dtype, overlapping.get(e.name, e.problem)) for e in entries
        ]

    def _read(self, entry: Entry) -> np.ndarray[Any, Any]:
        with self.path.open("rb", buffering=0) as file:
            file.seek(self._start + self._offsets[entry.name])
            raw = fill(file, _bytes(entry))
        return decode(raw, entry.dtype).reshape(entry.shape or ())


def _is_size(number: Any) -> bool:
    return type(number) is int and 0 <= number <= _LARGEST


def _fits_array(shape: tuple[int, ...]) -> bool:
    """Whether NumPy allows an array of this shape; it ignores extents of 0 in this check."""
    return len(shape) <= _AXES and math.prod(filter(None, shape)) <= _LARGEST // 16


def _count(shape: tuple[int, ...] | None) -> int:
    return 0 if shape is None else math.prod(shape)


def _bytes(entry: Entry) -> int:
    return _count(entry.shape) * (itemsize(entry.dtype) or 0)


def _end(about: Any) -> int:
    offsets = about.get("data_offsets") if isinstance(about, dict) else None
    end = offsets[-1] if isinstance(offsets, list) and offsets else 0
    return end if type(end) is int else 0


def _header(path: Path) -> tuple[int, dict[str, Any]]:
    """(the position where the tensors begin, what the header says about them)."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > _HEADER_LIMIT:
            raise ValueError(
                f"the safetensors header claims {length} bytes, more than the format allows; "
                "damaged, or another format"
            )
        if 8 + length > size:
            raise ValueError(
                f"truncated: the header is {length} bytes long and the file {size}; "
                "copy or download it again"
            )
        text = file.read(length)
    try:
        header = json.loads(text, object_pairs_hook=_unique)
    except ValueError as error:  # of JSON or of UTF-8
        raise ValueError(f"the safetensors header is damaged ({error})") from error
    if not isinstance(header, dict):
        raise ValueError("the safetensors header is no JSON object")
    return 8 + length, header


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    named = dict(pairs)
    if len(named) < len(pairs):
        raise ValueError("a name occurs twice")
    return named
