"""The latest firings of an attachment, and the listeners that are told about them."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from typing import Any

from specops.geometry.arguments import integer

Record = dict[str, Any]


class History:
    """A bounded list of records: step, name, and a rule's figures.

    Parameters
    ----------
    length : int
        How many records to keep.

    Raises
    ------
    ValueError
        `length` is not a whole number of zero or more.
    """

    def __init__(self, length: int) -> None:
        length = integer(length, "history", least=0)
        self._records: deque[Record] = deque(maxlen=length)
        self._listeners: list[Callable[[Record], Any]] = []

    def add(self, record: Record) -> None:
        """Keep a record and tell the listeners."""
        self._records.append(record)
        if self._listeners:
            told = plain(record)
            for listener in self._listeners:
                listener(told)

    def records(self) -> list[Record]:
        """Oldest first, figures as floats (lists for stacks and blocks)."""
        return [plain(record) for record in self._records]

    def tell(self, listener: Any) -> None:
        """Hand every record from now on to a callable or a TensorBoard writer.

        Parameters
        ----------
        listener : callable or SummaryWriter
            Called with the record, a dict; or anything with ``add_scalar(tag, value, step)``,
            which gets each figure as "specops/<name>/<figure>" (the largest of several).

        Raises
        ------
        TypeError
            `listener` is neither of the two.
        """
        if hasattr(listener, "add_scalar"):
            self._listeners.append(_to_scalars(listener))
        elif callable(listener):
            self._listeners.append(listener)
        else:
            raise TypeError(
                f"expected a callable or an object with add_scalar, got {type(listener).__name__}"
            )


def plain(record: Mapping[str, Any]) -> Record:
    """A record without arrays."""
    return {key: _plain(value) for key, value in record.items()}


def _to_scalars(writer: Any) -> Callable[[Record], None]:
    def write(record: Record) -> None:
        for key, value in record.items():
            if key in ("step", "name") or isinstance(value, str):
                continue
            tag = f"specops/{record['name']}/{key}"
            writer.add_scalar(tag, max(_flat(value)), record["step"])

    return write


def _plain(value: Any) -> Any:
    if isinstance(value, tuple | list):
        return [_plain(v) for v in value]
    return value.tolist() if hasattr(value, "tolist") else value


def _flat(value: Any) -> list[float]:
    if isinstance(value, list):
        return [x for v in value for x in _flat(v)]
    return [float(value)]
