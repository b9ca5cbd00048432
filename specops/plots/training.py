"""Figures over training: of every layer, and the whole spectrum of one."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from numbers import Real
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from specops.geometry.arguments import check_choice
from specops.plots.arguments import check_mapping, spectrum
from specops.plots.spectra import SCALES, TITLES, Scale, check_not_zero, draw_spectrum, finish
from specops.plots.style import (
    DEPTH,
    FEW,
    axes,
    characters,
    counted,
    explain,
    explain_steps,
    label,
    legend,
    line_styles,
    scale_values,
    whole_ticks,
)
from specops.training.history import History, plain

_WORDS = {
    "norm": "norm as the rule measures it",
    "norm_after": "norm after the rule",
    "norm_before": "norm before the rule",
    "norm_upper": "upper bound of the operator norm, any input size",
    "spectral_norm": "operator norm",
    "stable_rank": "stable rank",
    "rank_after": "stable rank after the rule",
    "rank_before": "stable rank before the rule",
    "distance": "distance moved, Frobenius norm",
    "penalty": "penalty added to the loss",
}


def spectra_over_training(
    history: History | Iterable[Mapping[str, Any]],
    *,
    figure: str = "norm_after",
    ax: Axes | None = None,
) -> Axes:
    """One figure of every layer, over the steps at which its rule fired.

    Up to 10 layers are named in a legend; more are coloured by depth, in the order in which
    they first appear. Norms and ranks have no unit; the axis is logarithmic where positive
    values span more than three decades.

    Parameters
    ----------
    history : History or list of dict
        ``attachment.history``: records of a step, a name and figures. If a figure is a list, with
        an entry for each map of a stack or of a fused weight, the largest is drawn.
    figure : str
        Which figure to draw: "norm_after" for most rules, "spectral_norm" for `Monitor`,
        "rank_after" for stable ranks.
    ax : matplotlib.axes.Axes, optional
        Where to draw; None makes a figure that pyplot does not know.

    Returns
    -------
    matplotlib.axes.Axes

    Raises
    ------
    ValueError
        No record has this figure, none of them is finite, or there are no records.

    Notes
    -----
    Not shown: records without the figure (skipped firings, other rules) and what an attachment
    no longer keeps. Lines are straight between firings, where weights were not measured. NaN and
    infinity leave a gap, and the title counts them.

    Examples
    --------
    >>> records = [{"step": s, "name": "fc", "norm_after": 1 + 1 / s} for s in (1, 2, 4)]
    >>> spectra_over_training(records).lines[0].get_ydata().tolist()
    [2.0, 1.5, 1.25]
    """
    lines = _lines(history, figure)
    values = np.array([y for points in lines.values() for _, y in points])
    finite = np.isfinite(values)
    if not finite.any():
        raise ValueError(
            f"none of the {len(values)} values of figure {figure!r} is finite; training "
            f"diverged at step {min(s for p in lines.values() for s, _ in p):g} or before"
        )
    ax = axes(ax, characters(list(lines)))
    handles = []
    for points, style in zip(lines.values(), line_styles(len(lines)), strict=True):
        x, y = np.array(sorted(points, key=lambda point: point[0])).T
        # A line through one value cannot be seen.
        marker = "o" if len(x) == 1 or (len(lines) <= FEW and len(x) <= 12) else ""
        y = np.where(np.isfinite(y), y, np.nan)
        handles.append(ax.plot(x, y, marker=marker, markersize=3.0, **style)[0])
    below = scale_values(ax, values[finite])
    ax.xaxis.set_major_locator(whole_ticks())
    title = f"{figure} over training"
    title += counted(int((~finite).sum()), len(values), "values, NaN or infinite, are gaps")
    title += counted(below, len(values), "values, 0 or nearly, lie below the axis")
    label(ax, title, "training step", _WORDS.get(figure, figure))
    explain(ax, list(lines), handles)
    return ax


def spectrum_over_training(
    snapshots: Mapping[Any, Any],
    *,
    name: str = "",
    scale: Scale = "absolute",
    ax: Axes | None = None,
) -> Axes:
    """The whole spectrum of one layer at several steps of training, coloured by step.

    Parameters
    ----------
    snapshots : mapping of step to array, shape (n,)
        Singular values in any order, by the step at which they were measured.
    name : str
        The layer's name, for the title.
    scale : {"absolute", "relative", "normalized"}
        As in `singular_values`.
    ax : matplotlib.axes.Axes, optional
        Where to draw; None makes a figure that pyplot does not know.

    Returns
    -------
    matplotlib.axes.Axes
        Lines in the order of their steps.

    Raises
    ------
    NonFiniteError, ValueError
        As in `singular_values`, or a step that is no number.
    TypeError
        As in `singular_values`.

    Notes
    -----
    Not shown: which singular value became which, as lines connect ranks, not vectors.

    Examples
    --------
    >>> ax = spectrum_over_training({100: [2.0, 1.0], 0: [3.0, 1.0]}, name="fc")
    >>> [line.get_ydata().tolist() for line in ax.lines]
    [[3.0, 1.0], [2.0, 1.0]]
    """
    check_choice(scale, "scale", SCALES)
    check_mapping(snapshots, "snapshots", "{0: values, 100: values}")
    for step in snapshots:
        if not isinstance(step, Real) or not math.isfinite(step):
            raise ValueError(
                f"snapshots: expected steps as keys, got {step!r}; to compare layers by name "
                f"use plots.singular_values"
            )
    steps = sorted(snapshots)
    spectra = [spectrum(snapshots[step], f"step {step}") for step in steps]
    if scale != "absolute":
        for step, s in zip(steps, spectra, strict=True):
            check_not_zero(s, f"step {step}")
    ax = axes(ax, 16)
    span = float(steps[-1] - steps[0]) or 1.0
    handles = [
        draw_spectrum(
            ax,
            s,
            {"color": DEPTH(float(step - steps[0]) / span), "linewidth": 1.2},
            scale,
            marked=len(steps) <= FEW,
        )
        for step, s in zip(steps, spectra, strict=True)
    ]
    of = f" of {name}".replace("$", r"\$") if name else ""
    finish(ax, spectra, f"{TITLES[scale]}ingular values{of} over training", scale)
    if len(steps) == 1:
        legend(ax, handles, [f"step {steps[0]}"])
    else:
        explain_steps(ax, steps)
    return ax


def _lines(history: Any, figure: str) -> dict[str, list[tuple[float, float]]]:
    """(step, value) of every layer that has the figure."""
    records = history.records() if isinstance(history, History) else [plain(r) for r in history]
    if not records:
        raise ValueError("the history is empty: no rule has fired yet, or it keeps no records")
    lines: dict[str, list[tuple[float, float]]] = {}
    for number, record in enumerate(records):
        if "step" not in record or "name" not in record:
            raise ValueError(
                f"record {number} has no step or no name, only {', '.join(map(str, record))}: "
                f"pass attachment.history"
            )
        value = _largest(record.get(figure))
        if value is not None:
            lines.setdefault(record["name"], []).append((record["step"], value))
    if not lines:
        found = sorted({k for r in records for k, v in r.items() if _largest(v) is not None})
        known = ", ".join(map(repr, (k for k in found if k not in ("step", "name"))))
        raise ValueError(f"no record has the figure {figure!r}; these exist: {known or 'none'}")
    return lines


def _largest(value: Any) -> float | None:
    """The number, or the largest of a list (NaN if any is); None for strings and None."""
    if isinstance(value, list):
        parts = [p for p in map(_largest, value) if p is not None]
        return (math.nan if any(map(math.isnan, parts)) else max(parts)) if parts else None
    return float(value) if isinstance(value, Real) else None
