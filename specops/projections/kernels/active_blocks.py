"""Which blocks of a convolution reach a limit, and with which singular vectors."""

from __future__ import annotations

import numpy as np

from specops import arrays
from specops.arrays import host, workers
from specops.arrays.solvers import eigh
from specops.linalg.rounding import CHOLESKY_MARGIN
from specops.projections.kernels.cuts import Cuts
from specops.projections.kernels.support import Support
from specops.spectra.torus import block_bytes, host_blocks, leading_norm

_AT_ONCE = 64
"""At least so many frequencies have their blocks in memory together."""


def near_limit(support: Support, x: np.ndarray, limit: float) -> np.ndarray:
    """Indices (count, 2) over frequency and group of blocks that may reach the limit.

    All others have a norm below ``limit·(1 − margin)``, by a Cholesky factor.
    """
    margin = CHOLESKY_MARGIN[arrays.dtype_name(x.real.dtype)]
    coefficients = support.coefficients(np, x)

    def work(chunk: slice) -> np.ndarray:
        grams = host.gram(host_blocks(coefficients, support.symbol, chunk))
        return host.exceeds(grams, limit * (1.0 - margin)).reshape(grams.shape[:2])

    frequencies = len(support.symbol.frequencies)
    parts = workers.map_chunks(work, frequencies, block_bytes(coefficients))
    return np.argwhere(np.concatenate(parts))


def largest_and_active(
    support: Support, x: np.ndarray, expected: float | None = None
) -> tuple[float, np.ndarray]:
    """(the largest singular value c, blocks that include all those near c), in one pass.

    If c is near the `expected` value, it costs little more than a certificate.
    """
    margin = CHOLESKY_MARGIN[arrays.dtype_name(x.real.dtype)]
    return leading_norm(support.coefficients(np, x), support.symbol, margin, expected)


def all_inside(support: Support, x: np.ndarray, limit: float, active: np.ndarray) -> bool:
    """Whether the active blocks are all inside, by Cholesky factors in double precision."""
    coefficients = support.coefficients(np, x.astype(np.result_type(x, np.float64)))
    frequencies, where = np.unique(active[:, 0], return_inverse=True)
    inside = True
    for chunk in np.array_split(np.arange(len(frequencies)), max(1, len(frequencies) // _AT_ONCE)):
        blocks = host_blocks(coefficients, support.symbol, frequencies[chunk])
        own = (where >= chunk[0]) & (where <= chunk[-1]) if len(chunk) else np.zeros(0, bool)
        if own.any():
            picked = blocks[where[own] - chunk[0], active[own, 1]]
            inside = inside and not host.exceeds(host.gram(picked), limit).any()
    return inside


def violated(support: Support, x: np.ndarray, limit: float) -> tuple[float, Cuts, np.ndarray]:
    """(largest singular value or the limit, the triplets above the limit, the blocks near it).

    The weight of each triplet is its singular value. Computed in the precision of `x`.
    """
    active = near_limit(support, x, limit)
    if not len(active):
        return limit, Cuts.none(support), active
    coefficients = support.coefficients(np, x)

    def work(chunk: slice) -> tuple[np.ndarray, ...]:
        frequencies, where = np.unique(active[chunk, 0], return_inverse=True)
        blocks = host_blocks(coefficients, support.symbol, frequencies)
        return _triplets(blocks[where, active[chunk, 1]], limit, chunk.start)

    parts = workers.map_chunks(work, len(active), block_bytes(coefficients))
    index, left, right, values = (np.concatenate(p) for p in zip(*parts, strict=True))
    cuts = Cuts(active[index, 0], active[index, 1], left, right, values)
    return max(limit, float(values.max(initial=0.0))), cuts, active


def _triplets(
    blocks: np.ndarray, limit: float, first: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """(block, u, v, σ) of every singular value above the limit, one after another."""
    wide = blocks.shape[-2] <= blocks.shape[-1]
    values, vectors = eigh(np, host.gram(blocks))
    which, position = np.nonzero(values > limit**2)
    own = vectors[which, :, position].astype(complex)
    picked = blocks[which].astype(complex)
    # One product gives the vectors of the other side, and a more precise value.
    if wide:
        other = (own[:, None, :].conj() @ picked)[:, 0].conj()
    else:
        other = (picked @ own[..., None])[..., 0]
    sigma = np.linalg.norm(other, axis=1)
    other = other / np.where(sigma > 0, sigma, 1.0)[:, None]
    own = own / np.linalg.norm(own, axis=1, keepdims=True)
    left, right = (own, other) if wide else (other, own)
    return which + first, left, right, sigma
