"""A convolution as explicit matrices, one per group: a linear map of kernels, and its adjoint."""

from __future__ import annotations

import itertools
import math
from functools import lru_cache

import numpy as np

from specops import arrays
from specops.arrays import host
from specops.geometry import Conv, ConvSizes
from specops.typing import Array

_LARGEST_WORK = 512.0**3
"""Rows × columns × the smaller of both, over all groups, up to which a map counts as small. In the
training example on digits rules then take 3.2 s beside 3 s of steps, the same as if no map counted
as small; with 1024³, which includes its 48 channels on 4² points, they take 14 s."""

MIDDLE = 8.0
"""Work of a layer, in that of small ones, up to which its norm is measured exactly for a report,
and it is constrained itself if no distance is tolerated: up to 1024 inputs and outputs, decomposed
in 0.15 s. Kernels of 64 channels on 3² and 4² points then moved a third to a sixth as far at c =
0.95·σ₁ as into the torus's ball, in 0.2 to 0.6 s, and up to 8 % less far at 0.5·σ₁."""


class ExplicitMap:
    """The map A from kernels (groups, rows, columns, *taps) to matrices (groups, outputs, inputs).

    Parameters
    ----------
    sizes : ConvSizes
        Sizes of a layer of known input size. No two taps of an output may land on the same entry
        of its grid, so that A*A is diagonal.
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


def norm_of(matrices: np.ndarray) -> float:
    """The largest singular value of stacked matrices, to double precision."""
    values = np.linalg.eigvalsh(host.gram(matrices))
    return float(np.sqrt(max(values.max(), 0.0)))


def explicit_norm(w: Array, geometry: Conv, layer: ExplicitMap) -> float:
    """‖A‖ of a finite weight whose values are known, by the explicit matrices of its layer."""
    values = arrays.to_numpy(arrays.to_compute(arrays.namespace(w), w))
    kernel = geometry.kernel(values.astype(np.result_type(values, np.float64)))
    # Scaled, because squares of tiny or huge entries would leave the range.
    unit = float(np.abs(kernel).max()) or 1.0
    return unit * norm_of(layer.matrices(kernel / unit))


def small_explicit_map(sizes: ConvSizes, *, times: float = 1.0) -> ExplicitMap | None:
    """The map of a layer that is no torus and small enough to be decomposed; None for others.

    With as many inputs as outputs, small is up to 512 of each: 32 channels on 4² points, 2 on 16².
    A decomposition may be `times` the work of such a layer's.
    """
    if sizes.fine is None or (sizes.circular and sizes.stride_divides):
        return None
    rows, columns = (n // sizes.groups for n in sizes.matrix_shape())
    if sizes.groups * float(rows) * columns * min(rows, columns) > times * _LARGEST_WORK:
        return None
    if sizes.wraps:
        # A*A is not diagonal if taps wrap onto each other.
        return None
    return _explicit_map(sizes)


@lru_cache(maxsize=64)
def _explicit_map(sizes: ConvSizes) -> ExplicitMap:
    return ExplicitMap(sizes)
