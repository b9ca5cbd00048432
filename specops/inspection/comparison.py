"""Two checkpoints of one model, weight by weight."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from specops.inspection.figures import Figures
from specops.inspection.output import number_text, sigma_text
from specops.inspection.run import Inspection, WeightFigures
from specops.tables import print_table

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
_PREFIXES = ("module.", "_orig_mod.", "model.")


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
    only_one, only_other : list of str
        Names that one of them lacks, and names of different shapes.
    """

    pairs: list[Pair]
    only_one: list[str]
    only_other: list[str]


def middle(figures: Figures) -> float:
    """σ_max, or the geometric mean of its bounds."""
    sigma = figures.sigma_max
    return math.sqrt(sigma[0] * sigma[1]) if isinstance(sigma, tuple) else sigma


def compare(one: Inspection, other: Inspection) -> Comparison:
    """Match the weights of two checkpoints by name and shape."""
    first, second = _by_name(one.measured), _by_name(other.measured)
    pairs = [
        Pair(name, first[name], second[name])
        for name in first
        if name in second and first[name].shape == second[name].shape
    ]
    common = {pair.name for pair in pairs}
    return Comparison(
        pairs, [n for n in first if n not in common], [n for n in second if n not in common]
    )


def show_comparison(found: Comparison) -> None:
    """Print the pairs, and what has no partner."""
    rows = []
    for pair in found.pairs:
        a, b = pair.one.figures, pair.other.figures
        assert a is not None
        assert b is not None
        ranks = (a.stable_rank, b.stable_rank, a.effective_rank, b.effective_rank)
        ratio = number_text(pair.ratio)
        rows.append((pair.name, sigma_text(a), sigma_text(b), ratio, *map(number_text, ranks)))
    print_table(HEADERS, rows, right=HEADERS[1:])
    for label, names in (("first", found.only_one), ("second", found.only_other)):
        if names:
            print(f"only in the {label}, or of another shape there: {', '.join(names)}")


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


def _by_name(weights: Iterable[WeightFigures]) -> dict[str, WeightFigures]:
    return {_bare(w.name): w for w in weights}


def _bare(name: str) -> str:
    for prefix in _PREFIXES:
        name = name.removeprefix(prefix)
    return name
