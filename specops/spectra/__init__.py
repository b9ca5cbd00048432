"""Singular values of the linear maps that weights stand for."""

from specops.maps.operator import LinearOperator, linear_operator
from specops.spectra.bounds import NormBounds, spectral_norm_bounds
from specops.spectra.norms import spectral_norm
from specops.spectra.ranks import condition_number, effective_rank, stable_rank
from specops.spectra.triplets import top_singular_triplets
from specops.spectra.values import singular_values

__all__ = [
    "LinearOperator",
    "NormBounds",
    "condition_number",
    "effective_rank",
    "linear_operator",
    "singular_values",
    "spectral_norm",
    "spectral_norm_bounds",
    "stable_rank",
    "top_singular_triplets",
]
