"""What an inspection returns."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any

from specops.inspection.spectrum import Figures

TIED = "tied: the same tensor as"
"""The beginning of the reason to skip a tensor that is the same as another one."""


@dataclass(frozen=True)
class Measured:
    """One map that a tensor may stand for: in words, with the reason for it and its figures."""

    geometry: str
    why: str
    figures: Figures


@dataclass(frozen=True)
class WeightFigures:
    """One tensor of a checkpoint, or a weight composed of several.

    Attributes
    ----------
    name, shape, dtype
        Name, shape and dtype as stored; the shape is empty if it is not known.
    geometry : str
        The map that it is taken for, in words; "ambiguous: …" if there are several readings.
    why : str
        How that was decided.
    figures : Figures, optional
        The figures; None if it was skipped. If there are several readings, σ_max is the pair of
        the least and the largest.
    skipped : str
        Why it was skipped; empty if it was not.
    harmless : bool
        Whether skipping it loses nothing, as for biases and counters.
    sources : tuple of str
        The tensors that it was composed of.
    readings : tuple of Measured
        Each map that it may be, if nothing decides between several; else empty.
    """

    name: str
    shape: tuple[int, ...] | None
    dtype: str
    geometry: str = ""
    why: str = ""
    figures: Figures | None = None
    skipped: str = ""
    harmless: bool = True
    sources: tuple[str, ...] = ()
    readings: tuple[Measured, ...] = ()

    def apart(self) -> list[WeightFigures]:
        """One weight for each reading, or this one."""
        found = [replace(self, readings=(), **vars(m)) for m in self.readings]
        return found or [self]

    @classmethod
    def of(
        cls,
        name: str,
        shape: tuple[int, ...] | None,
        dtype: str,
        readings: list[Measured],
        sources: tuple[str, ...] = (),
    ) -> WeightFigures:
        """The weight in one reading, or in several if nothing decides between them."""
        if len(readings) == 1:
            (one,) = readings
            return cls(name, shape, dtype, one.geometry, one.why, one.figures, sources=sources)
        ends = [m.figures.ends for m in readings]
        hull = Figures(
            (min(low for low, _ in ends), max(high for _, high in ends)),
            None,
            "ambiguous: σ_max from the least to the largest of the readings",
        )
        return cls(
            name,
            shape,
            dtype,
            "ambiguous: " + " / ".join(m.geometry for m in readings),
            "ambiguous: " + "; or ".join(m.why for m in readings),
            hull,
            sources=sources,
            readings=tuple(readings),
        )


@dataclass(repr=False)
class Inspection:
    """What a checkpoint holds.

    Attributes
    ----------
    path, format : str
    weights : list of WeightFigures
        In the order of the file.
    problems : list of str
        One line for each problem of the file, and of tensors that should have been measured.
    notes : list of str
        Remarks that help to interpret the figures.
    interrupted : bool
        Whether the inspection was interrupted before its end.
    total : int
        Number of tensors in the file.
    """

    path: str
    format: str
    total: int
    weights: list[WeightFigures] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    interrupted: bool = False

    def __repr__(self) -> str:
        count = f"{len(self.measured)} of {self.total} tensors measured"
        return f"<Inspection of {self.path}: {count}; specops.inspection.show prints them>"

    @property
    def measured(self) -> list[WeightFigures]:
        """The weights that have figures."""
        return [w for w in self.weights if w.figures is not None]

    @property
    def listed(self) -> list[WeightFigures]:
        """The weights that were measured, and those that should have been."""
        return [w for w in self.weights if not (w.skipped and w.harmless)]

    def decisions(self) -> dict[str, list[str]]:
        """Names of what was measured, by what it was taken for and why."""
        found: dict[str, list[str]] = {}
        for weight in self.measured:
            found.setdefault(weight.why, []).append(weight.name)
        return found

    def by_reason(self) -> dict[str, list[str]]:
        """Names of what was skipped, by the reason."""
        found: dict[str, list[str]] = {}
        for weight in self.weights:
            if weight.skipped:
                found.setdefault(weight.skipped, []).append(weight.name)
        return found

    def totals(self) -> dict[str, Any]:
        """Counts, and the extremes over the weights that were measured."""
        found = self.measured
        stored = [w for w in self.weights if not w.sources and not w.skipped.startswith(TIED)]
        largest = max(found, key=lambda w: upper(w.figures), default=None)
        return {
            "tensors": self.total,
            "measured": len(found),
            "skipped": len(self.weights) - len(found),
            "parameters": sum(math.prod(w.shape) for w in stored if w.shape is not None),
            "largest_sigma_max": None if largest is None else upper(largest.figures),
            "largest_sigma_max_in": None if largest is None else largest.name,
        }


def upper(figures: Figures | None) -> float:
    """σ_max, or its upper bound."""
    assert figures is not None
    return figures.ends[1]
