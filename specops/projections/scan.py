"""Which blocks of a convolution reach a limit, and with which singular vectors."""

from __future__ import annotations

import numpy as np

from specops import arrays
from specops.arrays import host, workers
from specops.arrays.solvers import eigh
from specops.projections.axes import Axes
from specops.projections.support import Support
from specops.spectra.torus import block_bytes, host_blocks, leading_norm

_MARGIN = {"float32": 1e-4, "float64": 1e-10}
"""Relative margin below the limit from which a block is looked at closely: above rounding."""


def near(support: Support, x: np.ndarray, limit: float, margin: float | None = None) -> np.ndarray:
    """Indices (count, 2) over frequency and group of blocks that may reach the limit.

    All others have a norm below ``limit·(1 − margin)``, by a Cholesky factor.
    """
    margin = _MARGIN[arrays.dtype_name(x.real.dtype)] if margin is None else margin
    coefficients = support.coefficients(np, x)

    def work(chunk: slice) -> np.ndarray:
        grams = host.gram(host_blocks(coefficients, support.symbol, chunk))
        return host.exceeds(grams, limit * (1.0 - margin)).reshape(grams.shape[:2])

    frequencies = len(support.symbol.frequencies)
    parts = workers.map_chunks(work, frequencies, block_bytes(coefficients))
    return np.argwhere(np.concatenate(parts))


def largest_and_near(support: Support, x: np.ndarray) -> tuple[float, np.ndarray]:
    """(the largest singular value c, what `near` gives for c), in one pass."""
    margin = _MARGIN[arrays.dtype_name(x.real.dtype)]
    return leading_norm(support.coefficients(np, x), support.symbol, margin)


def within(support: Support, x: np.ndarray, limit: float, suspects: np.ndarray) -> bool:
    """Whether the suspected blocks are all inside, by Cholesky factors in double precision."""
    coefficients = support.coefficients(np, x.astype(np.result_type(x, np.float64)))
    frequencies, where = np.unique(suspects[:, 0], return_inverse=True)
    inside = True
    for chunk in np.array_split(np.arange(len(frequencies)), max(1, len(frequencies) // 64)):
        blocks = host_blocks(coefficients, support.symbol, frequencies[chunk])
        own = (where >= chunk[0]) & (where <= chunk[-1]) if len(chunk) else np.zeros(0, bool)
        if own.any():
            picked = blocks[where[own] - chunk[0], suspects[own, 1]]
            inside = inside and not host.exceeds(host.gram(picked), limit).any()
    return inside


def above(support: Support, x: np.ndarray, limit: float) -> tuple[float, Axes, np.ndarray]:
    """(largest singular value or the limit, the triplets above the limit, the blocks near it).

    The weight of each triplet is its singular value. In the precision of `x`.
    """
    suspects = near(support, x, limit)
    if not len(suspects):
        return limit, Axes.none(support), suspects
    coefficients = support.coefficients(np, x)

    def work(chunk: slice) -> tuple[np.ndarray, ...]:
        frequencies, where = np.unique(suspects[chunk, 0], return_inverse=True)
        blocks = host_blocks(coefficients, support.symbol, frequencies)
        return _triplets(blocks[where, suspects[chunk, 1]], limit, chunk.start)

    parts = workers.map_chunks(work, len(suspects), block_bytes(coefficients))
    index, left, right, values = (np.concatenate(p) for p in zip(*parts, strict=True))
    axes = Axes(suspects[index, 0], suspects[index, 1], left, right, values)
    return max(limit, float(values.max(initial=0.0))), axes, suspects


def _triplets(
    blocks: np.ndarray, limit: float, first: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """(block, u, v, σ) of every singular value above the limit, one after another."""
    wide = blocks.shape[-2] <= blocks.shape[-1]
    values, vectors = eigh(np, host.gram(blocks))
    which, place = np.nonzero(values > limit**2)
    own = vectors[which, :, place].astype(complex)
    picked = blocks[which].astype(complex)
    # One product sharpens the value and gives the vectors of the other side.
    if wide:
        other = (own[:, None, :].conj() @ picked)[:, 0].conj()
    else:
        other = (picked @ own[..., None])[..., 0]
    sigma = np.linalg.norm(other, axis=1)
    other = other / np.where(sigma > 0, sigma, 1.0)[:, None]
    own = own / np.linalg.norm(own, axis=1, keepdims=True)
    left, right = (own, other) if wide else (other, own)
    return which + first, left, right, sigma
