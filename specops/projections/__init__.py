"""Nearest points: the weight of the same shape that satisfies a spectral constraint."""

from specops.projections.balancing import balance_norms
from specops.projections.clip_values import clip_singular_values
from specops.projections.info import ProjectionInfo, StableRankInfo
from specops.projections.polar import polar_factor
from specops.projections.schatten_ball import project_schatten_ball
from specops.projections.spectral_ball import project_spectral_ball
from specops.projections.stable_rank import project_stable_rank

__all__ = [
    "ProjectionInfo",
    "StableRankInfo",
    "balance_norms",
    "clip_singular_values",
    "polar_factor",
    "project_schatten_ball",
    "project_spectral_ball",
    "project_stable_rank",
]
