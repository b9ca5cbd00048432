"""`singular_values`: the spectra of layers, side by side."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, get_args

import numpy as np
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from specops.geometry.arguments import check_choice
from specops.plots.arguments import check_mapping, spectrum
from specops.plots.style import (
    FEW,
    axes,
    characters,
    counted,
    explain,
    label,
    line_styles,
    scale_values,
    whole_ticks,
)

_MARKED = 24
"""Most values of a spectrum that get a marker each."""
_UNEVEN = 40
"""If lengths differ by this ratio, the shortest spectrum would be a spike at the left."""

_RATIO = r"$\sigma_i / \sigma_1$"
Scale = Literal["absolute", "relative", "normalized"]
SCALES: tuple[str, ...] = get_args(Scale)
TITLES = {"absolute": "S", "relative": "Relative s", "normalized": "Normalized s"}


def singular_values(
    spectra: Mapping[Any, Any], *, scale: Scale = "absolute", ax: Axes | None = None
) -> Axes:
    r"""Every layer's singular values by rank.

    "absolute" draws :math:`\sigma_i` over the rank :math:`i`, "relative"
    :math:`\sigma_i / \sigma_1`, which shows how many values are not negligible; "normalized" draws

    .. math:: \sigma_i / \sigma_1 \quad\text{over}\quad i / n, \qquad i = 1, \dots, n,

    which compares the decay of layers of different sizes. Singular values are gains, output
    over input, and have no unit. Up to 10 layers are named in a legend; more are coloured by
    depth, in the mapping's order.

    Parameters
    ----------
    spectra : mapping of name to array, shape (n,)
        Singular values in any order, as `specops.singular_values` gives them. Arrays of
        other libraries in host memory will do.
    scale : {"absolute", "relative", "normalized"}
        See above. An axis of absolute values is logarithmic where the positive ones span more
        than three decades, and one of ranks where the longest spectrum has more than 40 times
        as many values as the shortest.
    ax : matplotlib.axes.Axes, optional
        Where to draw; None makes a figure that pyplot does not know.

    Returns
    -------
    matplotlib.axes.Axes

    Raises
    ------
    NonFiniteError, ValueError
        A spectrum is empty, not one-dimensional, negative, NaN or infinite, or, for any scale but
        "absolute", all zero; or there is no spectrum at all.
    TypeError
        `spectra` is not a mapping, or `ax` not axes.

    Notes
    -----
    Not shown: on a logarithmic axis zeros and what is below 1e-12 of the largest value, whose
    lines drop out of the axes; the title counts them. Values of unequal multiplicity weigh
    equally, and which kind of map a layer is cannot be seen.

    References
    ----------
    Sedghi, Gupta & Long 2019, figures 5 ("absolute"), 6 ("relative") and 7 ("normalized").

    Examples
    --------
    >>> ax = singular_values({"fc": [1.0, 4.0, 2.0]}, scale="normalized")
    >>> ax.lines[0].get_ydata().tolist()
    [1.0, 0.5, 0.25]
    """
    check_choice(scale, "scale", SCALES)
    check_mapping(spectra, "spectra", '{"conv1": values}')
    sorted_values = {name: spectrum(s, f"layer {str(name)!r}") for name, s in spectra.items()}
    if scale != "absolute":
        for name, s in sorted_values.items():
            check_not_zero(s, f"layer {str(name)!r}")
    ax = axes(ax, characters(list(spectra)))
    few = len(sorted_values) == 1
    title = f"{TITLES[scale]}ingular values by rank"
    handles = [
        draw_spectrum(ax, s, style, scale, marked=len(spectra) <= FEW)
        for s, style in zip(sorted_values.values(), line_styles(len(spectra)), strict=True)
    ]
    finish(ax, list(sorted_values.values()), title if few else f"{title}, each layer", scale)
    explain(ax, list(sorted_values), handles)
    return ax


def check_not_zero(s: np.ndarray, what: str) -> None:
    """Raise if the largest value is zero, so that ratios to it are undefined."""
    if not s[0] > 0:
        raise ValueError(
            f"{what}: all singular values are 0, so σᵢ/σ₁ is undefined; leave it out, or use "
            f'scale="absolute"'
        )


def draw_spectrum(
    ax: Axes, s: np.ndarray, style: dict[str, Any], scale: Scale, *, marked: bool
) -> Line2D:
    """One line; `s` holds the largest first."""
    rank = np.arange(1, len(s) + 1)
    # A line through one value cannot be seen.
    marker = "o" if len(s) == 1 or (marked and len(s) <= _MARKED) else ""
    x = rank / len(s) if scale == "normalized" else rank
    y = s if scale == "absolute" else s / s[0]
    line: Line2D = ax.plot(x, y, marker=marker, markersize=3.0, **style)[0]
    return line


def finish(ax: Axes, spectra: list[np.ndarray], title: str, scale: Scale) -> None:
    """Set limits, ticks and labels, once all lines are drawn."""
    if scale == "normalized":
        ax.set_xlim(0, 1.02)
        ax.set_ylim(0, 1.03)
        label(ax, title, r"rank $i$ / number of values $n$", _RATIO)
        return
    if scale == "relative":
        ax.set_ylim(0, 1.03)
    else:
        everything = np.concatenate(spectra)
        below = scale_values(ax, everything)
        title += counted(below, everything.size, "values, 0 or nearly, lie below the axis")
    lengths = [len(s) for s in spectra]
    if max(lengths) > _UNEVEN * min(lengths):
        ax.set_xscale("log")
    else:
        # Ranks begin at 1.
        ax.set_xlim(0.5, max(lengths) + max(0.5, 0.02 * max(lengths)))
        ax.xaxis.set_major_locator(whole_ticks())
    what = "singular value" if scale == "absolute" else _RATIO
    label(ax, title, r"rank $i$ (1 is the largest)", what)
