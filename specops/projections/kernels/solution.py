"""A point of the operator ball with its certificate, and the tolerance for which it suffices."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from specops.projections.kernels.cuts import Cuts
from specops.projections.kernels.half_spaces import HalfSpaces
from specops.typing import Array

_LOOSE = 0.01
"""From this tolerance of the distance on, half-spaces take fewer rounds than acceleration: at c =
0.5 and 0.25·σ₁ 25 to 32 against 30 to 50. To a gap of 1e-4 they took over 100 rounds, and left 3 to
5 times the gap that 120 to 200 accelerated rounds did."""


@dataclass(frozen=True)
class Tolerance:
    """When a feasible point is near enough to the nearest.

    Attributes
    ----------
    gap : float
        ``2(primal − dual)/‖K‖²`` at most this.
    distance : float
        Or it moved at most 1 + `distance` times as far as the nearest point.
    """

    gap: float
    distance: float

    @property
    def loose(self) -> bool:
        """Whether two half-spaces per round take fewer rounds than acceleration."""
        return self.distance >= _LOOSE


@dataclass
class Solution:
    """A point of the ball in coordinates of a support, and what is known about it.

    Attributes
    ----------
    x : array
        Scaled into the ball.
    primal, dual : float
        ½‖K − x‖², and a lower bound of ½‖K − X*‖² for the nearest point X*: so
        ``‖x − X*‖² ≤ 2(primal − dual)``.
    rounds : int
    cuts : Cuts or HalfSpaces, optional
        With the multipliers that give the dual bound.
    active : array, optional
        Blocks near the limit; those left out are certified below it.
    """

    x: Array
    primal: float
    dual: float
    rounds: int
    cuts: Cuts | HalfSpaces | None = None
    active: np.ndarray | None = None
    scaled: bool = False
    """Whether x was outside and has been scaled onto the sphere."""
    first: float = 0.0
    """The norm of K, if a round began at K and found it above c."""
    overflowed: bool = False
    """Whether it stopped because too many cuts were active."""

    @classmethod
    def certified(
        cls,
        kernel: np.ndarray,
        x: np.ndarray,
        top: float,
        limit: float,
        nuclear: float,
        rounds: int = 0,
        change: np.ndarray | None = None,
    ) -> Solution:
        """X = K − A*Z of norm `top`, scaled into the ball, with the bound that Z gives.

        The dual objective is ⟨K, A*Z⟩ − ½‖A*Z‖² − c‖Z‖_*, `nuclear` being ‖Z‖_*. Pass A*Z as
        `change` if it is known: K − X may be nothing but rounding.
        """
        change = kernel - x if change is None else change
        dual = float(np.sum((kernel.conj() * change).real)) - 0.5 * _squared(change)
        dual -= limit * nuclear
        feasible = x * min(1.0, limit / top) if top > 0 else x
        primal = 0.5 * _squared(kernel - feasible)
        return cls(feasible, primal, dual, rounds, scaled=top > limit)

    def suffices(self, kernel: np.ndarray, tolerance: Tolerance) -> bool:
        """Whether the tolerance of the distance, or that of the gap, is certified."""
        moved = self.primal <= (1.0 + tolerance.distance) ** 2 * self.dual
        return moved or self.gap(kernel) <= tolerance.gap

    def gap(self, kernel: np.ndarray) -> float:
        """2(primal − dual)/‖K‖², at least 0."""
        return max(0.0, 2.0 * (self.primal - self.dual)) / max(_squared(kernel), 1e-300)

    def better(self, other: Solution) -> Solution:
        """The nearer of two points, with the higher bound and the rounds of both."""
        nearer = self if self.primal <= other.primal else other
        dual, rounds = max(self.dual, other.dual), self.rounds + other.rounds
        first = max(self.first, other.first)
        shared = (self.cuts or other.cuts, nearer.active, nearer.scaled, first)
        return Solution(nearer.x, nearer.primal, dual, rounds, *shared)


def _squared(x: np.ndarray) -> float:
    return float(np.sum(np.abs(x) ** 2))
