"""Paired, interleaved timing: both sides of a ratio see the same machine."""

from __future__ import annotations

import math
import os
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.table import Table


@dataclass(frozen=True)
class Pair:
    """Median seconds of both sides, and the median of the ratios run by run."""

    baseline: float
    ours: float
    speedup: float
    spread: tuple[float, float]


def pair(baseline: Callable[[], Any], ours: Callable[[], Any], repeats: int) -> Pair:
    """Time the two in turn, after one run of each that does not count."""
    baseline()
    ours()
    times: list[tuple[float, float]] = []
    for index in range(repeats):
        order = (baseline, ours) if index % 2 == 0 else (ours, baseline)
        took = {id(f): seconds_of(f) for f in order}
        times.append((took[id(baseline)], took[id(ours)]))
    ratios = sorted(a / b for a, b in times)
    return Pair(
        statistics.median(a for a, _ in times),
        statistics.median(b for _, b in times),
        statistics.median(ratios),
        (ratios[0], ratios[-1]),
    )


def seconds_of(function: Callable[[], Any]) -> float:
    """How long one call takes."""
    began = time.perf_counter()
    function()
    return time.perf_counter() - began


class Results:
    """Rows of one benchmark, printed with the geometric mean of their ratios."""

    def __init__(self, title: str, baseline: str, *columns: str) -> None:
        self.table = Table(title=title, title_justify="left", title_style="bold")
        self.table.add_column("case")
        for header in (baseline, "specops", "speed-up", "min … max", *columns):
            self.table.add_column(header, justify="right")
        self.speedups: list[float] = []

    def add(self, case: str, timed: Pair, *columns: str) -> None:
        """One row."""
        self.speedups.append(timed.speedup)
        self.table.add_row(
            case,
            milliseconds(timed.baseline),
            milliseconds(timed.ours),
            f"{timed.speedup:.2f}×",
            f"{timed.spread[0]:.2f} … {timed.spread[1]:.2f}",
            *columns,
        )

    def show(self) -> None:
        """Print the table."""
        mean = math.exp(statistics.fmean(math.log(s) for s in self.speedups))
        self.table.caption = f"geometric mean {mean:.2f}×, least {min(self.speedups):.2f}×"
        self.table.caption_justify = "left"
        Console(width=120).print(self.table)


def milliseconds(seconds: float, digits: int = 1) -> str:
    """A time for a table."""
    return f"{seconds * 1e3:.{digits}f} ms"


def environment() -> str:
    """The machine and the versions that the figures belong to."""
    import numpy

    parts = [f"{os.cpu_count()} cores", platform.machine(), f"Python {platform.python_version()}"]
    parts.append(f"numpy {numpy.__version__}")
    for name in ("torch", "jax"):
        try:
            parts.append(f"{name} {__import__(name).__version__}")
        except ImportError:
            continue
    return ", ".join(parts)
