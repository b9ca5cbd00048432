"""Rules: what is done to one weight, and when in a training step; one rule per file."""

from specops.rules.base import Rule, Schedule
from specops.rules.caps import NormalizeIfAbove, SpectralSoftCap
from specops.rules.clip import ClipSpectralNorm
from specops.rules.clip_and_cut import ClipAndCut
from specops.rules.forward import SpectralNormalization, StableRankNormalization
from specops.rules.hammer import SpectralHammer
from specops.rules.monitor import Monitor
from specops.rules.penalty import SpectralNormPenalty
from specops.rules.scale import TrainableScale
from specops.rules.stable_rank import ProjectStableRank
from specops.rules.stages import ForwardRule, GradientRule, StagedRule, WeightRule, completed

__all__ = [
    "ClipAndCut",
    "ClipSpectralNorm",
    "ForwardRule",
    "GradientRule",
    "Monitor",
    "NormalizeIfAbove",
    "ProjectStableRank",
    "Rule",
    "Schedule",
    "SpectralHammer",
    "SpectralNormPenalty",
    "SpectralNormalization",
    "SpectralSoftCap",
    "StableRankNormalization",
    "StagedRule",
    "TrainableScale",
    "WeightRule",
    "completed",
]
