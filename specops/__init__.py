"""specops: measure and control the singular values of neural network weights.

Functions take arrays of NumPy, torch, JAX, CuPy or any library that follows the Array API
standard, with the geometry that says which linear map an array is, and return arrays of the same
kind. Rules act on a model's weights during training. `help` of each name says more.

Which map an array is; nothing is guessed from a shape:
    Dense                   a matrix; stacks, fused blocks, any order of axes
    Conv                    a convolution on a grid: strides, dilation, groups, transposition

Measuring:
    singular_values         all values, with multiplicity
    spectral_norm           the largest value, differentiable
    spectral_norm_bounds    lower ≤ norm ≤ upper, also of the supremum over input sizes
    top_singular_triplets   the k largest, with vectors
    stable_rank             ‖A‖²_F / ‖A‖²₂, differentiable
    effective_rank          exp of the entropy of the normalised values
    condition_number        σ₁ / σ_min
    linear_operator         the map itself, by its products with vectors

Nearest weights, and others that meet a constraint:
    project_spectral_ball   the nearest with operator norm ≤ c
    project_stable_rank     the nearest with stable rank ≤ r
    project_schatten_ball   the nearest with nuclear or Frobenius norm ≤ r
    clip_singular_values    all values between two bounds
    polar_factor            all values 1
    balance_norms           a ReLU chain with equal norms and the same function

Whole models:
    attach                  a rule, or a plan, acts during training
    project                 a rule, or a plan, acts once
    Plan                    which rule acts on which weight, and at which steps
    inspect                 spectral figures of every weight in a checkpoint

Rules after the optimizer's step:
    ClipSpectralNorm        the nearest weight with operator norm ≤ c
    ClipAndCut              one round of clipping and cutting back, no bound (Sedghi et al. 2019)
    ProjectStableRank       the nearest weight with stable rank ≤ r (Sanyal et al. 2020)
    NormalizeIfAbove        scales down what is above a bound (Newhouse et al. 2025)
    SpectralSoftCap         presses all values below a bound (Newhouse et al. 2025)
    SpectralHammer          sets the largest value to a bound (Newhouse et al. 2025)
    Monitor                 measures and changes nothing

Rules before it, on gradients:
    SpectralNormPenalty     adds λσuvᴴ (Yoshida & Miyato 2017)

Rules in every forward pass:
    SpectralNormalization   s·W/σ: SN, BSN, SSN, BSSN (Miyato et al. 2018; Lin et al. 2021)
    StableRankNormalization W/σ of limited stable rank: SRN (Sanyal et al. 2020)
    TrainableScale          a factor s that is learnt

Besides:
    errors                  every error and warning; each is a subclass of a built-in one
    measures                what networks are judged by
    plots                   figures of spectra, norms and measures
    checkpoints             files of weights, read one tensor at a time
    inspection              what `inspect` and the command return, print and write
    plugins                 the adapters that are installed

Names are loaded when they are first used, which keeps ``import specops`` as cheap as its
dependencies.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from specops import errors
    from specops.geometry import Conv, Dense
    from specops.inspection import inspect
    from specops.models import attach, project
    from specops.projections import (
        balance_norms,
        clip_singular_values,
        polar_factor,
        project_schatten_ball,
        project_spectral_ball,
        project_stable_rank,
    )
    from specops.rules import (
        ClipAndCut,
        ClipSpectralNorm,
        Monitor,
        NormalizeIfAbove,
        ProjectStableRank,
        SpectralHammer,
        SpectralNormalization,
        SpectralNormPenalty,
        SpectralSoftCap,
        StableRankNormalization,
        TrainableScale,
    )
    from specops.spectra import (
        condition_number,
        effective_rank,
        linear_operator,
        singular_values,
        spectral_norm,
        spectral_norm_bounds,
        stable_rank,
        top_singular_triplets,
    )
    from specops.training import Plan

__version__ = "0.1.0"

__all__ = [
    "ClipAndCut",
    "ClipSpectralNorm",
    "Conv",
    "Dense",
    "Monitor",
    "NormalizeIfAbove",
    "Plan",
    "ProjectStableRank",
    "SpectralHammer",
    "SpectralNormPenalty",
    "SpectralNormalization",
    "SpectralSoftCap",
    "StableRankNormalization",
    "TrainableScale",
    "attach",
    "balance_norms",
    "clip_singular_values",
    "condition_number",
    "effective_rank",
    "errors",
    "inspect",
    "linear_operator",
    "polar_factor",
    "project",
    "project_schatten_ball",
    "project_spectral_ball",
    "project_stable_rank",
    "singular_values",
    "spectral_norm",
    "spectral_norm_bounds",
    "stable_rank",
    "top_singular_triplets",
]

_HOMES = {
    "geometry": ("Conv", "Dense"),
    "inspection": ("inspect",),
    "models": ("attach", "project"),
    "projections": (
        "balance_norms",
        "clip_singular_values",
        "polar_factor",
        "project_schatten_ball",
        "project_spectral_ball",
        "project_stable_rank",
    ),
    "rules": (
        "ClipAndCut",
        "ClipSpectralNorm",
        "Monitor",
        "NormalizeIfAbove",
        "ProjectStableRank",
        "SpectralHammer",
        "SpectralNormPenalty",
        "SpectralNormalization",
        "SpectralSoftCap",
        "StableRankNormalization",
        "TrainableScale",
    ),
    "spectra": (
        "condition_number",
        "effective_rank",
        "linear_operator",
        "singular_values",
        "spectral_norm",
        "spectral_norm_bounds",
        "stable_rank",
        "top_singular_triplets",
    ),
    "training": ("Plan",),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name in _HOME_OF:
        value = getattr(import_module(f"specops.{_HOME_OF[name]}"), name)
        globals()[name] = value
        return value
    if name in ("checkpoints", "errors", "inspection", "measures", "plots", "plugins"):
        return import_module(f"specops.{name}")
    raise AttributeError(f"module 'specops' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
