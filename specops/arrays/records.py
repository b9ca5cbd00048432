"""Records of arrays that functions return, told to libraries which take results apart."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

K = TypeVar("K", bound=type)
_RECORDS: list[tuple[type, tuple[str, ...]]] = []
_TOLD: list[Callable[[type, tuple[str, ...]], None]] = []


def record(*fixed: str) -> Callable[[K], K]:
    """Decorate a dataclass of arrays, but for the fields `fixed`."""

    def decorate(kind: K) -> K:
        _RECORDS.append((kind, fixed))
        for tell in _TOLD:
            tell(kind, fixed)
        return kind

    return decorate


def tell_of_records(tell: Callable[[type, tuple[str, ...]], None]) -> None:
    """Call this with every record, and its fixed fields, that is known or will be."""
    _TOLD.append(tell)
    for kind, fixed in _RECORDS:
        tell(kind, fixed)
