"""specops: measure and control the singular values of neural network weights.

Names are loaded when they are first used, which keeps ``import specops`` as cheap as its
dependencies.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from specops import errors
    from specops.geometry import Conv, Dense
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
