"""`spectral_norm_bounds`: an interval that holds the operator norm."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from specops import arrays
from specops.geometry import Conv, ConvSizes, Dense, Geometry
from specops.geometry.arguments import check_bound, integer
from specops.linalg.gram_iteration import enclosure
from specops.linalg.lobpcg import leading_triplets
from specops.maps.every_size import certified_symbol
from specops.maps.matrix import MatrixOperator
from specops.maps.prepare import Prepared, matrix_blocks, prepare
from specops.maps.symbol import symbol_of
from specops.spectra.norms import lanczos_norm, matrix_norms, torus_norm
from specops.spectra.start import checked_start
from specops.spectra.supremum import supremum
from specops.typing import Array, Namespace

_LARGER_TORI = 8
"""How many larger tori are tried after the smallest, each larger by a stride: a choice of time
against a tighter upper bound. The smallest alone typically leaves brackets of 0.2 to 0.8 %."""


@arrays.record()
@dataclass(frozen=True)
class NormBounds:
    """``lower ≤ true norm ≤ upper``; with ``Dense(splits=...)`` each is a tuple.

    Attributes
    ----------
    lower, upper : array
        Real, of shape (\\*batch,).
    """

    lower: Array
    upper: Array


@arrays.entry
def spectral_norm_bounds(
    w: Array,
    geometry: Geometry | None = None,
    *,
    rtol: float | None = None,
    max_evaluations: int = 20_000,
    start: Array | None = None,
) -> NormBounds:
    r"""Enclose the operator norm :math:`\sigma_1` of the map that `w` stands for.

    Dense and circular Conv: the computed norm, widened by the rounding of its solver. Zero
    boundary, or a circular stride that does not divide the grid: from below Lanczos on the
    operator, from above the norm on a torus that contains it. ``Conv(None)``: the supremum
    over every size, between the largest value on a grid of frequencies and that value divided
    by the grid's cosine certificate :math:`\prod_t\cos\frac{\pi(k_t-1)}{2N_t}`, or by branch and
    bound.

    Parameters
    ----------
    w : array
        Real or complex.
    geometry : Dense or Conv, optional
        The map; None is ``Dense()`` for a two-dimensional array.
    rtol : float, optional
        Tighten until ``upper <= (1 + rtol)·lower``, if that can be had: for ``Conv(None)`` by
        branch and bound over the frequencies, for a zero boundary by the least norm among
        larger tori. Concrete arrays only; runs on the CPU.
    max_evaluations : int
        How many blocks branch and bound may solve. Where the norm hardly changes with the
        frequency it can rule none of them out.
    start : array, shape (inputs, p), optional
        Dense, two-dimensional: approximate right singular vectors (of a similar weight). The
        bracket then comes from one round of subspace iteration and a certified remainder
        instead of a decomposition.

    Returns
    -------
    NormBounds

    Raises
    ------
    ValueError
        `rtol` is not positive, `max_evaluations` no whole number or below 0, or `start` of the
        wrong shape, complex for a real weight, or given for anything but a single matrix.
    GeometryError, UnsupportedGeometryError, UnsupportedArrayError, NonFiniteError
        As in `singular_values`.

    Notes
    -----
    The allowance for rounding is an estimate, not a proof by interval arithmetic. It is the sum of
    the backward error of the solvers (as many units in the last place of the norm as the
    decomposed blocks have rows and columns), four units for each tap of a kernel, and what taps
    that wrap onto each other lose where they cancel.

    Examples
    --------
    >>> import numpy as np
    >>> bounds = spectral_norm_bounds(np.ones((1, 1, 3, 3)), Conv(None), rtol=1e-6)
    >>> bool(bounds.lower <= 9.0 <= bounds.upper <= 9.0001)
    True
    """
    if rtol is not None:
        rtol = check_bound(rtol, "rtol")
    max_evaluations = integer(max_evaluations, "max_evaluations", least=0)
    given = prepare(w, geometry, once=True)
    single = isinstance(given.geometry, Dense) and given.geometry.splits is None and w.ndim == 2
    if start is not None and not single:
        raise ValueError("start needs a single matrix: no Conv, stack or splits")
    if isinstance(given.geometry, Dense):
        return _dense_bounds(given, given.geometry, start)
    return _conv_bounds(given, given.geometry, rtol, max_evaluations)


@arrays.entry
def norm_from_above(w: Array, geometry: Geometry | None = None) -> Array:
    """The upper end of `spectral_norm_bounds`, without the Lanczos run for the lower end."""
    given = prepare(w, geometry, once=True)
    if isinstance(given.geometry, Dense):
        return _dense_bounds(given, given.geometry, None).upper
    return _conv_bounds(given, given.geometry, None, 0, enclosed=False).upper


def _dense_bounds(given: Prepared, geometry: Dense, start: Array | None) -> NormBounds:
    xp = given.xp
    pairs = []
    for block in matrix_blocks(given):
        matrices = block.matrices
        if start is not None:
            v = checked_start(xp, start, int(matrices.shape[1]), 1, matrices)
            width = min(v.shape[1], *matrices.shape)
            operator = MatrixOperator(matrices)
            *_, v = leading_triplets(xp, operator, v[:, :width], 1, iterations=2)
            pair = tuple(block.restore(b[..., None])[..., 0] for b in enclosure(xp, matrices, v))
        else:
            norm = block.restore(matrix_norms(xp, matrices)[..., None])[..., 0]
            slack = _slack(matrices.dtype, sum(matrices.shape[-2:]))
            pair = (norm * (1.0 - slack), norm * (1.0 + slack))
        pairs.append(pair)
    if geometry.splits is None:
        return NormBounds(*pairs[0])
    return NormBounds(tuple(p[0] for p in pairs), tuple(p[1] for p in pairs))


def _conv_bounds(
    given: Prepared,
    geometry: Conv,
    rtol: float | None,
    max_evaluations: int,
    *,
    enclosed: bool = True,
) -> NormBounds:
    """Both ends of the interval; without `enclosed` only the upper one is certain."""
    xp = given.xp
    kernel = geometry.kernel(given.w)
    sizes = geometry.sizes(tuple(given.w.shape))
    symbol, certificate = certified_symbol(sizes, not arrays.is_complex(kernel))
    slack = _slack(kernel.dtype, sum(symbol.block_shape) + 4 * math.prod(sizes.kernel) + 16)

    def widened(lower: Array, upper: Array) -> NormBounds:
        """The interval, widened by the possible rounding."""
        lower, upper = lower * (1.0 - slack), upper * (1.0 + slack)
        if sizes.wraps:
            # Taps that wrap onto each other are summed. Where they cancel, the rounding of the sum
            # may be large beside the norm that is left, so it is bounded by the kernel's own size.
            count = math.prod(sizes.kernel)
            more = _slack(kernel.dtype, count) * xp.sqrt(count * xp.sum(xp.abs(kernel) ** 2))
            lower, upper = lower - more, upper + more
            lower = xp.where(lower > 0, lower, xp.zeros_like(lower))
        return NormBounds(given.scale * lower, given.scale * upper)

    if sizes.fine is None and rtol is not None:
        ends = supremum(arrays.to_numpy(kernel), symbol, rtol, max_evaluations)
        lower, upper = (arrays.constant(np.asarray(end), kernel) for end in ends)
        return widened(lower, upper)
    on_grid = torus_norm(xp, kernel, symbol)
    lower, upper = on_grid, on_grid / certificate
    exact = sizes.fine is None or (sizes.circular and symbol.coarse == sizes.coarse)
    if enclosed and not exact:
        lower = lanczos_norm(xp, kernel, sizes)
        if rtol is not None and not sizes.circular:
            upper = _least_torus(xp, kernel, sizes, lower, upper, rtol)
        lower = xp.where(lower < upper, lower, upper)
    return widened(lower, upper)


def _least_torus(
    xp: Namespace, kernel: Array, sizes: ConvSizes, lower: Array, upper: Array, rtol: float
) -> Array:
    """The smallest norm among tori that contain the operator, until it is close enough."""
    torus = sizes.enclosing_torus()
    for _ in range(_LARGER_TORI):
        if arrays.truth(upper <= (1.0 + rtol) * lower):
            break
        torus = tuple(n + s for n, s in zip(torus, sizes.stride, strict=True))
        norm = torus_norm(xp, kernel, symbol_of(sizes, torus, not arrays.is_complex(kernel)))
        upper = xp.where(norm < upper, norm, upper)
    return upper


def _slack(dtype: Any, dimension: int) -> float:
    return float(arrays.epsilon(dtype)) * dimension
