"""`Surroundings`, what is known around a layer, and `Fused`, the maps found in its array."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from specops.geometry.dense import Dense

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Surroundings:
    """What is known around a layer.

    Attributes
    ----------
    setting : callable
        Takes the name of a value of the model's configuration, as Hugging Face names it, and
        returns the value; None if the configuration does not have it.
    beside : callable
        Takes the name of another layer, or of a parameter, of the same block and returns the
        shape of its weight, with axes in the same order as this layer's; () if there is none.
        The name may lead out of the block by "../".
    """

    setting: Callable[[str], Any] = lambda key: None
    beside: Callable[[str], Shape] = lambda name: ()

    def count(self, *keys: str) -> int:
        """The first of these settings that is a positive number, 0 if none is."""
        found = (self.setting(key) for key in keys)
        return next((n for n in found if type(n) is int and n > 0), 0)

    def inputs(self, names: Sequence[str], out: int) -> int:
        """How many inputs the first of these layers has that exists and is a matrix; 0 if none."""
        return next((s[1 + out] for n in names if len(s := self.beside(n)) == 2), 0)

    def outputs(self, names: Sequence[str], out: int) -> int:
        """How many outputs that layer has; 0 if there is none."""
        return next((s[out] for n in names if len(s := self.beside(n)) == 2), 0)


@dataclass(frozen=True)
class Fused:
    """An array that holds several maps.

    Attributes
    ----------
    geometry : Dense
        The maps; the whole matrix as one map if it is not known how they lie in it.
    why : str
        What the maps are, and how that was recognised.
    doubt : str
        Why the maps are not told apart; empty if they are.
    likely : Dense, optional
        The maps that the layer's name suggests, if nothing else confirms them.
    """

    geometry: Dense
    why: str
    doubt: str = ""
    likely: Dense | None = None

    @classmethod
    def of(cls, out: int, splits: Sequence[int], why: str, repeats: int = 1) -> Fused:
        """Blocks of these sizes along the outputs; a single one is the whole matrix."""
        if len(splits) == 1:
            return cls(Dense(out_axes=(out,)), why)
        return cls(Dense(out_axes=(out,), splits=tuple(splits), repeats=repeats), why)

    @classmethod
    def whole(cls, out: int, doubt: str, likely: Sequence[int] = ()) -> Fused:
        """The whole matrix as one map, with a doubt: its name suggests the `likely` blocks."""
        blocks = Dense(out_axes=(out,), splits=tuple(likely)) if likely else None
        return cls(Dense(out_axes=(out,)), doubt, doubt, blocks)

    def stacked(self) -> Fused:
        """The same maps for a stack of matrices, along a new first axis."""
        likely = None if self.likely is None else _behind_an_axis(self.likely)
        return replace(self, geometry=_behind_an_axis(self.geometry), likely=likely)


def _behind_an_axis(geometry: Dense) -> Dense:
    out = tuple(a if a < 0 else a + 1 for a in geometry.out_axes)
    return replace(geometry, out_axes=out, batch_axes=(0,))
