"""`Figures`: what is known about one weight, from its singular values or without them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

COLLAPSED_BELOW = 0.01
"""A direction counts as collapsed below this fraction of the largest singular value."""
RESHAPED, CIRCULAR = "reshaped", "circular"
"""Which other map the figures beside a convolution's norm belong to."""


@dataclass(frozen=True)
class Figures:
    """What is known about one weight; None for a figure that was not computed.

    All figures are of one map; those in `beside` are of another map of the same weight.

    Attributes
    ----------
    sigma_max : float or (float, float)
        Largest singular value, or certified lower and upper bound.
    frobenius : float, optional
        The Frobenius norm.
    method : str
        What was computed, in words.
    sigma_min : float, optional
        The smallest of min(rows, columns).
    stable_rank, effective_rank, condition_number : float, optional
        ‖·‖_F²/σ₁², exp of the entropy of σ/Σσ, σ₁/σ_min (inf for a singular matrix).
    collapsed : float, optional
        Fraction of the singular values that are below 1 % of the largest.
    spectrum : ndarray, optional
        The singular values, descending.
    each : tuple of float
        The largest singular value of each matrix of a stack or of blocks.
    beside : Figures, optional
        Figures of another map of the same kernel, if those of the convolution are not known.
    beside_of : "reshaped", "circular" or ""
        Which other map: the kernel as a matrix outputs × (inputs·taps), or the layer with
        circular padding.
    cost : str
        What computing all singular values would have cost, if they were not computed.
    """

    sigma_max: float | tuple[float, float]
    frobenius: float | None
    method: str
    sigma_min: float | None = None
    stable_rank: float | None = None
    effective_rank: float | None = None
    condition_number: float | None = None
    collapsed: float | None = None
    spectrum: np.ndarray | None = None
    each: tuple[float, ...] = ()
    beside: Figures | None = None
    beside_of: str = ""
    cost: str = ""

    @property
    def ends(self) -> tuple[float, float]:
        """Lower and upper bound of σ_max: the same number twice if it is known exactly."""
        sigma = self.sigma_max
        return sigma if isinstance(sigma, tuple) else (sigma, sigma)

    @property
    def drawn(self) -> np.ndarray | None:
        """The spectrum to draw: its own, else that of the map beside it."""
        if self.spectrum is None and self.beside is not None:
            return self.beside.spectrum
        return self.spectrum


def from_values(values: np.ndarray, method: str) -> Figures:
    """The figures of singular values in descending order."""
    top, least = float(values[0]), float(values[-1])
    # A smaller value is rounding: decompositions of singular matrices leave it in place of 0.
    least = least if least > len(values) * np.finfo(float).eps * top else 0.0
    if top == 0.0:
        # As specops.stable_rank and the other functions define them for the zero matrix.
        return Figures(0.0, 0.0, method, 0.0, 0.0, 0.0, math.inf, None, values)
    shares, energy = values / values.sum(), float(np.sum((values / top) ** 2))
    entropy = -float(np.sum(shares[shares > 0] * np.log(shares[shares > 0])))
    return Figures(
        sigma_max=top,
        frobenius=top * math.sqrt(energy),
        method=method,
        sigma_min=least,
        stable_rank=energy,
        effective_rank=math.exp(entropy),
        condition_number=top / least if least > 0 else math.inf,
        collapsed=float(np.mean(values < COLLAPSED_BELOW * top)),
        spectrum=values,
    )


def worst(found: list[Figures]) -> Figures:
    """The figures of a stack: extremes over its matrices, and all their values together."""

    def over(key: str, function: Any) -> Any:
        values = [getattr(f, key) for f in found]
        return None if None in values else function(values)

    low, high = (max(bounds) for bounds in zip(*(f.ends for f in found), strict=True))
    spectra = [f.spectrum for f in found if f.spectrum is not None]
    return Figures(
        sigma_max=low if low == high else (low, high),
        frobenius=math.hypot(*(f.frobenius or 0.0 for f in found)),
        method=f"{len(found)} matrices: extremes over them, their mean share collapsed; "
        f"{found[0].method}",
        sigma_min=over("sigma_min", min),
        stable_rank=over("stable_rank", min),
        effective_rank=over("effective_rank", min),
        condition_number=over("condition_number", max),
        collapsed=over("collapsed", lambda x: float(np.mean(x))),
        spectrum=-np.sort(-np.concatenate(spectra)) if spectra else None,
        each=tuple(f.ends[1] for f in found),
    )
