"""Figures of singular values, norms and generalization measures, drawn with matplotlib.

Every function draws on the `ax` that it is given, or on a figure of its own that pyplot knows
nothing of: no window opens and nothing stays open. ``import specops`` does not load this package.

Of layers:
    singular_values         every layer's spectrum by rank
    norms                   every layer's operator norm, or its bounds; of two models

Over training:
    spectra_over_training   one figure of every layer, from ``attachment.history``
    spectrum_over_training  the whole spectrum of one layer at several steps

Of samples:
    histogram               Lipschitz ratios, complexities or margins, with percentiles

Files:
    save                    PNG, PDF or SVG, the same bytes each time

>>> from specops import plots
>>> ax = plots.singular_values({"conv1": [3.0, 1.0, 0.5], "fc": [2.0, 2.0]})
>>> ax.get_ylabel()
'singular value'
"""

from __future__ import annotations

try:
    import matplotlib  # noqa: F401
except ImportError as error:
    raise ImportError(
        "plots need matplotlib: pip install 'specops[plot]'", name="matplotlib"
    ) from error

from specops.plots.files import save
from specops.plots.histograms import histogram
from specops.plots.layers import norms
from specops.plots.spectra import singular_values
from specops.plots.training import spectra_over_training, spectrum_over_training

__all__ = [
    "histogram",
    "norms",
    "save",
    "singular_values",
    "spectra_over_training",
    "spectrum_over_training",
]
