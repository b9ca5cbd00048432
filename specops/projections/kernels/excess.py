"""The excess over a limit in the blocks of a convolution, and the half-spaces that it gives."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from specops import arrays
from specops.arrays import host
from specops.linalg.rounding import CHOLESKY_MARGIN
from specops.linalg.soft_threshold import soft_threshold
from specops.projections.kernels.support import Support
from specops.spectra.torus import map_blocks
from specops.typing import Array, Namespace

Plane = tuple[np.ndarray, float]
"""(A*Z, ‖Z‖_*) of one half-space."""


@dataclass(frozen=True)
class Excess:
    """Z = S(A x), the blocks of x soft thresholded at c: ⟨X, A*Z⟩ ≤ c‖Z‖_* if ‖A(X)‖ ≤ c.

    Attributes
    ----------
    planes : list of (array, float)
        A*Z in double precision and ‖Z‖_* over the torus: of all of Z, then of the block alone that
        is farthest out, where there are several.
    top : float
        The largest singular value of the blocks, or the limit.
    near : array or None
        What `near_limit` gives for `top`, where that is known.
    """

    planes: list[Plane]
    top: float
    near: np.ndarray | None


def excess(
    support: Support, x: np.ndarray, limit: float, chosen: np.ndarray | None = None
) -> Excess:
    """The excess over the limit, in the precision of `x`, at all or at the chosen frequencies.

    Z is zero at other frequencies, so that the half-space is valid in either case. `top` is the
    norm over the frequencies that were looked at; sums count these as a sample of all.
    """
    symbol, bound = support.symbol, np.asarray(limit, x.real.dtype)
    every = np.arange(len(symbol.frequencies))
    total = np.sum(symbol.counts if chosen is None else symbol.counts[chosen])
    scale = np.prod(symbol.coarse) / total

    def share(nuclear: np.ndarray, which: np.ndarray) -> float:
        return float(np.sum(symbol.counts[which, None] * nuclear) / total)

    def work(blocks: np.ndarray, which: Any) -> tuple[Any, ...]:
        z, nuclear, norms = thresholded(np, blocks, bound)
        which, first = every[which], int(np.argmax(norms.max(axis=-1)))
        # A copy, so that the other blocks of the chunk can be freed.
        alone = z[first : first + 1].copy(), nuclear[first : first + 1], which[first : first + 1]
        return support.gather(np, z, which), share(nuclear, which), norms, alone

    parts = map_blocks(np, symbol, support.coefficients(np, x), work, chosen)
    directions, shares, norms, alone = zip(*parts, strict=True)
    largest = np.concatenate(norms)
    top = max(limit, float(largest.max()))
    double = np.result_type(directions[0], np.float64)
    direction = sum(directions[1:], start=directions[0])
    planes = [((direction * scale).astype(double), sum(shares))]
    if np.count_nonzero(largest.max(axis=-1) > limit) > 1:
        z, nuclear, which = alone[np.argmax([norm.max() for norm in norms])]
        direction = support.gather(np, z, which)
        planes.append(((direction * scale).astype(double), share(nuclear, which)))
    lowest = top * (1.0 - CHOLESKY_MARGIN[arrays.dtype_name(x.real.dtype)])
    # Blocks that were not decomposed are below the limit.
    near = np.argwhere(largest >= lowest) if lowest > limit and chosen is None else None
    return Excess(planes, top, near)


def thresholded(xp: Namespace, blocks: Array, limit: Array) -> tuple[Array, Array, Array]:
    """`soft_threshold` for (frequencies, groups, ...) blocks; on the host only of those above.

    The norms of the other blocks are then given as 0.
    """
    if not arrays.by_workers(blocks):
        return soft_threshold(xp, blocks, xp.broadcast_to(limit, blocks.shape[:-2]))
    grams = host.gram(blocks)
    # The largest eigenvalue is at least each diagonal entry: this shows most blocks to be outside.
    diagonal = np.diagonal(grams, axis1=-2, axis2=-1).real
    chosen = np.asarray((diagonal > float(limit) ** 2).any(axis=-1))
    if not chosen.all():
        chosen[~chosen] = host.exceeds(grams[~chosen], float(limit))
    if chosen.all():
        return soft_threshold(np, blocks, np.broadcast_to(limit, chosen.shape), grams)
    result = np.zeros_like(blocks)
    nuclear, norms = np.zeros((2, *blocks.shape[:2]), limit.dtype)
    if chosen.any():
        picked = blocks[chosen]
        bounds = np.broadcast_to(limit, picked.shape[:1])
        found = soft_threshold(np, picked, bounds, grams[chosen])
        result[chosen], nuclear[chosen], norms[chosen] = found
    return result, nuclear, norms
