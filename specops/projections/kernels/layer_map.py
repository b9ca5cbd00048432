"""A layer's own operator as explicit matrices: linear in its kernel, adjoint included."""

from __future__ import annotations

import itertools
import math
from functools import lru_cache

import numpy as np

from specops.geometry import ConvSizes

LARGEST_SIDE = 1024
"""Smaller side of a group's matrix up to which it is decomposed: a round then takes 0.4 s on one
core of 60 GFlop/s, and grows with the cube; the torus of 64² channels on 4², of that size, 0.1 s."""
_LARGEST_WORK = 1024.0**3
"""The same for all groups together: their number times the cube of the side."""


class LayerMap:
    """The map A from kernels (groups, rows, columns, *taps) to matrices (groups, outputs, inputs).

    Parameters
    ----------
    sizes : ConvSizes
        Of a layer of known size on whose grid no two taps of an output land on one entry, so that
        A*A is diagonal.
    """

    def __init__(self, sizes: ConvSizes) -> None:
        assert sizes.fine is not None
        assert sizes.coarse is not None
        assert sizes.lower is not None
        self.sizes = sizes
        self.outputs, self.inputs = math.prod(sizes.coarse), math.prod(sizes.fine)
        self.shape = (sizes.rows * self.outputs, sizes.columns * self.inputs)
        self.kernel_shape = (sizes.groups, sizes.rows, sizes.columns, *sizes.kernel)
        place = np.indices(sizes.coarse).reshape(len(sizes.coarse), -1)
        fine, lower = (np.array(n)[:, None] for n in (sizes.fine, sizes.lower))
        first = np.array(sizes.stride)[:, None] * place - lower
        self._pairs = []
        for tap in itertools.product(*(range(k) for k in sizes.kernel)):
            read = first + (np.array(sizes.dilation) * np.array(tap))[:, None]
            read = read % fine if sizes.circular else read
            (where,) = np.nonzero(((read >= 0) & (read < fine)).all(axis=0))
            self._pairs.append((where, np.ravel_multi_index(tuple(read[:, where]), sizes.fine)))
        self.uses = np.array([len(p) for p, _ in self._pairs], float).reshape(sizes.kernel)
        """A*A: how many outputs read each tap."""

    def matrices(self, kernel: np.ndarray) -> np.ndarray:
        """A(K), (groups, *shape)."""
        groups, rows, columns = kernel.shape[:3]
        taps = kernel.reshape(groups, rows, columns, -1)
        out = np.zeros((groups, rows, self.outputs, columns, self.inputs), kernel.dtype)
        for tap, (output, entry) in enumerate(self._pairs):
            out[:, :, output, :, entry] = taps[..., tap]
        return out.reshape(groups, *self.shape)

    def gather(self, matrices: np.ndarray) -> np.ndarray:
        """A*(Z), a kernel."""
        sizes = self.sizes
        split = (-1, sizes.rows, self.outputs, sizes.columns, self.inputs)
        z = matrices.reshape(split)
        taps = [z[:, :, output, :, entry].sum(axis=0) for output, entry in self._pairs]
        return np.stack(taps, axis=-1).reshape(-1, *self.kernel_shape[1:])

    def normals(self, left: np.ndarray, right: np.ndarray) -> np.ndarray:
        """A*(u vᴴ) for pairs (N, outputs) and (N, inputs) of one group each: (N, entries)."""
        u = left.reshape(-1, self.sizes.rows, self.outputs)
        vh = right.conj().reshape(-1, self.sizes.columns, self.inputs).swapaxes(-1, -2)
        taps = [u[:, :, output] @ vh[:, entry, :] for output, entry in self._pairs]
        return np.stack(taps, axis=-1).reshape(len(u), math.prod(self.kernel_shape[1:]))


def small_layer_map(sizes: ConvSizes) -> LayerMap | None:
    """The map of a layer that is no torus and small enough to be decomposed; None for others."""
    if sizes.fine is None or (sizes.circular and sizes.stride_divides):
        return None
    groups = sizes.groups
    side = min(n // groups for n in sizes.matrix_shape())
    if side > LARGEST_SIDE or groups * float(side) ** 3 > _LARGEST_WORK:
        return None
    spans = zip(sizes.fine, sizes.spans, strict=True)
    if sizes.circular and any(span > n for n, span in spans):
        # Taps that wrap onto each other: A*A is not diagonal.
        return None
    return _layer_map(sizes)


@lru_cache(maxsize=64)
def _layer_map(sizes: ConvSizes) -> LayerMap:
    return LayerMap(sizes)
