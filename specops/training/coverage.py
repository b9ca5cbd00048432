"""What is said once, when a plan begins, of what it leaves alone."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from specops.training.cautions import caution
from specops.training.plan import NO_MAP, Assignment

_SHOWN = 4


def warn_of_coverage(assignments: Sequence[Assignment]) -> None:
    """Warn where of most matrices no map is known, so that a plan leaves them alone.

    Those that the plan excludes, or does not name, are the user's choice. Of those under a rule,
    what is to be known of their maps.
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
    """Warn once of each remark, (name, remark), on the maps of weights; empty ones are none."""
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
