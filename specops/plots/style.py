"""What the figures share: new axes, colours, and a legend or, for many names, a colourbar."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LinearSegmentedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

FEW = 10
"""Most names for which a legend is legible."""
DEPTH = LinearSegmentedColormap.from_list("depth", colormaps["viridis"](np.linspace(0, 0.92, 256)))
"""Viridis without its yellow end, which is hardly visible on white."""
_OKABE_ITO = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_DASHES: tuple[Any, ...] = ("-", (0, (5, 2)))
_DECADES = 3
"""The decades that a linear axis can show: a choice."""
_DEEPEST = 1e-12
"""Values further below the largest are rounding; showing them would flatten the rest."""


def axes(ax: Any, beside: int = 0, height: float = 4.2) -> Axes:
    """The axes given, or those of a new figure outside pyplot, of `height` in inches.

    The figure is wide enough for `beside` characters next to the axes.
    """
    if ax is None:
        size = (5.8 + 0.07 * beside, height)
        new: Axes = Figure(figsize=size, layout="constrained").add_subplot()
        return new
    if not isinstance(ax, Axes):
        raise TypeError(
            f"ax must be a matplotlib Axes, got {type(ax).__name__}: pass one of a grid's axes"
        )
    return ax


def label(ax: Axes, title: str, x: str, y: str) -> None:
    """Set the title and the labels of the axes."""
    ax.set_title(title, loc="left", fontsize=10)
    ax.set_xlabel(x, fontsize=9)
    ax.set_ylabel(y, fontsize=9)
    ax.tick_params(labelsize=8)
    ax.spines[["top", "right"]].set_visible(False)


def shorten(names: Iterable[Any]) -> list[str]:
    """Names shortened in the middle, but never so much that two become equal."""
    full, width = [" ".join(str(name).split()) for name in names], 32
    while True:
        short = [_cut(name, width) for name in full]
        if len(set(short)) == len(set(full)):
            return [_literal(name) for name in short]
        width += 4


def _cut(name: str, width: int) -> str:
    if len(name) <= width:
        return name
    tail = width // 2
    return f"{name[: width - tail - 1].rstrip('._/')}…{name[-tail:].lstrip('._/')}"


def _literal(name: str) -> str:
    # A dollar would start a formula; matplotlib hides labels that start with an underscore.
    name = name.replace("$", r"\$")
    return f" {name}" if name.startswith("_") else name


def characters(names: Sequence[Any]) -> int:
    """The room that `explain` needs, in characters."""
    return max(map(len, shorten(names))) + 6 if len(names) <= FEW else 16


def line_styles(count: int) -> list[dict[str, Any]]:
    """How to draw each of `count` lines: distinct, or thin and coloured by depth if many."""
    if count <= FEW:
        hues = len(_OKABE_ITO)
        return [
            {"color": _OKABE_ITO[i % hues], "linestyle": _DASHES[i // hues], "linewidth": 1.5}
            for i in range(count)
        ]
    return [{"color": DEPTH(i / (count - 1)), "linewidth": 0.9} for i in range(count)]


def explain(ax: Axes, names: Sequence[Any], handles: Sequence[Any], what: str = "layer") -> None:
    """A legend beside the axes or, if there are too many names, a colourbar of depth."""
    if len(names) <= FEW:
        legend(ax, handles, shorten(names))
        return
    last = len(names)
    first_name, last_name = shorten((names[0], names[-1]))
    # Ticks close to the ends would overlap with those of the ends.
    inner = [t for t in whole_ticks().tick_values(1, last) if 1 + 0.06 * last < t < 0.94 * last]
    bar = _colorbar(ax, 1, last, f"{what}\nfirst: {first_name}\nlast: {last_name}")
    bar.set_ticks([1, *inner, last])


def explain_steps(ax: Axes, steps: Sequence[float]) -> None:
    """A colourbar of training steps."""
    _colorbar(ax, min(steps), max(steps), "training step").locator = whole_ticks()


def whole_ticks() -> MaxNLocator:
    """Ticks at integers, as many as there is room for."""
    return MaxNLocator("auto", integer=True, steps=[1, 2, 5, 10])


def _colorbar(ax: Axes, low: float, high: float, what: str) -> Any:
    bar = ax.figure.colorbar(ScalarMappable(Normalize(low, high), DEPTH), ax=ax)
    bar.set_label(what, fontsize=9)
    bar.ax.tick_params(labelsize=8)
    return bar


def legend(ax: Axes, handles: Sequence[Any], names: Sequence[str]) -> None:
    """A legend beside the axes, where it covers nothing."""
    ax.legend(
        handles,
        names,
        loc="upper left",
        bbox_to_anchor=(1.01, 1.0),
        borderaxespad=0.0,
        frameon=False,
        fontsize=8,
        handlelength=2.8,
    )


def needs_logarithm(values: np.ndarray) -> bool:
    """Whether positive values span more decades than a linear axis shows."""
    positive = values[values > 0]
    return bool(positive.size) and bool(positive.max() / 10**_DECADES > positive.min())


def scale_values(ax: Axes, values: np.ndarray, *, axis: str = "y") -> int:
    """Scale an axis from zero or, if needed, by logarithms; returns how many values it hides.

    With values below zero, the limits are matplotlib's own.
    """
    limits = ax.set_ylim if axis == "y" else ax.set_xlim
    largest = float(values.max())
    if values.min() < 0:
        return 0
    if not needs_logarithm(values):
        limits(0, largest * 1.05 if largest > 0 else 1.0)
        return 0
    deepest = max(float(values[values > 0].min()), largest * _DEEPEST)
    if axis == "y":
        ax.set_yscale("log", nonpositive="clip")
    else:
        ax.set_xscale("log", nonpositive="clip")
    limits(deepest / 1.6, largest * 1.6)
    return int((values < deepest).sum())


def counted(count: int, total: int, what: str) -> str:
    """The line of a title about values that the axes do not show."""
    return f"\n{count} of {total} {what}" if count else ""
