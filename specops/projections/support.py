"""Kernels of one support as a Euclidean space, and the blocks of their convolution."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from specops import arrays
from specops.maps.symbol import Symbol
from specops.typing import Array

if TYPE_CHECKING:
    from specops.projections.axes import Axes


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


@dataclass
class Solution:
    """A point of the ball in coordinates of a support, and what is known of it.

    Attributes
    ----------
    x : array
        Scaled into the ball.
    primal, dual : float
        ½‖K − x‖², and a lower bound of ½‖K − X*‖² for the nearest point X*: so
        ``‖x − X*‖² ≤ 2(primal − dual)``.
    rounds : int
    axes : Axes, optional
        With the multipliers that give the dual bound.
    suspects : array, optional
        Blocks near the limit; those left out are certified below it.
    """

    x: Array
    primal: float
    dual: float
    rounds: int
    axes: Axes | None = None
    suspects: np.ndarray | None = None
    overflowed: bool = False
    """Whether it stopped because too many axes were active."""

    @classmethod
    def certified(
        cls,
        kernel: np.ndarray,
        x: np.ndarray,
        top: float,
        limit: float,
        nuclear: float,
        rounds: int = 0,
    ) -> Solution:
        """X = K − A*Z of norm `top`, scaled into the ball, and what Z of this nuclear norm bounds.

        The dual objective is ½‖K − X‖² + ⟨X, K − X⟩ − c‖Z‖_*.
        """
        change = kernel - x
        dual = 0.5 * _squared(change) + float(np.sum((x.conj() * change).real)) - limit * nuclear
        feasible = x * min(1.0, limit / top) if top > 0 else x
        return cls(feasible, 0.5 * _squared(kernel - feasible), dual, rounds)

    def suffices(self, kernel: np.ndarray, tolerance: Tolerance) -> bool:
        """Whether one of the two is certified."""
        moved = self.primal <= (1.0 + tolerance.distance) ** 2 * self.dual
        return moved or self.gap(kernel) <= tolerance.gap

    def gap(self, kernel: np.ndarray) -> float:
        """2(primal − dual)/‖K‖², at least 0."""
        return max(0.0, 2.0 * (self.primal - self.dual)) / max(_squared(kernel), 1e-300)

    def better(self, other: Solution) -> Solution:
        """The nearer point with the higher bound, after the rounds of both."""
        nearer = self if self.primal <= other.primal else other
        dual, rounds = max(self.dual, other.dual), self.rounds + other.rounds
        return Solution(nearer.x, nearer.primal, dual, rounds, self.axes, nearer.suspects)


def _squared(x: np.ndarray) -> float:
    return float(np.sum(np.abs(x) ** 2))


class Support:
    """Coordinates in which the Frobenius norm of kernels of one support is Euclidean.

    Taps that wrap onto each other act only through their sum. With m taps in a slot the
    coordinate is that sum divided by √m, which is what the nearest kernel sees; slots that no
    tap fills stay zero. Coordinates are laid out like the symbol's coefficients.

    Parameters
    ----------
    symbol : Symbol
        Frequencies and tables.
    """

    def __init__(self, symbol: Symbol) -> None:
        self.symbol = symbol
        taps = np.ones((1, 1))
        for axis in symbol.axes:
            own = axis.scatter.sum(axis=0).reshape(axis.phases, -1)
            taps = np.einsum("ps,qt->pqst", taps, own).reshape(-1, taps.shape[1] * own.shape[1])
        self.taps = taps.T
        """(shifts, phases): how many taps act in each slot."""
        self.most = max(1.0, float(taps.max()))
        """‖A‖² of the map A to the blocks, in the inner product of `gather`."""
        self.plain = bool((taps == 1).all())

    @property
    def work(self) -> float:
        """Multiplications, roughly, in a decomposition of all blocks."""
        symbol = self.symbol
        small, large = sorted(symbol.block_shape)
        return 200.0 * len(symbol.frequencies) * symbol.sizes.groups * small**2 * large

    def coordinates(self, xp: Any, kernel: Array) -> Array:
        """Of a kernel (groups, rows, columns, *taps)."""
        return self._scaled(xp, self.symbol.coefficients(xp, kernel), -0.5)

    def kernel(self, xp: Any, x: Array) -> Array:
        """The least kernel with these coordinates."""
        return self.symbol.kernel(xp, self._scaled(xp, x, 0.5))

    def coefficients(self, xp: Any, x: Array) -> Array:
        """The symbol's coefficients."""
        return self._scaled(xp, x, 0.5)

    def gather(self, xp: Any, blocks: Array, chosen: Any = slice(None)) -> Array:
        """The adjoint of the map from coordinates to blocks, each counted as often as it occurs.

        Divided by the number of blocks in all, so that A*A is the number of taps in each slot.
        """
        return self._scaled(xp, self.symbol.average(xp, blocks, chosen), 0.5)

    def per_tap(self, xp: Any, x: Array) -> Array:
        """(A*A)⁻¹ x."""
        return self._scaled(xp, x, -1.0)

    def _scaled(self, xp: Any, x: Array, power: float) -> Array:
        if self.plain:
            return x
        factor = np.where(self.taps > 0, np.maximum(self.taps, 1.0) ** power, 0.0)
        shifts, phases = self.taps.shape
        columns = self.symbol.sizes.columns
        split = xp.reshape(x, (shifts, -1, phases, columns))
        factor = arrays.constant(factor, split)[:, None, :, None]
        return xp.reshape(split * xp.astype(factor, split.dtype), x.shape)
