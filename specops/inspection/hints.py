"""What a checkpoint does not say: the user's hints, and the rest of its tensors."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any, Literal

from specops.checkpoints import Entry

_PREFIXES = ("module.", "_orig_mod.", "model.")


@dataclass
class Hints:
    """What the user knows: patterns of names, and values for the convolutions that match.

    Attributes
    ----------
    input_size, stride, groups : dict of str to tuple of int, or int
        The last pattern that matches a name counts.
    boundary : "zeros" or "circular"
        Of all convolutions.
    layout : str
        "torch", "jax" or "keras": the order of a kernel's axes; "": what the file says.
    """

    input_size: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    stride: Mapping[str, int] = field(default_factory=dict)
    groups: Mapping[str, int] = field(default_factory=dict)
    boundary: Literal["zeros", "circular"] = "zeros"
    layout: str = ""

    def of(self, name: str, key: str) -> Any:
        """The value of the last pattern that matches; None if there is none."""
        table: Mapping[str, Any] = getattr(self, key)
        found = [value for pattern, value in table.items() if _matches(name, pattern)]
        return found[-1] if found else None

    def unused(self, names: list[str]) -> list[str]:
        """Patterns that match no name."""
        tables = (self.input_size, self.stride, self.groups)
        patterns = {pattern for table in tables for pattern in table}
        return sorted(p for p in patterns if not any(_matches(n, p) for n in names))


def bare_name(name: str) -> str:
    """A name without what wrappers put before it, in whatever order."""
    while True:
        shorter = name
        for prefix in _PREFIXES:
            shorter = shorter.removeprefix(prefix)
        if shorter == name:
            return name
        name = shorter


def _matches(name: str, pattern: str) -> bool:
    return fnmatchcase(name, pattern) or fnmatchcase(bare_name(name), pattern)


@dataclass(frozen=True)
class Context:
    """What is known beside a tensor's own name and shape.

    Attributes
    ----------
    names : frozenset of str
        Of all tensors.
    layout : str
        The framework whose order of axes to assume, or "".
    hints : Hints
        The user's.
    one_channel : bool
        Whether the only kernel with one input channel sees images of one channel.
    """

    names: frozenset[str]
    layout: str
    hints: Hints
    one_channel: bool

    @classmethod
    def of(cls, entries: Iterable[Entry], layout: str, hints: Hints) -> Context:
        """Of a checkpoint's entries."""
        entries = list(entries)
        layout = hints.layout or layout
        kernels = [e.shape for e in entries if e.shape is not None and len(e.shape) > 3]
        axis = -2 if layout in ("jax", "keras") else 1
        inputs = [shape[axis] for shape in kernels if shape[axis - 1 if axis == 1 else -1] > 1]
        alone = inputs.count(1) == 1 and 3 not in inputs
        return cls(frozenset(e.name for e in entries), layout, hints, alone)
