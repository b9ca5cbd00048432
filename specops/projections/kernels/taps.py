"""Coordinates of a kernel by tap, in which its operator's squared Frobenius norm is diagonal."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from specops import arrays
from specops.geometry import ConvSizes
from specops.typing import Array, Namespace


@dataclass(frozen=True)
class Taps:
    """Orthonormal coordinates in which ‖A(K)‖_F² is diagonal: one per distinct grid offset."""

    fold: np.ndarray
    """(taps, coordinates), orthonormal columns."""
    weights: np.ndarray
    """(coordinates,): ‖A(K)‖_F² = Σ_c weights[c]·‖z_c‖²; 0 for taps that read only padding."""

    @property
    def folds(self) -> bool:
        return len(self.fold) != len(self.weights)

    def coordinates(self, xp: Namespace, kernel: Array) -> Array:
        """A kernel (groups, rows, columns, *taps) as (coordinates, groups·rows, columns)."""
        groups, rows, columns = kernel.shape[:3]
        z = xp.reshape(kernel, (groups * rows, columns, self.fold.shape[0]))
        if self.folds:
            fold = arrays.constant(self.fold, z, complex=arrays.is_complex(z))
            z = arrays.matmul(z, fold)
        # With each tap's entries contiguous, sums over channels in single precision keep digits.
        return xp.reshape(xp.permute_dims(z, (2, 0, 1)), (self.fold.shape[1], *z.shape[:2]))

    def kernel(self, xp: Namespace, z: Array, like: Array) -> Array:
        """The kernel with these coordinates, without a part that cancels where taps wrap."""
        z = xp.permute_dims(z, (1, 2, 0))
        if self.folds:
            unfold = arrays.constant(self.fold.T, z, complex=arrays.is_complex(z))
            z = arrays.matmul(z, unfold)
        return xp.reshape(z, like.shape)


@lru_cache(maxsize=256)
def taps_of(sizes: ConvSizes) -> Taps:
    assert sizes.fine is not None
    fold: np.ndarray = np.ones((1, 1))
    outputs: np.ndarray = np.ones(1)
    for n, d, uses in zip(sizes.fine, sizes.dilation, sizes.uses, strict=True):
        own = np.eye(len(uses))
        if sizes.circular:
            landings, landing = np.unique(d * np.arange(len(uses)) % n, return_inverse=True)
            own, uses = np.eye(len(landings))[landing], uses[: len(landings)]
        fold = np.kron(fold, own)
        outputs = np.kron(outputs, np.array(uses, float))
    sharing = fold.sum(axis=0)
    return Taps(fold / np.sqrt(sharing), outputs * sharing)
