"""Nearest points: the weight of the same shape that satisfies a spectral constraint."""

from specops.projections.feasible import ProjectionInfo
from specops.projections.spectral_ball import project_spectral_ball

__all__ = ["ProjectionInfo", "project_spectral_ball"]
