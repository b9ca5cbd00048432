"""`save`: a figure as a file, the same bytes each time."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import FigureBase

# Metadata that would tell when, and by which version, a file was made.
_SILENT: dict[str, dict[str, None]] = {
    ".png": {"Software": None},
    ".pdf": {"Creator": None, "Producer": None, "CreationDate": None},
    ".svg": {"Creator": None, "Date": None},
}


def save(figure: Axes | FigureBase, path: str | os.PathLike[str]) -> Path:
    """Write a figure to a PNG (150 dots per inch), PDF or SVG file, its margins trimmed.

    The same figure and version of matplotlib give the same bytes: dates, the names of programs
    and random identifiers are left out.

    Parameters
    ----------
    figure : matplotlib.axes.Axes or matplotlib.figure.Figure
        What a plot returned, or the figure that it is on; all of the figure is written.
    path : path
        Its suffix determines the format. Folders are made as needed; an existing file is replaced.

    Returns
    -------
    pathlib.Path
        Where the file is.

    Raises
    ------
    TypeError
        `figure` is not a figure.
    ValueError
        The suffix is none of these formats.

    Examples
    --------
    >>> import tempfile
    >>> from specops.plots import norms
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save(norms({"fc": 2.0}), f"{folder}/norms.png").name
    'norms.png'
    """
    if not isinstance(figure, Axes | FigureBase):
        raise TypeError(f"expected a matplotlib Axes or Figure, got {type(figure).__name__}")
    where = Path(path)
    metadata = _SILENT.get(where.suffix.lower())
    if metadata is None:
        raise ValueError(
            f"expected a file that ends in {', '.join(_SILENT)}, got {where.name!r}; for other "
            f"formats use ax.figure.savefig"
        )
    where.parent.mkdir(parents=True, exist_ok=True)
    # `.figure` of axes is a figure or subfigure, and of either of these the whole figure.
    root: Any = figure.figure.figure
    with rc_context({"svg.hashsalt": "specops"}):
        # Drawn twice, because layouts change a little at the first drawing.
        root.draw_without_rendering()
        root.savefig(where, dpi=150, bbox_inches="tight", metadata=metadata)
    return where
