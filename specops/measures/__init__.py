"""What networks are judged by: complexity, Lipschitz constants, sharpness, noise, variance.

Formulas on arrays of any namespace. Derivatives come from a framework as operators, which
adapters make: `specops_torch.jacobian_operator`, `specops_torch.hessian_operator` and their
namesakes in `specops_jax`; any object with the same methods will do. Each function's docstring
says what it tells and what it does not.

Complexities that generalisation bounds grow with, in logarithms:
    margins                 how far the right class is ahead; complexities divide by it
    log_spec_fro            norms and stable ranks of all layers (Neyshabur et al.)
    log_spec_l1             norms and row norms of all layers (Bartlett et al.)
    log_jac_norm            hidden layers and the margin's gradients by them (Wei & Ma)

Lipschitz constants:
    lipschitz_upper_bound   from above, certified, and far too large
    lipschitz_ratios        between pairs of samples, of two sets or one class, from below
    local_lipschitz         ‖J‖ at one sample, from below
    tsuzuku_alpha           what a convolution's norm exceeds its reshaped kernel's by, at most

The Hessian of a loss:
    spectrum_ends           both ends of its spectrum: sharpness
    spectral_density        the density of its eigenvalues

Noise, gradients, variance, accuracy:
    noise_sensitivity       how far noise on inputs moves outputs
    gradient_norms          Frobenius norms, layer by layer
    gradient_norm_bounds    what they never exceed, by the layers' norms (Lin et al.)
    hessian_norm_bounds     the same of each layer's Hessian (Lin et al.)
    parameter_variance      the variance of a weight, normalised or not, beside its bound
    generalization_gap      train − test accuracy once a threshold is passed

What they take and return:
    JacobianOperator        a matrix by its products from both sides
    SymmetricOperator       a symmetric matrix by its products
    MarginJacobians         what `log_jac_norm` takes
    GradientNormBounds      what `gradient_norm_bounds` returns
    LipschitzBound          what `lipschitz_upper_bound` returns
    LocalLipschitz          what `local_lipschitz` returns
    SpectrumEnds            what `spectrum_ends` returns
    SpectralDensity         what `spectral_density` returns
    ParameterVariance       what `parameter_variance` returns
"""

from specops.measures.complexity import log_jac_norm, log_spec_fro, log_spec_l1
from specops.measures.generalization import generalization_gap
from specops.measures.gradient_bounds import (
    GradientNormBounds,
    gradient_norm_bounds,
    hessian_norm_bounds,
)
from specops.measures.gradients import gradient_norms
from specops.measures.lipschitz import (
    LipschitzBound,
    LocalLipschitz,
    lipschitz_upper_bound,
    local_lipschitz,
)
from specops.measures.margins import MarginJacobians, margins
from specops.measures.noise import noise_sensitivity
from specops.measures.operators import JacobianOperator, SymmetricOperator
from specops.measures.ratios import lipschitz_ratios
from specops.measures.reshaping import tsuzuku_alpha
from specops.measures.sharpness import (
    SpectralDensity,
    SpectrumEnds,
    spectral_density,
    spectrum_ends,
)
from specops.measures.variance import ParameterVariance, parameter_variance

__all__ = [
    "GradientNormBounds",
    "JacobianOperator",
    "LipschitzBound",
    "LocalLipschitz",
    "MarginJacobians",
    "ParameterVariance",
    "SpectralDensity",
    "SpectrumEnds",
    "SymmetricOperator",
    "generalization_gap",
    "gradient_norm_bounds",
    "gradient_norms",
    "hessian_norm_bounds",
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
    "tsuzuku_alpha",
]
