"""Bars with 95 % confidence intervals, and curves with bands."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from .records import QUANTILES, Record
from .statistics import half_interval, mean

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7f8c8d", "#8c564b")
"""The first six of `specops.plots`: a setting has one colour in all panels of a figure."""


def panels(count: int, columns: int = 2, size: tuple[float, float] = (4.2, 3.0)) -> Any:
    """A figure with so many axes, flat."""
    columns = min(count, columns)
    rows = -(-count // columns)
    figure = Figure(figsize=(size[0] * columns, size[1] * rows), layout="constrained")
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axis in axes[count:]:
        axis.set_visible(False)
    shown = axes[:count]
    for axis in shown:
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(labelsize=8)
    return figure, shown


def bars(axis: Any, groups: Mapping[str, Sequence[float]], label: str) -> None:
    """The mean of each group, its interval, and the runs as dots."""
    for place, (name, values) in enumerate(groups.items()):
        color = COLORS[place % len(COLORS)]
        axis.bar(place, mean(values), color=color, alpha=0.75, width=0.7, label=name)
        if len(values) > 1:
            half = half_interval(values)
            axis.errorbar(place, mean(values), half, color="black", capsize=3, linewidth=1)
        axis.plot([place] * len(values), values, "o", color="black", markersize=2.5)
    axis.set_xticks(range(len(groups)), groups, rotation=30, ha="right", fontsize=7.5)
    axis.set_ylabel(label, fontsize=8.5)


def line(
    axis: Any, x: Sequence[float], groups: Sequence[Sequence[float]], name: str, place: int
) -> None:
    """The mean of the group at each x and its interval; of logarithms where the axis has them."""
    low, centre, high = np.array([_interval(group, axis) for group in groups]).T
    error = np.nan_to_num([centre - low, high - centre])
    axis.errorbar(x, centre, error, color=COLORS[place % len(COLORS)], label=name, capsize=3)


def curves(
    axis: Any, groups: Mapping[str, Sequence[Record]], x: str, y: str, labels: tuple[str, str]
) -> None:
    """The mean over runs of a curve, a band of the interval where there are several.

    Of logarithms, as for `line`, if the axis is logarithmic already.
    """
    for place, (name, records) in enumerate(groups.items()):
        color = COLORS[place % len(COLORS)]
        runs = [[point for point in r["results"]["curve"] if point.get(y)] for r in records]
        length = min(map(len, runs), default=0)
        if not length:
            continue
        values = np.array([[point[y] for point in run[:length]] for run in runs])
        along = np.mean([[point[x] for point in run[:length]] for run in runs], axis=0)
        low, centre, high = np.array([_interval(column, axis) for column in values.T]).T
        axis.plot(along, centre, color=color, linewidth=1.5, label=name)
        if len(runs) > 1:
            axis.fill_between(along, low, high, color=color, alpha=0.12, lw=0)
    axis.set_xlabel(labels[0], fontsize=8.5)
    axis.set_ylabel(labels[1], fontsize=8.5)


def _interval(sample: Sequence[float], axis: Any) -> tuple[float, float, float]:
    """Both ends of the interval and the mean between; of logarithms where the axis has them."""
    logarithmic = axis.get_yscale() == "log"
    sample = np.log(sample) if logarithmic else np.asarray(sample)
    half = half_interval(sample)
    ends = np.array([mean(sample) - half, mean(sample), mean(sample) + half])
    return tuple(np.exp(ends) if logarithmic else ends)


def of_quantiles(axis: Any, title: str) -> None:
    """Say of a drawn spectrum that its values are quantiles, and not all that there are."""
    axis.set_title(title, fontsize=8.5, loc="left")
    axis.set_xlabel(f"which of {QUANTILES} quantiles (1 is the largest)", fontsize=8.5)


def values(records: Mapping[str, Sequence[Record]], metric: str) -> dict[str, list[float]]:
    """One number of every run, by label; runs without it are left out."""
    found = {
        name: [r["results"][metric] for r in runs if r["results"].get(metric) is not None]
        for name, runs in records.items()
    }
    return {name: numbers for name, numbers in found.items() if numbers}
