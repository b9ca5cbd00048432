"""Spectral figures of the weights in a checkpoint, without the model that they belong to."""

from specops.inspection.comparison import Comparison, compare
from specops.inspection.figures import Figures
from specops.inspection.hints import Hints
from specops.inspection.output import as_csv, as_json
from specops.inspection.page import as_html
from specops.inspection.results import Inspection, WeightFigures
from specops.inspection.run import inspect_checkpoint

__all__ = [
    "Comparison",
    "Figures",
    "Hints",
    "Inspection",
    "WeightFigures",
    "as_csv",
    "as_html",
    "as_json",
    "compare",
    "inspect_checkpoint",
]
