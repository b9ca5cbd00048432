"""Two checkpoints of one model, weight by weight."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from specops.inspection.hints import bare_name
from specops.inspection.low_rank import UPDATE
from specops.inspection.output import (
    figure_text,
    figures_record,
    folded,
    number_text,
    show_table,
    sigma_text,
    wrapped,
)
from specops.inspection.results import Inspection, WeightFigures
from specops.inspection.spectrum import Figures
from specops.tables import printable

HEADERS = (
    "weight",
    "σ_max",
    "other σ_max",
    "ratio",
    "stable rank",
    "other",
    "eff. rank",
    "other eff.",
    "difference σ_max",
    "its stable rank",
)
_DROPPED_FIRST = (
    "other eff.",
    "eff. rank",
    "its stable rank",
    "other",
    "stable rank",
    "ratio",
    "difference σ_max",
)


@dataclass(frozen=True)
class Pair:
    """A weight of the same name in both, apart from prefixes of wrappers."""

    name: str
    one: WeightFigures
    other: WeightFigures

    @property
    def ratio(self) -> float | None:
        """The ratio of the largest singular values, other to one; of brackets, of their middles."""
        if self.one.figures is None or self.other.figures is None:
            return None
        below = middle(self.one.figures)
        return middle(self.other.figures) / below if below > 0 else None


@dataclass(frozen=True)
class Comparison:
    """Which weights two checkpoints have in common, and which not.

    Attributes
    ----------
    pairs : list of Pair
        Weights that were measured in both.
    only_one, only_other : list of str
        Weights that were measured in one of them, and in the other are absent, of another shape,
        or not measured.
    paths : (str, str)
        The paths of both checkpoints.
    differences : dict of str to Figures, optional
        Figures of the difference second − first, by the name in the first; None if they were not
        asked for.
    """

    pairs: list[Pair]
    only_one: list[str]
    only_other: list[str]
    paths: tuple[str, str] = ("first", "second")
    differences: Mapping[str, Figures] | None = None

    def rows(self) -> list[tuple[str, ...]]:
        """The pairs as text, under `HEADERS`."""
        found = []
        for pair in self.pairs:
            a, b = pair.one.figures, pair.other.figures
            assert a is not None
            assert b is not None
            ranks = (
                figure_text(f, key) for key in ("stable_rank", "effective_rank") for f in (a, b)
            )
            d = self.difference(pair)
            rest = ("", "") if d is None else (sigma_text(d), figure_text(d, "stable_rank"))
            ratio = number_text(pair.ratio)
            found.append((pair.name, sigma_text(a), sigma_text(b), ratio, *ranks, *rest))
        return found

    def difference(self, pair: Pair) -> Figures | None:
        """The figures of second − first, if they are known."""
        return None if self.differences is None else self.differences.get(pair.name)

    def lines(self, shown: Callable[[Sequence[str]], str] = ", ".join) -> list[str]:
        """Remarks on the pairs, and weights without a partner; `shown` joins their names."""
        known = self.differences
        remarks = {
            "taken for another map in the second, of which its figures are": [
                p.name for p in self.pairs if p.one.geometry != p.other.geometry
            ],
            "ambiguous, so that the difference is taken for the likeliest map": [
                p.name for p in self.pairs if p.one.readings and self.difference(p) is not None
            ],
            "updates, added to what they are of if that is the first and they the second": [
                name for name in self.only_one if name.endswith(UPDATE)
            ],
            "the difference could not be measured": [
                p.name for p in self.pairs if known is not None and p.name not in known
            ],
        }
        for label, path, names in zip(
            ("first", "second"), self.paths, (self.only_one, self.only_other), strict=True
        ):
            where = "absent, of another shape, or skipped in the other"
            remarks[f"measured only in the {label}, {path} ({where})"] = names
        return [f"{remark}: {shown(names)}" for remark, names in remarks.items() if names]


def middle(figures: Figures) -> float:
    """σ_max, or the geometric mean of its bounds."""
    sigma = figures.sigma_max
    return math.sqrt(sigma[0]) * math.sqrt(sigma[1]) if isinstance(sigma, tuple) else sigma


def compare(one: Inspection, other: Inspection) -> Comparison:
    """Match the weights of two checkpoints by name and shape, by bare names where unique."""
    first = {w.name: w for w in one.measured}
    second = {w.name: w for w in other.measured}
    unique, bare = _unique(first), _unique(second)
    pairs, taken = [], set()
    for name, weight in first.items():
        partner = second.get(name)
        if partner is None and bare_name(name) in unique:
            partner = bare.get(bare_name(name))
        if partner is not None and partner.shape == weight.shape and partner.name not in taken:
            pairs.append(Pair(name, weight, partner))
            taken.add(partner.name)
    paired = {pair.one.name for pair in pairs}
    return Comparison(
        pairs,
        [n for n in first if n not in paired],
        [n for n in second if n not in taken],
        (one.path, other.path),
    )


def show_comparison(found: Comparison, verbose: bool) -> None:
    """Print the pairs, and what has no partner; names one by one if `verbose`."""
    print(printable(f"{found.paths[0]} compared with {found.paths[1]} (other):"))
    if found.pairs:
        show_table(HEADERS, found.rows(), _DROPPED_FIRST, HEADERS[1:])
    else:
        print("no weight of one name in both")
    for line in found.lines(", ".join if verbose else folded):
        print(wrapped(line))


def records(found: Comparison) -> list[dict[str, Any]]:
    """The pairs as JSON."""
    return [
        {
            "name": pair.name,
            "sigma_max": [_plain(pair.one.figures), _plain(pair.other.figures)],
            "ratio": pair.ratio,
            "stable_rank": [_of(pair.one, "stable_rank"), _of(pair.other, "stable_rank")],
            "effective_rank": [_of(pair.one, "effective_rank"), _of(pair.other, "effective_rank")],
            "difference": figures_record(found.difference(pair)),
            "geometry": [pair.one.geometry, pair.other.geometry],
        }
        for pair in found.pairs
    ]


def _plain(figures: Figures | None) -> Any:
    assert figures is not None
    return list(figures.sigma_max) if isinstance(figures.sigma_max, tuple) else figures.sigma_max


def _of(weight: WeightFigures, key: str) -> Any:
    return getattr(weight.figures, key)


def _unique(weights: dict[str, WeightFigures]) -> dict[str, WeightFigures]:
    """The weights by bare name, if no other has the same."""
    counts = Counter(map(bare_name, weights))
    return {bare_name(name): w for name, w in weights.items() if counts[bare_name(name)] == 1}
