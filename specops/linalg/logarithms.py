"""Numbers that are kept as logarithms, such as products of many norms."""

from __future__ import annotations

import math


def exp(log: float) -> float:
    """The number; infinity from e^709 on, just below where `math.exp` raises."""
    return math.exp(log) if log < 709.0 else math.inf
