"""Warnings, once when a plan begins, about what it leaves alone."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from specops.training.cautions import caution
from specops.training.plan import NO_MAP, Assignment

_SHOWN = 4


def warn_of_coverage(assignments: Sequence[Assignment]) -> None:
    """Warn if a plan leaves most matrices alone because their maps are not known.

    Matrices that the plan excludes or does not name do not count: they are the user's choice. Also
    warns of the remarks on the maps of weights under a rule.
    """
    warn_of_remarks((a.weight.name, a.weight.remark) for a in assignments if a.rule is not None)
    acting = sum(a.rule is not None for a in assignments)
    left = [a.weight for a in assignments if a.rule is None and _is_unknown(a)]
    if not 0 < acting < len(left):
        return
    kinds: dict[str, tuple[int, ...]] = {}
    for weight in left:
        kinds.setdefault(re.sub(r"\d+", "*", weight.name), weight.shape)
    named = [f"{name!r} {shape}" for name, shape in list(kinds.items())[:_SHOWN]]
    more = f" and {len(kinds) - _SHOWN} more patterns" if len(kinds) > _SHOWN else ""
    example = next(iter(kinds))
    caution(
        f"only {acting} of {acting + len(left)} matrices are under a rule: the map of the others "
        f"is not known ({', '.join(named)}{more}). Name it, geometries={{{example!r}: "
        f"specops.Dense(...)}}, or exclude them, ({example!r}, None) first in the plan; report() "
        f"says why of each"
    )


def warn_of_remarks(remarks: Iterable[tuple[str, str]]) -> None:
    """Warn once per remark on the maps of weights, from pairs (name, remark or "")."""
    found: dict[str, list[str]] = {}
    for name, remark in remarks:
        found.setdefault(remark, []).append(name)
    for remark in filter(None, found):
        first, more = found[remark][0], len(found[remark]) - 1
        beside = f" and {more} more" if more else ""
        caution(f"{first}{beside}: {remark}. If you know, say so in geometries=")


def _is_unknown(a: Assignment) -> bool:
    weight = a.weight
    return (
        not weight.skipped and weight.geometry is None and a.reason == (weight.obstacle or NO_MAP)
    )
