"""Cases for three ranks, after those for two in the same folder."""

from __future__ import annotations

from pathlib import Path

from specops import ClipSpectralNorm, SpectralNormPenalty
from tests.torch_adapter.distributed.models import compare, dense, fsdp, load


def loaded(folder: Path) -> None:
    """A checkpoint of two ranks."""
    load(folder, fsdp)


def uneven(_: Path) -> None:
    """Shards of different sizes, two of them empty."""
    compare(dense, fsdp, ClipSpectralNorm(1.0), 1e-6, rate=0.01)
    compare(dense, fsdp, ClipSpectralNorm(8.0), 1e-6, rate=0.01)
    compare(dense, fsdp, SpectralNormPenalty(0.05, norm="reshaped"), 1e-6, rate=0.01)


RANKS = 3
CASES = (loaded, uneven)
