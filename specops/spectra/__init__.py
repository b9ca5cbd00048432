"""Singular values of the linear maps that weights stand for."""

from specops.spectra.norms import spectral_norm
from specops.spectra.ranks import stable_rank
from specops.spectra.values import singular_values

__all__ = ["singular_values", "spectral_norm", "stable_rank"]
