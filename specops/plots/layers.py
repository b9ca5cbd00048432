"""`norms`: the operator norm of every layer."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from specops.plots.arguments import check_mapping, check_nonnegative, real
from specops.plots.style import axes, counted, label, legend, line_styles, scale_values, shorten

_TALLEST = 100.0
"""The greatest height of a figure, in inches: a choice."""
_ROW = 0.15
"""The height of one line of text, in inches."""


def norms(
    rows: Mapping[Any, Any],
    *,
    compare: Mapping[Any, Any] | None = None,
    labels: tuple[str, str] = ("rows", "compare"),
    ax: Axes | None = None,
) -> Axes:
    r"""The operator norm :math:`\sigma_{\max}` of every layer, one row to each.

    A number is a dot, an interval ``lower ≤ norm ≤ upper`` a bar between two end strokes. Norms
    are gains, output over input, and have no unit; the axis is logarithmic where positive
    values span more than three decades.

    Parameters
    ----------
    rows : mapping of name to number, (lower, upper) or NormBounds
        Such as `specops.spectral_norm` or `specops.spectral_norm_bounds` give, drawn from the
        top in the mapping's order.
    compare : mapping, optional
        The same of another model, drawn beside it; layers that only one has are kept.
    labels : (str, str)
        What the legend calls the two.
    ax : matplotlib.axes.Axes, optional
        Where to draw; None makes a figure that pyplot does not know, the taller the more layers.

    Returns
    -------
    matplotlib.axes.Axes

    Raises
    ------
    NonFiniteError, ValueError
        A norm is negative, NaN or infinite, is neither a number nor a pair of numbers, or has a
        lower end above the upper; or there are no rows.
    TypeError
        `rows` is not a mapping, or `ax` not axes.

    Notes
    -----
    Not shown: on axes given by the caller with less room than rows, every name (the label says
    so), and on a logarithmic axis zeros (the title counts them).

    Examples
    --------
    >>> ax = norms({"conv1": 2.5, "conv2": (0.9, 1.1)})
    >>> [tick.get_text() for tick in ax.get_yticklabels()]
    ['conv1', 'conv2']
    """
    sides = [_brackets(rows, "rows")]
    if compare is not None:
        sides.append(_brackets(compare, "compare"))
    if len(labels) != 2:
        raise ValueError(f"labels must be two names, got {labels!r}")
    names = list(dict.fromkeys(name for side in sides for name in side))
    short = shorten(names)
    row = 0.17 if len(sides) == 1 else 0.21
    ax = axes(
        ax,
        max(map(len, short)) + (12 if compare is not None else 0),
        min(1.1 + row * len(names), _TALLEST),
    )
    shift = 0.0 if len(sides) == 1 else 0.18
    handles = []
    for side, style, marker, offset in zip(
        sides, line_styles(2), "os", (-shift, shift), strict=False
    ):
        place = np.array([names.index(name) for name in side]) + offset
        handles.append(_draw(ax, np.array(list(side.values())), place, style["color"], marker))
    everything = np.array([end for side in sides for pair in side.values() for end in set(pair)])
    below = scale_values(ax, everything, axis="x")
    every = _name_rows(ax, short)
    title = "Operator norm of each layer"
    title += counted(below, everything.size, "values, 0 or nearly, lie left of the axis")
    rank = {1: "", 2: ", every 2nd named", 3: ", every 3rd named"}
    label(
        ax,
        title,
        r"operator norm $\sigma_{\max}$",
        "layer" + rank.get(every, f", every {every}th named"),
    )
    ax.grid(axis="both", color="#e6e6e6", linewidth=0.6)
    ax.set_axisbelow(True)
    if compare is not None:
        legend(ax, handles, shorten(labels))
    return ax


def _draw(ax: Axes, ends: np.ndarray, place: np.ndarray, color: str, marker: str) -> Any:
    low, high = ends.T
    exact = low == high
    # Dots are drawn first, even if there are none, to give the legend its symbol.
    (dots,) = ax.plot(low[exact], place[exact], marker, color=color, markersize=4, linestyle="")
    if exact.all():
        return dots
    strokes = ax.errorbar(
        (low + high)[~exact] / 2,
        place[~exact],
        xerr=(high - low)[~exact] / 2,
        fmt="none",
        ecolor=color,
        elinewidth=2.0,
        capsize=2.5,
    )
    return dots if exact.any() else strokes


def _name_rows(ax: Axes, names: list[str]) -> int:
    """Name each row, or only every n-th (the result) if the axes are too short for all."""
    inches = ax.bbox.height / ax.figure.dpi
    every = math.ceil(_ROW * len(names) / inches * 0.85)
    ax.set_ylim(len(names) - 0.4, -0.6)
    ax.set_yticks(range(0, len(names), every), names[::every])
    return every


def _brackets(rows: Any, argument: str) -> dict[Any, tuple[float, float]]:
    check_mapping(rows, argument, '{"conv1": 2.5, "conv2": (0.9, 1.1)}')
    return {name: _bracket(value, f"layer {str(name)!r}") for name, value in rows.items()}


def _bracket(value: Any, what: str) -> tuple[float, float]:
    if hasattr(value, "lower") and hasattr(value, "upper"):
        value = (value.lower, value.upper)
    ends = real(value, what)
    if ends.shape not in ((), (2,)):
        raise ValueError(
            f"{what}: expected a number or (lower, upper), got shape {ends.shape}; give each map "
            f"of a stack a name of its own"
        )
    check_nonnegative(ends, what, "a norm is at least 0")
    low, high = (float(ends), float(ends)) if ends.ndim == 0 else map(float, ends)
    if low > high:
        raise ValueError(f"{what}: the lower end {low:g} is above the upper {high:g}; swap them")
    return low, high
