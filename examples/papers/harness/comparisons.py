"""What would show a claim: figures of runs compared with one another, or with a number."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from .records import Record

Runs = Mapping[str, Sequence[Record]]


@dataclass(frozen=True)
class Comparison:
    """`larger` exceeds `factor` · `smaller`, of one figure of two settings or of one."""

    larger: str
    smaller: str
    metric: str
    smaller_metric: str = ""
    factor: float = 1.0

    def text(self) -> str:
        times = "" if self.factor == 1.0 else f"{self.factor:g} × "
        if self.larger == self.smaller:
            return f"{self.larger}: {self.metric} > {times}{self.smaller_metric}"
        return f"{self.metric}: {self.larger} > {times}{self.smaller}"

    def sides(self) -> list[tuple[str, str]]:
        """The settings and figures that are compared."""
        return [
            (self.larger, self.metric),
            (self.smaller, self.smaller_metric or self.metric),
        ]

    def differences(self, runs: Runs) -> list[float]:
        """Of runs with the same seed; those that are missing or not finite are left out."""
        large, small = (by_seed(runs, *side) for side in self.sides())
        return [large[s] - self.factor * small[s] for s in sorted(large.keys() & small.keys())]


@dataclass(frozen=True)
class Threshold:
    """A figure of one setting is above a number, or below it."""

    label: str
    metric: str
    number: float
    above: bool = True

    def text(self) -> str:
        return f"{self.label}: {self.metric} {'>' if self.above else '<'} {self.number:g}"

    def sides(self) -> list[tuple[str, str]]:
        """The setting and figure."""
        return [(self.label, self.metric)]

    def differences(self, runs: Runs) -> list[float]:
        """How far each run is on the claimed side."""
        sign = 1 if self.above else -1
        return [sign * (v - self.number) for v in by_seed(runs, self.label, self.metric).values()]


@dataclass(frozen=True)
class Claim:
    """One sentence of a paper, where it stands, and what would show it."""

    paper: str
    source: str
    text: str
    experiment: str = ""
    comparisons: tuple[Comparison | Threshold, ...] = ()
    not_run: str = ""


def chain(metric: str, *labels: str) -> tuple[Comparison, ...]:
    """Each exceeds the next."""
    return tuple(Comparison(a, b, metric) for a, b in pairwise(labels))


def by_seed(runs: Runs, label: str, metric: str) -> dict[int, float]:
    """A figure of each run of a setting that has it."""
    found = {r["seed"]: r["results"].get(metric) for r in runs.get(label, ())}
    return {seed: value for seed, value in found.items() if value is not None}
