"""Records of arrays that functions return; libraries that transform results have to know them."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

K = TypeVar("K", bound=type)
_RECORDS: list[tuple[type, tuple[str, ...]]] = []
_TOLD: list[Callable[[type, tuple[str, ...]], None]] = []


def record(*fixed: str) -> Callable[[K], K]:
    """Decorate a dataclass of arrays; the fields `fixed` hold something else."""

    def decorate(kind: K) -> K:
        _RECORDS.append((kind, fixed))
        for tell in _TOLD:
            tell(kind, fixed)
        return kind

    return decorate


def tell_of_records(tell: Callable[[type, tuple[str, ...]], None]) -> None:
    """Call `tell` with every record and its fixed fields, now and for later records."""
    _TOLD.append(tell)
    for kind, fixed in _RECORDS:
        tell(kind, fixed)
