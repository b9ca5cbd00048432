"""Warnings, once when a plan begins, about what it leaves alone."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase

from specops.training.cautions import caution
from specops.training.plan import NO_MAP, Assignment
from specops.training.weight import Weight

_SHOWN = 4


def warn_of_coverage(assignments: Sequence[Assignment]) -> None:
    """Warn if a plan leaves most matrices alone because their maps are not known.

    Matrices that the plan excludes or does not name do not count: they are the user's choice. Also
    warns of the remarks on the maps of weights under a rule.
    """
    warn_of_remarks((a.weight.name, a.weight.remark) for a in assignments if a.rule is not None)
    acting = [a.weight.name for a in assignments if a.rule is not None]
    left = [a.weight for a in assignments if a.rule is None and _is_unknown(a)]
    if not 0 < len(acting) < len(left):
        return
    kinds: dict[str, Weight] = {}
    for weight in left:
        kinds.setdefault(re.sub(r"\d+", "*", weight.name), weight)
    named = [f"{name!r} {weight.shape}" for name, weight in list(kinds.items())[:_SHOWN]]
    more = f" and {len(kinds) - _SHOWN} more patterns" if len(kinds) > _SHOWN else ""
    pattern, first = next(iter(kinds.items()))
    example = first.name if any(fnmatchcase(name, pattern) for name in acting) else pattern
    reason = first.obstacle or f"name it, geometries={{{example!r}: specops.Dense(...)}}"
    total = len(acting) + len(left)
    caution(
        f"only {len(acting)} of {total} matrices are under a rule: the map of the others is not "
        f"known ({', '.join(named)}{more}). Of {first.name}: {reason}. To exclude them put "
        f"({example!r}, None) first in the plan; report() says why of each"
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
