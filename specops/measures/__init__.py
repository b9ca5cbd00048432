"""What networks are judged by: complexity, Lipschitz constants, sharpness, noise, variance.

Formulas on arrays of any namespace. Derivatives come from a framework as operators, which
adapters make: `specops_torch.jacobian_operator`, `specops_torch.hessian_operator` and their
namesakes in `specops_jax`; any object with the same methods will do.
"""

from specops.measures.complexity import log_jac_norm, log_spec_fro, log_spec_l1
from specops.measures.generalization import generalization_gap
from specops.measures.gradients import gradient_norms
from specops.measures.lipschitz import (
    LipschitzBound,
    LocalLipschitz,
    lipschitz_ratios,
    lipschitz_upper_bound,
    local_lipschitz,
)
from specops.measures.margins import MarginJacobians, margins
from specops.measures.noise import noise_sensitivity
from specops.measures.operators import JacobianOperator, SymmetricOperator
from specops.measures.sharpness import (
    SpectralDensity,
    SpectrumEnds,
    spectral_density,
    spectrum_ends,
)
from specops.measures.variance import ParameterVariance, parameter_variance

__all__ = [
    "JacobianOperator",
    "LipschitzBound",
    "LocalLipschitz",
    "MarginJacobians",
    "ParameterVariance",
    "SpectralDensity",
    "SpectrumEnds",
    "SymmetricOperator",
    "generalization_gap",
    "gradient_norms",
    "lipschitz_ratios",
    "lipschitz_upper_bound",
    "local_lipschitz",
    "log_jac_norm",
    "log_spec_fro",
    "log_spec_l1",
    "margins",
    "noise_sensitivity",
    "parameter_variance",
    "spectral_density",
    "spectrum_ends",
]
