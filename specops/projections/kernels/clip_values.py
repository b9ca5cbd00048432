"""Kernels of circular convolutions with the singular values of their blocks between two bounds."""

from __future__ import annotations

from typing import Any

import numpy as np

from specops import arrays
from specops.errors import UnsupportedGeometryError
from specops.geometry import Conv
from specops.linalg.spectral_function import spectral_function
from specops.linalg.value_functions import between
from specops.maps.prepare import Prepared
from specops.maps.symbol import symbol_of
from specops.projections.kernels.support import Support
from specops.spectra.torus import map_blocks
from specops.typing import Array, Namespace


def clip_kernel(given: Prepared, w: Array, lower: float, upper: float, iterations: int) -> Array:
    """The weight after some rounds of clipping its blocks and cutting back to its support."""
    xp, geometry = given.xp, given.geometry
    assert isinstance(geometry, Conv)
    if not geometry.has_exact_spectrum(tuple(w.shape)):
        raise UnsupportedGeometryError(
            "only a circular convolution whose stride divides its grid has blocks whose singular "
            "values can be clipped: project_spectral_ball bounds the norm of every convolution"
        )
    sizes = geometry.sizes(tuple(w.shape))
    assert sizes.fine is not None
    on_host = arrays.on_host(given.w)
    if on_host is not None:
        xp = np
    kernel = geometry.kernel(given.w if on_host is None else on_host)
    support = Support(symbol_of(sizes, sizes.fine, not arrays.is_complex(kernel)))
    x = support.coordinates(xp, kernel)
    low, high = (bound / given.scale for bound in (lower, upper))
    if on_host is not None:
        low, high = (arrays.number(bound) for bound in (low, high))
    for _ in range(iterations):
        x = _round(xp, support, x, low, high)
    # Not as the kernel plus a difference, which would cancel far outside of the bounds.
    result, unseen = support.kernel(xp, x), support.unseen(xp, kernel)
    result = geometry.weight(result if unseen is None else result + unseen)
    if on_host is not None:
        result = arrays.from_host(np.ascontiguousarray(result), given.w)
    return given.xp.astype(result * given.scale, w.dtype)


def _round(xp: Namespace, support: Support, x: Array, lower: Any, upper: Any) -> Array:
    """Clip every block, cut back to the support."""
    symbol, coefficients = support.symbol, support.coefficients(xp, x)

    def work(blocks: Array, chunk: slice) -> Array:
        clipped, _ = spectral_function(xp, blocks, lambda s: between(xp, s, lower, upper))
        return support.gather(xp, clipped, chunk)

    parts = map_blocks(xp, symbol, coefficients, work)
    return support.per_tap(xp, sum(parts[1:], start=parts[0]))
