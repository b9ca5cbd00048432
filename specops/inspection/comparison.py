"""Two checkpoints of one model, weight by weight."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from typing import Any

from specops.inspection.figures import Figures
from specops.inspection.hints import bare_name
from specops.inspection.output import number_text, sigma_text
from specops.inspection.results import Inspection, WeightFigures
from specops.tables import print_table, printable

HEADERS = (
    "weight",
    "σ_max",
    "other σ_max",
    "ratio",
    "stable rank",
    "other",
    "eff. rank",
    "other eff.",
)


@dataclass(frozen=True)
class Pair:
    """A weight of the same name in both, without what wrappers put before it."""

    name: str
    one: WeightFigures
    other: WeightFigures

    @property
    def ratio(self) -> float | None:
        """Of the largest singular values, other to one; of brackets, their middles."""
        if self.one.figures is None or self.other.figures is None:
            return None
        below = middle(self.one.figures)
        return middle(self.other.figures) / below if below > 0 else None


@dataclass(frozen=True)
class Comparison:
    """What two checkpoints have in common, and what not.

    Attributes
    ----------
    pairs : list of Pair
        Measured in both.
    only_one, only_other : list of str
        Measured in one of them, and absent, of another shape, or not measured in the other.
    """

    pairs: list[Pair]
    only_one: list[str]
    only_other: list[str]

    def rows(self) -> list[tuple[str, ...]]:
        """The pairs as text, under `HEADERS`."""
        found = []
        for pair in self.pairs:
            a, b = pair.one.figures, pair.other.figures
            assert a is not None
            assert b is not None
            ranks = (a.stable_rank, b.stable_rank, a.effective_rank, b.effective_rank)
            ratio = number_text(pair.ratio)
            found.append((pair.name, sigma_text(a), sigma_text(b), ratio, *map(number_text, ranks)))
        return found

    def lines(self) -> list[str]:
        """What has no partner."""
        both = (("first", self.only_one), ("second", self.only_other))
        return [
            f"measured only in the {label} (absent, of another shape, or skipped in the other): "
            f"{', '.join(names)}"
            for label, names in both
            if names
        ]


def middle(figures: Figures) -> float:
    """σ_max, or the geometric mean of its bounds."""
    sigma = figures.sigma_max
    return math.sqrt(sigma[0]) * math.sqrt(sigma[1]) if isinstance(sigma, tuple) else sigma


def compare(one: Inspection, other: Inspection) -> Comparison:
    """Match the weights of two checkpoints by name and shape, by bare names where unique."""
    first = {w.name: w for w in one.measured}
    second = {w.name: w for w in other.measured}
    bare = _unique(second)
    pairs, taken = [], set()
    for name, weight in first.items():
        partner = second.get(name)
        if partner is None and bare_name(name) in _unique(first):
            partner = bare.get(bare_name(name))
        if partner is not None and partner.shape == weight.shape and partner.name not in taken:
            pairs.append(Pair(name, weight, partner))
            taken.add(partner.name)
    paired = {pair.one.name for pair in pairs}
    return Comparison(
        pairs, [n for n in first if n not in paired], [n for n in second if n not in taken]
    )


def show_comparison(found: Comparison) -> None:
    """Print the pairs, and what has no partner."""
    print_table(HEADERS, found.rows(), right=HEADERS[1:])
    for line in found.lines():
        print(printable(line))


def records(found: Comparison) -> list[dict[str, Any]]:
    """The pairs as JSON."""
    return [
        {
            "name": pair.name,
            "sigma_max": [_plain(pair.one.figures), _plain(pair.other.figures)],
            "ratio": pair.ratio,
            "stable_rank": [_of(pair.one, "stable_rank"), _of(pair.other, "stable_rank")],
            "effective_rank": [_of(pair.one, "effective_rank"), _of(pair.other, "effective_rank")],
        }
        for pair in found.pairs
    ]


def _plain(figures: Figures | None) -> Any:
    assert figures is not None
    return list(figures.sigma_max) if isinstance(figures.sigma_max, tuple) else figures.sigma_max


def _of(weight: WeightFigures, key: str) -> Any:
    return getattr(weight.figures, key)


def _unique(weights: dict[str, WeightFigures]) -> dict[str, WeightFigures]:
    """By bare name, where no two have the same."""
    counts = Counter(map(bare_name, weights))
    return {bare_name(name): w for name, w in weights.items() if counts[bare_name(name)] == 1}
