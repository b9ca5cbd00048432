"""`histogram`: generalization measures over a sample of points or pairs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from specops.geometry.arguments import check_choice
from specops.plots.arguments import check_mapping, vector
from specops.plots.style import (
    FEW,
    axes,
    characters,
    counted,
    explain,
    label,
    legend,
    line_styles,
    shorten,
)

Kind = Literal["lipschitz", "complexity", "margin"]
_TITLES = {
    "lipschitz": "Lipschitz ratios",
    "complexity": "Log complexity",
    "margin": "Margins",
}
_X = {
    "lipschitz": r"$\|f(x) - f(y)\| \,/\, \|x - y\|$"
    "\nlower bounds of the Lipschitz constant",
    "complexity": "log complexity (natural logarithm)",
    "margin": "margin\nscore of the true class less the largest other",
}
_FILLED = 3
"""Most samples whose areas and percentile lines do not hide each other."""
_SYMBOLS = "^Dos"
_DASHES: tuple[Any, ...] = ((0, (5, 2)), (0, (1, 1.2)), (0, (6, 1.5, 1, 1.5)), "-")


def histogram(
    values: Any,
    *,
    kind: Kind,
    ax: Axes | None = None,
    percentiles: Sequence[float] = (50, 95),
) -> Axes:
    r"""The distribution of a measure, of one sample or of several over the same bins.

    Up to 3 samples are areas with percentile lines; up to 10 are polygons through the bins'
    centres with percentile symbols on the axis; more are polygons coloured in their order.
    Heights are fractions of each sample's finite values, so samples of different sizes compare.

    Parameters
    ----------
    values : array, shape (n,), or mapping of label to such arrays
        What `kind` says; for instance ``{"train": a, "test": b}``.
    kind : {"lipschitz", "complexity", "margin"}
        "lipschitz": ratios :math:`\|f(x)-f(y)\| / \|x-y\|` of pairs, each a lower bound of the
        Lipschitz constant, in units of output over input. "complexity": *logarithms* (natural)
        of a complexity measure, drawn as they are: take the logarithm first. "margin":
        the score of the true class less the largest other, of either sign, in units of the score.
    ax : matplotlib.axes.Axes, optional
        Where to draw; None makes a figure that pyplot does not know.
    percentiles : sequence of float
        Between 0 and 100, marked and labelled with their values (linear interpolation). Empty
        for none; at most 4.

    Returns
    -------
    matplotlib.axes.Axes

    Raises
    ------
    ValueError
        A sample that is empty, has nothing finite or is not one-dimensional, a negative
        ratio, an unknown kind, or a percentile out of range.

    Notes
    -----
    Not shown: NaN and infinity, such as the complexity at margin zero, which the title counts
    and the percentiles leave out; and the percentiles of more than 10 samples. No histogram of
    ratios bounds the Lipschitz constant from above.

    References
    ----------
    Sanyal, Torr & Dokania 2020 (log complexities and empirical Lipschitz constants).

    Examples
    --------
    >>> ax = histogram({"train": [0.5, 1.0, 1.5]}, kind="lipschitz", percentiles=(50,))
    >>> [text.get_text() for text in ax.get_legend().get_texts()]
    ['train', '50th percentile: 1']
    """
    check_choice(kind, "kind", tuple(_TITLES))
    levels = _check_percentiles(percentiles)
    named = isinstance(values, Mapping)
    given = check_mapping(values, "values", '{"train": values}') if named else {"": values}
    samples, dropped, total = {}, 0, 0
    for name, sample in given.items():
        what = f"sample {str(name)!r}" if named else "values"
        array = vector(sample, what)
        samples[name] = _finite(array, what, kind)
        dropped += len(array) - len(samples[name])
        total += len(array)
    edges = _edges(np.concatenate(list(samples.values())), (total - dropped) // len(samples))
    ax = axes(ax, max(characters(list(samples)), 0 if len(samples) > FEW else 26))
    handles: list[Any] = []
    words: list[str] = []
    few, some = len(samples) <= _FILLED, len(samples) <= FEW
    shown = samples.values()
    names = shorten(samples) if named else [f"{len(sample)} values" for sample in shown]
    for sample, style, name in zip(shown, line_styles(len(samples)), names, strict=True):
        heights = np.histogram(sample, edges)[0] / len(sample)
        if few:
            ax.stairs(heights, edges, fill=True, color=style["color"], alpha=0.25)
            handles.append(ax.stairs(heights, edges, **style))
        else:
            handles.append(ax.plot((edges[1:] + edges[:-1]) / 2, heights, **style)[0])
        words.append(name)
        marks = [float(np.percentile(sample, level)) for level in levels] if some else []
        for level, at, dashes, symbol in zip(levels, marks, _DASHES, _SYMBOLS, strict=False):
            if few:
                dashed = {**style, "linestyle": dashes, "linewidth": 1.2}
                handles.append(ax.axvline(at, **dashed))
                words.append(f"{_ordinal(level)} percentile: {at:.4g}")
            else:
                ax.plot(at, 0, symbol, color=style["color"], markersize=6, clip_on=False, zorder=3)
        if marks and not few:
            words[-1] += ": " + ", ".join(f"{at:.3g}" for at in marks)
    if kind == "margin" and edges[0] < 0 < edges[-1]:
        ax.axvline(0, color="#808080", linewidth=0.8, zorder=0)
    ax.set_ylim(bottom=0)
    title = f"{_TITLES[kind]} of {total - dropped} {'pairs' if kind == 'lipschitz' else 'points'}"
    title += counted(dropped, total, "values, NaN or infinite, left out")
    label(ax, title, _X[kind], "fraction of the sample in each bin")
    if not some:
        explain(ax, list(samples), handles, what="sample")
        return ax
    if not few:
        for level, symbol in zip(levels, _SYMBOLS, strict=False):
            handles.append(Line2D([], [], color="#606060", marker=symbol, linestyle=""))
            words.append(f"{_ordinal(level)} percentile")
    legend(ax, handles, words)
    return ax


def _finite(array: np.ndarray, what: str, kind: str) -> np.ndarray:
    finite: np.ndarray = array[np.isfinite(array)]
    if not finite.size:
        raise ValueError(f"{what}: none of {array.size} values is finite; leave it out")
    if kind == "lipschitz" and finite.min() < 0:
        raise ValueError(
            f"{what}: got {finite.min():g}, but a ratio of norms is at least 0; for logarithms "
            f'use kind="complexity"'
        )
    return finite


def _edges(everything: np.ndarray, size: int) -> np.ndarray:
    low, high = float(everything.min()), float(everything.max())
    if high - low <= 1e-9 * max(abs(low), abs(high)):
        # All values are the same: make bins around it that differ in double precision.
        pad = 0.05 * abs(low) or 0.5
        low, high = low - pad, high + pad
    count = min(60, max(10, math.isqrt(size)))
    edges: np.ndarray = np.linspace(low, high, count + 1)
    return edges


def _check_percentiles(percentiles: Any) -> list[float]:
    levels = [float(p) for p in percentiles]
    wrong = [p for p in levels if not 0 <= p <= 100]
    if wrong or len(levels) > len(_DASHES):
        raise ValueError(
            f"percentiles must be at most {len(_DASHES)} numbers from 0 to 100, got {levels}"
        )
    return levels


def _ordinal(level: float) -> str:
    text = f"{level:g}"
    if text.endswith(("11", "12", "13")) or "." in text:
        return f"{text}th"
    return text + {"1": "st", "2": "nd", "3": "rd"}.get(text[-1], "th")
