r"""Kernels brought into the operator ball by a matrix that acts on the channels of one side.

It leaves a kernel its support: every block B becomes MB. With
:math:`E_f = (B_fB_f^H/c^2 - I)_+` of each block

.. math:: M = \Bigl(I + \bigl(\sum_f E_f^4\bigr)^{1/4}\Bigr)^{-1/2}
          \;\Rightarrow\; \|MB_f\| \le c \text{ for every } f,

since the fourth root is operator monotone (Löwner–Heinz): under it each :math:`E_f` is at most
the sum. Scaling shrinks a kernel in all directions by what one of them has too much; this, each by
about its own. Lower powers add up what many blocks say of the same direction; higher ones saved
no more rounds, and add up rounding.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from specops.projections.kernels.support import Support

_POWER = 4


@dataclass(frozen=True)
class Leading:
    """The singular values above a limit, and their vectors, of those blocks that have any.

    Attributes
    ----------
    chosen : bool array, shape (frequencies, groups)
        Of which blocks.
    squares : array, shape (blocks, side)
        Squared singular values over limit², ascending.
    vectors : array, shape (blocks, side, side)
        Singular vectors of the smaller side.
    """

    chosen: np.ndarray
    squares: np.ndarray
    vectors: np.ndarray

    @classmethod
    def none(cls, chosen: np.ndarray, like: np.ndarray) -> Leading:
        """Of no block at all."""
        side = min(like.shape[-2:])
        return cls(chosen, np.zeros((0, side)), np.zeros((0, side, side), like.dtype))

    def sum_of_powers(self, support: Support, which: np.ndarray) -> np.ndarray | None:
        """Σ E⁴ over the blocks and those of their negative frequencies, (groups, side, side).

        In double precision. None where the smaller side of the blocks is not one of channels: a
        stride adds phases to the columns.
        """
        symbol = support.symbol
        if not _on_rows(support) and symbol.phases > 1:
            return None
        above = np.maximum(self.squares.astype(float) - 1.0, 0.0)
        kept = np.flatnonzero(above.any(axis=0))
        counts = symbol.counts[which] // math.prod(axis.multiplicity for axis in symbol.axes)
        counts = np.broadcast_to(counts[:, None], self.chosen.shape)[self.chosen]
        weights = above[:, kept] ** (_POWER / 2) * np.sqrt(counts)[:, None]
        columns = self.vectors[..., kept] * weights[:, None, :]
        spread = np.zeros((*self.chosen.shape, *columns.shape[1:]), columns.dtype)
        spread[self.chosen] = columns
        flat = spread.transpose(1, 2, 0, 3).reshape(*spread.shape[1:3], -1)
        if symbol.conjugate_pairs:
            flat = np.concatenate((flat.real, flat.imag), axis=-1)
        total: np.ndarray = flat @ flat.conj().swapaxes(-2, -1)
        return total


def contracted(support: Support, x: np.ndarray, powers: np.ndarray) -> np.ndarray:
    """Coordinates of M x, or of x M, by the sum of powers of all blocks of x."""
    symbol = support.symbol
    values, vectors = np.linalg.eigh(powers)
    shrunk = (1.0 + np.maximum(values, 0.0) ** (1 / _POWER)) ** -0.5
    matrix = (vectors * shrunk[..., None, :]) @ vectors.conj().swapaxes(-2, -1)
    split: np.ndarray = x.reshape(-1, symbol.sizes.groups, *symbol.block_shape)
    split = matrix @ split if _on_rows(support) else split @ matrix
    return split.reshape(x.shape)


def _on_rows(support: Support) -> bool:
    rows, columns = support.symbol.block_shape
    return rows <= columns
