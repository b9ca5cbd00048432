"""`Hints`: what the user knows about a model and its checkpoint does not say."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Literal

from specops.training.weight import is_named

_PREFIXES = (
    "module.",
    "_orig_mod.",
    "model.",
    "base_model.",
    # Where a file holds an average too, names keep the branch of the model itself.
    "state_dict.",
    "model_state_dict.",
    "params.",
)
OPTIONS: Final = {
    "input_size": "--input-size",
    "stride": "--stride",
    "dilation": "--dilation",
    "padding": "--padding",
    "groups": "--groups",
}
"""The hints about convolutions, and the command's options for them."""


@dataclass
class Hints:
    """What the user knows: patterns of names, and values for the convolutions that match.

    Attributes
    ----------
    input_size, stride, dilation, padding, groups : dict of str to value
        The last pattern that matches a name counts. Sizes are tuples of int, a padding an int,
        "same" or "valid", the others are int.
    boundary : "zeros" or "circular"
        The boundary of all convolutions.
    layout : str
        "torch", "jax" or "keras": the order of a kernel's axes. With "" the file determines it.
    exclude : tuple of str
        Patterns of tensors to leave alone.
    """

    input_size: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    stride: Mapping[str, int] = field(default_factory=dict)
    dilation: Mapping[str, int] = field(default_factory=dict)
    padding: Mapping[str, int | Literal["same", "valid"]] = field(default_factory=dict)
    groups: Mapping[str, int] = field(default_factory=dict)
    boundary: Literal["zeros", "circular"] = "zeros"
    layout: str = ""
    exclude: tuple[str, ...] = ()

    def of(self, name: str, key: str) -> Any:
        """The value of the last pattern that matches; None if there is none."""
        table: Mapping[str, Any] = getattr(self, key)
        found = [value for pattern, value in table.items() if matches(name, pattern)]
        return found[-1] if found else None

    def given(self, name: str) -> list[str]:
        """The options for convolutions that have a value for this name."""
        return [option for key, option in OPTIONS.items() if self.of(name, key) is not None]

    def named(self, name: str) -> list[str]:
        """The options with a pattern that matches this name and is not "*"."""
        return [
            option
            for key, option in OPTIONS.items()
            if any(p != "*" and matches(name, p) for p in getattr(self, key))
        ]

    def meant(self, names: list[str]) -> list[tuple[str, str, list[str]]]:
        """(option, pattern, the names it matches) for each hint whose pattern is not "*"."""
        found = []
        for key, option in OPTIONS.items():
            for pattern in getattr(self, key):
                hit = [n for n in names if matches(n, pattern)] if pattern != "*" else []
                found += [(option, pattern, hit)] if hit else []
        return found

    def general(self) -> list[str]:
        """The options that have a value for all convolutions."""
        return [option for key, option in OPTIONS.items() if "*" in getattr(self, key)]

    def excludes(self, name: str) -> bool:
        """Whether the user excludes this name."""
        return any(matches(name, pattern) for pattern in self.exclude)

    def unused(self, names: list[str]) -> list[str]:
        """Patterns that match none of these names."""
        tables = (getattr(self, key) for key in OPTIONS)
        patterns = {*self.exclude, *(pattern for table in tables for pattern in table)}
        return sorted(p for p in patterns if not any(matches(n, p) for n in names))


def bare_name(name: str) -> str:
    """A name without prefixes of wrappers, in whatever order they come."""
    while True:
        shorter = name
        for prefix in _PREFIXES:
            shorter = shorter.removeprefix(prefix)
        if shorter == name:
            return name
        name = shorter


def matches(name: str, pattern: str) -> bool:
    """Whether a pattern of file names means this tensor, with or without a wrapper's prefix."""
    return is_named(name, pattern) or is_named(bare_name(name), pattern)
