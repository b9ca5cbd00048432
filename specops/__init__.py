"""specops: measure and control the singular values of neural network weights."""

from specops import errors
from specops.geometry import Conv, Dense
from specops.models import attach, project
from specops.plan import Plan
from specops.projections import project_spectral_ball
from specops.rules import ClipSpectralNorm, Monitor
from specops.spectra import singular_values, spectral_norm, spectral_norm_bounds, stable_rank

__version__ = "0.1.0"

__all__ = [
    "ClipSpectralNorm",
    "Conv",
    "Dense",
    "Monitor",
    "Plan",
    "attach",
    "errors",
    "project",
    "project_spectral_ball",
    "singular_values",
    "spectral_norm",
    "spectral_norm_bounds",
    "stable_rank",
]
