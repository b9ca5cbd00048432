"""Spectral figures of the weights in a checkpoint, without the model that they belong to."""

from specops.inspection.adapted import with_updates
from specops.inspection.comparison import Comparison, compare
from specops.inspection.difference import differences
from specops.inspection.entry import inspect
from specops.inspection.hints import Hints
from specops.inspection.output import as_csv, as_json, show
from specops.inspection.page import as_html
from specops.inspection.results import Inspection, Measured, WeightFigures
from specops.inspection.run import inspect_checkpoint
from specops.inspection.spectrum import Figures

__all__ = [
    "Comparison",
    "Figures",
    "Hints",
    "Inspection",
    "Measured",
    "WeightFigures",
    "as_csv",
    "as_html",
    "as_json",
    "compare",
    "differences",
    "inspect",
    "inspect_checkpoint",
    "show",
    "with_updates",
]
