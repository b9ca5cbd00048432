"""Singular values of the linear maps that weights stand for."""

from specops.spectra.bounds import NormBounds, spectral_norm_bounds
from specops.spectra.norms import spectral_norm
from specops.spectra.ranks import stable_rank
from specops.spectra.values import singular_values

__all__ = ["NormBounds", "singular_values", "spectral_norm", "spectral_norm_bounds", "stable_rank"]
