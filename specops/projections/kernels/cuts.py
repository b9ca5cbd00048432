"""Cuts: the linear functionals whose maximum is the operator norm of a convolution.

A cut consists of a frequency of the symbol, with block B, and of unit vectors u and v on its two
sides. It measures ⟨X, E⟩ = Re(uᴴ B(X) v) ≤ ‖B(X)‖. Its half-space ⟨X, E⟩ ≤ c contains the operator
ball, whichever weight the vectors came from, so that cuts of an earlier weight remain valid.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from specops import arrays
from specops.errors import StateError
from specops.projections.kernels.states import state_of, unit_rows
from specops.projections.kernels.support import Support
from specops.spectra.torus import host_blocks
from specops.typing import Array, State

_KEYS = ("frequency", "group", "left", "right", "weight")
_AT_ONCE = 32
"""At least so many cuts have their blocks in memory together."""


@dataclass(frozen=True)
class Cuts:
    """N cuts with non-negative weights.

    Attributes
    ----------
    frequency, group : int arrays, shape (N,)
        Which block: index into `Symbol.frequencies`, and the group.
    left, right : complex arrays, shape (N, rows) and (N, columns of a block)
        Unit vectors u and v.
    weight : float array, shape (N,)
    """

    frequency: np.ndarray
    group: np.ndarray
    left: np.ndarray
    right: np.ndarray
    weight: np.ndarray

    def __len__(self) -> int:
        return len(self.weight)

    @classmethod
    def none(cls, support: Support) -> Cuts:
        """No cut at all."""
        rows, columns = support.symbol.block_shape
        index = np.zeros(0, np.int64)
        vectors = (np.zeros((0, rows), complex), np.zeros((0, columns), complex))
        return cls(index, index, *vectors, np.zeros(0))

    def joined(self, other: Cuts) -> Cuts:
        """These cuts followed by the others."""
        pairs = ((getattr(self, key), getattr(other, key)) for key in _KEYS)
        return Cuts(*(np.concatenate(pair) for pair in pairs))

    def weighted(self, weight: np.ndarray) -> Cuts:
        """The cuts with these weights, without those whose weight is zero."""
        return replace(self, weight=weight)._taken(np.flatnonzero(weight > 0))

    def reset(self) -> Cuts:
        """The same cuts without weight."""
        return replace(self, weight=np.zeros(len(self)))

    def largest(self, count: int) -> Cuts:
        """At most `count` cuts, those of the largest weight."""
        if len(self) <= count:
            return self
        return self._taken(np.argsort(-self.weight, kind="stable")[:count])

    def _taken(self, index: np.ndarray) -> Cuts:
        return Cuts(*(getattr(self, key)[index] for key in _KEYS))

    def inner(self, support: Support, x: np.ndarray) -> np.ndarray:
        """⟨X, E⟩ = Re(uᴴ B(X) v) for each cut E."""
        result = np.zeros(len(self))
        coefficients = support.coefficients(np, x)
        for index in np.array_split(np.arange(len(self)), max(1, len(self) // _AT_ONCE)):
            frequencies, where = np.unique(self.frequency[index], return_inverse=True)
            blocks = host_blocks(coefficients, support.symbol, frequencies)
            image = (blocks[where, self.group[index]] @ self.right[index][..., None])[..., 0]
            result[index] = np.sum(self.left[index].conj() * image, axis=-1).real
        return result

    def combined(self, support: Support) -> np.ndarray:
        """Σ weight·E in the coordinates of the support."""
        symbol = support.symbol
        groups, (rows, columns) = symbol.sizes.groups, symbol.block_shape
        total: Any = 0.0
        order = np.argsort(self.frequency, kind="stable")
        for index in np.array_split(order, max(1, len(self) // _AT_ONCE)):
            frequencies, where = np.unique(self.frequency[index], return_inverse=True)
            blocks = np.zeros((len(frequencies), groups, rows, columns), complex)
            for position, j in zip(where, index, strict=True):
                outer = np.outer(self.left[j] * self.weight[j], self.right[j].conj())
                blocks[position, self.group[j]] += outer
            # `gather` counts each block of the torus, both of a conjugate pair; a cut is in one.
            counts = symbol.counts[frequencies] / np.prod(symbol.coarse)
            total = total + support.gather(np, blocks / counts[:, None, None, None], frequencies)
        return np.asarray(total)

    def gram(self, support: Support) -> np.ndarray:
        """⟨E_i, E_j⟩."""
        symbol = support.symbol
        phases = support.taps.shape[1]
        columns = symbol.sizes.columns
        waves = np.exp(-1j * symbol.angles[self.frequency])
        right = self.right.conj().reshape(len(self), phases, columns)
        direct = np.zeros((len(self), len(self)), complex)
        mirrored = direct.copy()
        for phase in range(phases):
            weighted = waves * support.taps[:, phase]
            own = right[:, phase]
            direct += (own.conj() @ own.T) * (waves.conj() @ weighted.T)
            mirrored += (own @ own.T) * (waves @ weighted.T)
        direct *= self.left.conj() @ self.left.T
        mirrored *= self.left @ self.left.T
        # A real kernel sees only the real part of a cut: the mean of the cut and its conjugate.
        result = (0.5 * (direct + mirrored) if symbol.conjugate_pairs else direct).real
        return np.asarray(result * (self.group[:, None] == self.group[None, :]))

    def state(self, support: Support, like: Array) -> State:
        """As arrays of the library and device of `like`, with the grid they belong to."""
        values = {key: getattr(self, key) for key in _KEYS}
        values["grid"] = np.array(support.symbol.fine)
        return state_of(values, like)

    @staticmethod
    def made(state: State) -> bool:
        """Whether `state` has the entries of one that such cuts saved."""
        return set(state) == {*_KEYS, "grid"}

    @classmethod
    def from_state(cls, state: State, support: Support) -> Cuts:
        """The cuts that `state` saved; raises StateError if they are of another geometry."""
        keys = (*_KEYS, "grid")
        if not cls.made(state) or not all(arrays.is_array(state[k]) for k in keys):
            raise StateError(f"the state must hold arrays {', '.join(keys)}, got {sorted(state)}")
        *values, grid = (arrays.to_numpy(state[key]) for key in keys)
        rows, columns = support.symbol.block_shape
        count = values[-1].shape
        shapes = (count, count, (*count, rows), (*count, columns), count)
        fits = len(count) == 1 and all(v.shape == s for v, s in zip(values, shapes, strict=True))
        if not fits or tuple(grid.reshape(-1)) != support.symbol.fine:
            raise StateError(
                f"the state belongs to another kernel or grid than {rows}×{columns} blocks on a "
                f"torus of {support.symbol.fine}: pass state=None to start afresh"
            )
        frequency, group, left, right, weight = values
        ends = (len(support.symbol.frequencies), support.symbol.sizes.groups)
        inside = all(
            bool(((index >= 0) & (index < end)).all())
            for index, end in zip((frequency, group), ends, strict=True)
        )
        if not inside or not all(np.isfinite(v).all() for v in (left, right, weight)):
            raise StateError("the state is damaged: pass state=None to start afresh")
        left, right = (unit_rows(v.astype(complex)) for v in (left, right))
        weight = np.maximum(weight.astype(float), 0.0)
        return cls(frequency.astype(np.int64), group.astype(np.int64), left, right, weight)
