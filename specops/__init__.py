"""specops: measure and control the singular values of neural network weights."""

from specops import errors
from specops.geometry import Conv, Dense
from specops.projections import project_spectral_ball
from specops.spectra import singular_values, spectral_norm, stable_rank

__version__ = "0.1.0"
