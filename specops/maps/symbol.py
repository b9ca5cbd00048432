"""The Fourier symbol of a convolution: the small matrices its operator decomposes into.

On a torus a convolution of stride s, dilation d and kernel K is unitarily equivalent to one
block per coarse frequency θ,

    B(θ)[o, (φ, i)] = Σ_{a: d·a mod s = φ} K[o, i, a] · exp(i θ·(d·a div s)),

so its singular values are those of all blocks (Sedghi, Gupta & Long 2019, Theorem 6, for
stride 1; polyphase columns φ for any stride). A shift that all taps of one phase share is a
unitary factor and is dropped, which also makes padding offsets irrelevant. Frequencies that
give the same block, or its conjugate, are evaluated once and counted.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np

from specops import arrays
from specops.errors import UnsupportedGeometryError
from specops.geometry import ConvSizes
from specops.typing import Array, Namespace

_ALL = slice(None)


@dataclass(frozen=True)
class _Axis:
    """One spatial axis: the phase and shift of each tap, and the number of distinct frequencies."""

    phases: int
    shifts: tuple[int, ...]
    period: int
    multiplicity: int
    scatter: np.ndarray
    """(taps, phases·shifts), 1 where a tap lands; taps that wrap onto each other share one.

    Taps that are never read land nowhere.
    """
    read_phases: tuple[int, ...]
    """The phases (positions within a stride) that taps read, ascending."""
    firsts: tuple[int, ...]
    """For each of these phases, the shift that is dropped."""

    @property
    def is_identity(self) -> bool:
        rows, columns = self.scatter.shape
        return rows == columns and bool((self.scatter == np.eye(rows)).all())


def _axis(taps: int, read: tuple[int, ...], stride: int, dilation: int, fine: int) -> _Axis:
    coarse = fine // stride
    # An axis that reads no tap gets a single coefficient, which is zero.
    offsets = dilation * np.array(read or (0,))
    phase, shift = offsets % stride, offsets // stride % coarse
    firsts = []
    for p in np.unique(phase):
        at = phase == p
        firsts.append(int(shift[at][0]))
        shift[at] = (shift[at] - shift[at][0]) % coarse
    multiplicity = math.gcd(coarse, *(int(b) for b in shift))
    shift = shift // multiplicity
    phases, phase_index = np.unique(phase, return_inverse=True)
    shifts, shift_index = np.unique(shift, return_inverse=True)
    scatter = np.zeros((taps, len(phases) * len(shifts)))
    if read:
        scatter[np.array(read), phase_index * len(shifts) + shift_index] = 1.0
    return _Axis(
        len(phases),
        tuple(int(b) for b in shifts),
        coarse // multiplicity,
        multiplicity,
        scatter,
        tuple(int(p) for p in phases),
        tuple(firsts),
    )


class Symbol:
    """The symbol of one kernel shape on one torus: integer tables, no weights.

    Parameters
    ----------
    sizes : ConvSizes
        Sizes of the convolution, on any grid.
    torus : tuple of int
        The fine grid to evaluate on; the stride must divide it.
    conjugate_pairs : bool
        Whether kernels are real, so that θ and −θ give conjugate blocks.
    """

    def __init__(self, sizes: ConvSizes, torus: tuple[int, ...], conjugate_pairs: bool) -> None:
        for n, s in zip(torus, sizes.stride, strict=True):
            if n % s:
                raise UnsupportedGeometryError(
                    f"stride {s} does not divide a circular grid of {n}: the operator has no "
                    f"block diagonal form and so no exact spectrum here. spectral_norm_bounds "
                    f"encloses its norm, or change the grid to a multiple of the stride"
                )
        self.sizes = sizes
        self.conjugate_pairs = conjugate_pairs
        self.axes = tuple(
            _axis(k, read, s, d, n)
            for k, read, s, d, n in zip(
                sizes.kernel, sizes.read, sizes.stride, sizes.dilation, torus, strict=True
            )
        )
        self.coarse = tuple(n // s for n, s in zip(torus, sizes.stride, strict=True))
        self.fine = torus
        self.phases = math.prod(a.phases for a in self.axes)
        self.block_shape = (sizes.rows, self.phases * sizes.columns)
        self.frequencies, self.counts = _representatives(
            tuple(a.period for a in self.axes), conjugate_pairs
        )
        self.counts = self.counts * math.prod(a.multiplicity for a in self.axes)

    @property
    def values_per_block(self) -> int:
        return min(self.block_shape)

    @property
    def zero_values(self) -> int:
        """Singular values that are zero because no tap reads some phases of the grid."""
        sizes = self.sizes
        total = min(
            sizes.rows * math.prod(self.coarse),
            sizes.columns * math.prod(self.fine),
        )
        return sizes.groups * (total - math.prod(self.coarse) * self.values_per_block)

    @cached_property
    def folds(self) -> bool:
        """Whether taps wrap onto each other."""
        return any((axis.scatter.sum(axis=0) > 1).any() for axis in self.axes)

    @cached_property
    def angles(self) -> np.ndarray:
        """θ·b, (frequencies, shifts), reduced modulo the period for the sake of cos and sin."""
        return _angles(tuple((a.period, a.shifts) for a in self.axes), self.conjugate_pairs)

    def coefficients(self, xp: Namespace, kernel: Array) -> Array:
        """A kernel (groups, rows, columns, *taps) as (shifts, groups·rows·phases·columns)."""
        dtype = kernel.dtype
        # Where taps wrap onto each other they may cancel: in double, so that no rounding is left.
        double = arrays.double_dtype(xp, kernel) if self.folds else None
        kernel = kernel if double is None else xp.astype(kernel, double)
        for t, axis in enumerate(self.axes):
            if not axis.is_identity:
                kernel = arrays.along_axis(xp, kernel, axis.scatter, 3 + t)
        kernel = xp.astype(kernel, dtype, copy=False)
        split = [n for axis in self.axes for n in (axis.phases, len(axis.shifts))]
        kernel = xp.reshape(kernel, (*kernel.shape[:3], *split))
        phases = [3 + 2 * t for t in range(len(self.axes))]
        kernel = xp.permute_dims(kernel, (*(p + 1 for p in phases), 0, 1, *phases, 2))
        # Not by the shape of `angles`, which would build a large table that may not be needed.
        return xp.reshape(kernel, (math.prod(len(axis.shifts) for axis in self.axes), -1))

    def kernel(self, xp: Namespace, coefficients: Array) -> Array:
        """The least-norm kernel with these coefficients; those that no tap reaches are dropped."""
        sizes = self.sizes
        shifts = [len(axis.shifts) for axis in self.axes]
        phases = [axis.phases for axis in self.axes]
        kernel = xp.reshape(
            coefficients, (*shifts, sizes.groups, sizes.rows, *phases, sizes.columns)
        )
        n = len(self.axes)
        interleaved = [i for t in range(n) for i in (n + 2 + t, t)]
        kernel = xp.permute_dims(kernel, (n, n + 1, 2 * n + 2, *interleaved))
        kernel = xp.reshape(kernel, (*kernel.shape[:3], *(a.scatter.shape[1] for a in self.axes)))
        for t, axis in enumerate(self.axes):
            if not axis.is_identity:
                gather = axis.scatter / np.maximum(axis.scatter.sum(axis=0), 1.0)
                kernel = arrays.along_axis(xp, kernel, gather.T, 3 + t)
        return kernel

    def blocks(
        self, xp: Namespace, coefficients: Array, chosen: slice | np.ndarray = _ALL
    ) -> Array:
        """B at the chosen frequencies, (frequencies, groups, rows, phases·columns), complex."""
        angles = self.angles[chosen]
        if arrays.is_complex(coefficients):
            stacked = arrays.constant(np.exp(1j * angles), coefficients, complex=True)
            out = stacked @ coefficients
        else:
            real = arrays.matmul(arrays.constant(np.cos(angles), coefficients), coefficients)
            imag = arrays.matmul(arrays.constant(np.sin(angles), coefficients), coefficients)
            out = arrays.complex_of(xp, real, imag)
        return xp.reshape(out, (angles.shape[0], self.sizes.groups, *self.block_shape))

    def average(self, xp: Namespace, blocks: Array, chosen: slice | np.ndarray = _ALL) -> Array:
        """Coefficients of the operator with these blocks, cut to the kernel's support.

        The adjoint of `blocks` divided by the number of coarse grid points, which is its
        inverse on the blocks of a kernel. Blocks that are not given count as zero.
        """
        angles = self.angles[chosen]
        weights = self.counts[chosen][:, None] / math.prod(self.coarse)
        flat = xp.reshape(blocks, (angles.shape[0], -1))
        if self.conjugate_pairs:
            cosines = arrays.constant((weights * np.cos(angles)).T, flat)
            sines = arrays.constant((weights * np.sin(angles)).T, flat)
            return arrays.matmul(cosines, xp.real(flat)) + arrays.matmul(sines, xp.imag(flat))
        return arrays.constant((weights * np.exp(-1j * angles)).T, flat, complex=True) @ flat

    @cached_property
    def multiplicities(self) -> np.ndarray:
        """Indices of frequencies, each repeated as often as it counts."""
        return np.repeat(np.arange(len(self.counts)), self.counts)


@lru_cache(maxsize=256)
def symbol_of(sizes: ConvSizes, torus: tuple[int, ...], conjugate_pairs: bool = True) -> Symbol:
    """The symbol tables of a geometry, built once."""
    return Symbol(sizes, torus, conjugate_pairs)


@lru_cache(maxsize=32)
def _angles(axes: tuple[tuple[int, tuple[int, ...]], ...], conjugate_pairs: bool) -> np.ndarray:
    """`Symbol.angles`, cached: layers that differ only in their channels share this large table."""
    frequencies, _ = _representatives(tuple(period for period, _ in axes), conjugate_pairs)
    total = np.zeros((len(frequencies), 1))
    for t, (period, shifts) in enumerate(axes):
        turns = np.outer(frequencies[:, t], shifts) % period / period
        total = (total[:, :, None] + turns[:, None, :]).reshape(len(total), -1)
    total *= 2.0 * np.pi
    total.flags.writeable = False
    return total


@lru_cache(maxsize=32)
def _representatives(
    periods: tuple[int, ...], conjugate_pairs: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Frequencies (count, axes), one of each pair ±q, and how many each stands for."""
    grid = np.indices(periods).reshape(len(periods), -1)
    flat = np.arange(grid.shape[1])
    if not conjugate_pairs:
        return grid.T, np.ones_like(flat)
    periods_column = np.array(periods)[:, None]
    mirrored = np.ravel_multi_index(tuple((-grid) % periods_column), periods)
    keep = flat <= mirrored
    return grid.T[keep], np.where(flat == mirrored, 1, 2)[keep]
