"""Kernels of fixed support whose convolution has operator norm at most c."""

from __future__ import annotations

from typing import Any

import numpy as np

from specops import backend
from specops.geometry import Conv
from specops.linalg.clip import GRAM_RANGE, clip
from specops.linalg.decompositions import svdvals
from specops.projections.feasible import ProjectionInfo, store_within
from specops.spectra.prepare import Prepared
from specops.symbol import Symbol, certified_symbol

Array = Any
_ROUNDS = 30
_ROUNDS_WHEN_TRACED = 5
_CLOSE_ENOUGH = 1e-2
"""Excess at which the alternation stops and the final rescaling takes over."""


def project_kernel(given: Prepared, w: Array, max_norm: float) -> tuple[Array, ProjectionInfo]:
    """Alternate the two projections of Sedghi et al., then rescale onto the ball."""
    xp, geometry = given.xp, given.geometry
    assert isinstance(geometry, Conv)
    symbol, certificate = certified_symbol(
        geometry.sizes(tuple(w.shape)), not backend.is_complex(given.w)
    )
    limit = max_norm * certificate / given.scale

    def norms(coefficients: Array) -> Array:
        return svdvals(xp, symbol.blocks(xp, coefficients))[..., 0]

    original = symbol.coefficients(xp, geometry.kernel(given.w))
    by_frequency = norms(original)
    before = xp.max(by_frequency)
    if backend.truth(before <= limit):
        norm = before * given.scale / certificate
        return w, ProjectionInfo(norm, norm, 0)

    # Rounding must not decide which side of the limit the result lands on.
    target = limit * (1.0 - 4.0 * backend.epsilon(given.w.dtype))
    coefficients, rounds = original, 0
    while True:
        above = backend.truth(xp.max(by_frequency) > target * (1.0 + _CLOSE_ENOUGH))
        if above is False or rounds == (_ROUNDS_WHEN_TRACED if above is None else _ROUNDS):
            break
        coefficients = _clip_round(xp, symbol, coefficients, target, by_frequency, above is None)
        by_frequency = norms(coefficients)
        rounds += 1
    largest = xp.max(by_frequency)
    shrink = xp.where(largest > target, target / xp.where(largest > 0, largest, 1.0), 1.0)
    coefficients = coefficients * shrink
    if symbol.folds:
        kernel = geometry.kernel(given.w) - symbol.kernel(xp, original - coefficients)
    else:
        kernel = symbol.kernel(xp, coefficients)
    finite = backend.all_finite(xp, given.w)
    kernel = xp.where(finite, kernel, geometry.kernel(given.w)) * given.scale

    def measure(stored: Array) -> Array:
        scaled = symbol.coefficients(xp, geometry.kernel(stored) / given.scale)
        return xp.max(norms(scaled)) * given.scale / certificate

    bound = max_norm * xp.ones_like(largest)
    result, after = store_within(xp, geometry.weight(kernel), w.dtype, bound, measure)
    return result, ProjectionInfo(before * given.scale / certificate, after, max(rounds, 1))


def _clip_round(
    xp: Any,
    symbol: Symbol,
    coefficients: Array,
    limit: Array,
    by_frequency: Array,
    traced: bool,
) -> Array:
    """Clip the singular values of every block above the limit, cut back to the support."""
    chosen = np.arange(len(symbol.frequencies))
    norms = None if traced else by_frequency
    near = backend.truth(xp.max(by_frequency) <= GRAM_RANGE * limit)
    if near and not backend.compiles_per_shape(xp):
        chosen = np.flatnonzero(backend.to_numpy(xp.any(by_frequency > limit, axis=-1)))
        norms = xp.take(by_frequency, backend.constant(chosen, by_frequency), axis=0)
    blocks = symbol.blocks(xp, coefficients, chosen)
    clipped = clip(xp, blocks, xp.broadcast_to(limit, blocks.shape[:-2]), norms)
    if len(chosen) == len(symbol.frequencies):
        return symbol.average(xp, clipped, chosen)
    return coefficients - symbol.average(xp, blocks - clipped, chosen)
