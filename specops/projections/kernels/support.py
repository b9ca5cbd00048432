"""Kernels of one support as a Euclidean space, and the blocks of their convolution."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from specops import arrays
from specops.maps.symbol import Symbol
from specops.typing import Array, Namespace

_SAMPLED = 4
"""Frequencies of a sample per period. Of 2, 3, 4 and 6 this took the least time for the layers of a
ResNet-20 in training, two thirds of that of rounds on all frequencies. With 2 the sample tells too
little."""


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
    def signature(self) -> np.ndarray:
        """Integers that two supports share only if their coordinates mean the same."""
        symbol = self.symbol
        axes = [(a.phases, a.period, len(a.shifts), *a.shifts) for a in symbol.axes]
        return np.array([*symbol.fine, *symbol.block_shape, *(n for axis in axes for n in axis)])

    @property
    def work(self) -> float:
        """Multiplications, roughly, in a decomposition of all blocks."""
        symbol = self.symbol
        small, large = sorted(symbol.block_shape)
        return 200.0 * len(symbol.frequencies) * symbol.sizes.groups * small**2 * large

    @property
    def sample(self) -> np.ndarray:
        """A sample of frequencies, some for each period of the fastest wave in a block.

        It is empty if the sample would contain nearly all.
        """
        symbol = self.symbol
        strides = [max(1, int(a.period / (_SAMPLED * max(1, *a.shifts)))) for a in symbol.axes]
        if math.prod(strides) == 1:
            return np.zeros(0, int)
        return np.flatnonzero((symbol.frequencies % strides == 0).all(axis=1))

    def coordinates(self, xp: Namespace, kernel: Array) -> Array:
        """The coordinates of a kernel (groups, rows, columns, *taps)."""
        return self._scaled(xp, self.symbol.coefficients(xp, kernel), -0.5)

    def kernel(self, xp: Namespace, x: Array) -> Array:
        """The kernel of least norm with these coordinates."""
        return self.symbol.kernel(xp, self._scaled(xp, x, 0.5))

    def unseen(self, xp: Namespace, kernel: Array) -> Array | None:
        """The part of a kernel that cancels where taps wrap onto each other; None if none do."""
        if not self.symbol.folds:
            return None
        part = kernel - self.kernel(xp, self.coordinates(xp, kernel))
        # The rounding of a large kernel would be seen by the operator: it is removed again.
        return part - self.kernel(xp, self.coordinates(xp, part))

    def coefficients(self, xp: Namespace, x: Array) -> Array:
        """The symbol's coefficients of a kernel with these coordinates."""
        return self._scaled(xp, x, 0.5)

    def gather(self, xp: Namespace, blocks: Array, chosen: Any = slice(None)) -> Array:
        """The adjoint of the map from coordinates to blocks, each counted as often as it occurs.

        Divided by the number of blocks in all, so that A*A is the number of taps in each slot.
        """
        return self._scaled(xp, self.symbol.average(xp, blocks, chosen), 0.5)

    def per_tap(self, xp: Namespace, x: Array) -> Array:
        """(A*A)⁻¹ x."""
        return self._scaled(xp, x, -1.0)

    def _scaled(self, xp: Namespace, x: Array, power: float) -> Array:
        if self.plain:
            return x
        factor = np.where(self.taps > 0, np.maximum(self.taps, 1.0) ** power, 0.0)
        shifts, phases = self.taps.shape
        columns = self.symbol.sizes.columns
        split = xp.reshape(x, (shifts, -1, phases, columns))
        factor = arrays.constant(factor, split)[:, None, :, None]
        return xp.reshape(split * xp.astype(factor, split.dtype), x.shape)
