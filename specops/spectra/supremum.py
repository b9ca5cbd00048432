"""The supremum of a convolution's symbol over all frequencies, by branch and bound."""

from __future__ import annotations

import itertools

import numpy as np

from specops.arrays import workers
from specops.arrays.host import gram
from specops.maps.symbol import Symbol

_LARGEST_TURN = 0.49 * np.pi
"""The first cells are so small that Σ δ h is at most this. At a quarter turn (π/2) the cosine would
vanish and bound nothing; here it is at least 1/32."""


def supremum(
    kernel: np.ndarray, symbol: Symbol, rtol: float, max_evaluations: int
) -> tuple[float, float]:
    """(lower, upper) of sup_ω σ₁(symbol(ω)), refined until upper ≤ (1 + rtol)·lower.

    A matrix-valued trigonometric polynomial of degrees 2δ_t falls off no faster than
    cos(Σ δ_t h_t) within half-widths h_t of a point where its norm is largest, so a cell around
    ω holds at most σ₁(ω)/cos(Σ δ_t h_t). Cells that cannot beat the best value seen are
    dropped, the others split in three along each axis. A flat symbol lets no cell be dropped: after
    `max_evaluations` the bracket is returned as it is.
    """
    coefficients = symbol.coefficients(np, kernel)
    shifts = np.array(list(itertools.product(*(a.shifts for a in symbol.axes))), dtype=float)
    degrees = np.array([max(a.shifts) for a in symbol.axes]) / 2.0
    half = np.pi / np.array(symbol.coarse)
    # Cells only bound anything if Σ δ h is below a quarter turn.
    counts = np.array(symbol.coarse)
    while degrees @ half >= _LARGEST_TURN:
        counts, half = counts * 2, half / 2
    axes = [2.0 * np.pi * np.arange(n) / n for n in counts]
    points = np.stack([m.ravel() for m in np.meshgrid(*axes, indexing="ij")], axis=1)
    if not np.iscomplexobj(kernel):
        # σ(−ω) = σ(ω): half the torus is enough.
        points = points[points[:, 0] <= np.pi + half[0]]

    def norms(at: np.ndarray) -> np.ndarray:
        return _norms(coefficients, symbol, shifts, at)

    values = norms(points)
    evaluated = len(points)
    best = float(values.max())
    # A bound from the first grid as a whole: by the product of the axes' cosines, not cos Σ δ h.
    whole = best / float(np.prod(np.cos(degrees * half)))
    while True:
        reach = float(np.cos(degrees @ half))
        active = values > best * reach * (1.0 + rtol)
        upper = max(best * (1.0 + rtol), float(values.max()) / reach if active.any() else 0.0)
        children = 3 ** len(half)
        if not active.any() or evaluated + active.sum() * (children - 1) > max_evaluations:
            return best, min(upper, max(whole, best))
        half = half / 3.0
        offsets = np.array(list(itertools.product((-2.0, 0.0, 2.0), repeat=len(half)))) * half
        offsets = offsets[np.any(offsets != 0, axis=1)]
        parents, kept = points[active], values[active]
        points = (parents[:, None, :] + offsets).reshape(-1, len(half))
        fresh = norms(points)
        evaluated += len(points)
        points, values = np.concatenate([parents, points]), np.concatenate([kept, fresh])
        best = max(best, float(fresh.max()))


def _norms(
    coefficients: np.ndarray, symbol: Symbol, shifts: np.ndarray, points: np.ndarray
) -> np.ndarray:
    """σ₁ of the blocks at any frequencies, the largest over groups, in double precision."""
    # In chunks, which limits the memory of phases and blocks.
    item_bytes = 16 * max(coefficients.shape[1], len(shifts))
    wide = coefficients.astype(np.complex128)

    def work(part: slice) -> np.ndarray:
        blocks = np.exp(1j * (points[part] @ shifts.T)) @ wide
        blocks = blocks.reshape(-1, symbol.sizes.groups, *symbol.block_shape)
        largest = np.linalg.eigvalsh(gram(blocks))[..., -1].max(axis=1)
        norms: np.ndarray = np.sqrt(np.maximum(largest, 0.0))
        return norms

    return np.concatenate(workers.map_chunks(work, len(points), item_bytes))
