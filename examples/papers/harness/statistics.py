"""Means, standard errors, intervals, and what a verdict is."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from scipy.stats import t

CRITERION = (
    "For each comparison the differences of runs of the same seed are taken: **reproduced** if "
    "their mean has the claimed sign and the 95 % t interval excludes 0, **same direction** if "
    "only the sign is right, **contradicted** if the sign is wrong and the interval excludes 0, "
    "**not seen** otherwise. Of several comparisons the weakest counts. Fewer than 3 seeds are "
    "**not run**."
)
VERDICTS = ("contradicted", "not seen", "same direction", "reproduced")
LEAST_SEEDS = 3


def mean(values: Sequence[float]) -> float:
    return float(np.mean(values))


def standard_error(values: Sequence[float]) -> float:
    """NaN of fewer than two."""
    if len(values) < 2:
        return math.nan
    return float(np.std(values, ddof=1) / np.sqrt(len(values)))


def rounded(value: float, digits: int) -> str:
    """So many significant digits: 148 and 10, not 1e+01."""
    return f"{float(f'{value:.{digits}g}'):g}"


def half_interval(values: Sequence[float]) -> float:
    """Half the width of the 95 % t interval of the mean; NaN of fewer than two."""
    if len(values) < 2:
        return math.nan
    return float(t.ppf(0.975, len(values) - 1)) * standard_error(values)


def verdict(differences: Sequence[float]) -> str:
    """Of differences that a claim says to be positive."""
    if len(differences) < LEAST_SEEDS:
        return "not run"
    centre, half = mean(differences), half_interval(differences)
    if centre > 0:
        return "reproduced" if centre > half else "same direction"
    return "contradicted" if -centre > half else "not seen"


def weakest(verdicts: Sequence[str]) -> str:
    """Of several comparisons, one verdict."""
    if not verdicts or "not run" in verdicts:
        return "not run"
    return min(verdicts, key=VERDICTS.index)
