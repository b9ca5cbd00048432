"""One round of clipping a convolution's singular values and cutting the kernel back."""

from __future__ import annotations

from typing import Any

import numpy as np

from specops import arrays
from specops.errors import UnsupportedGeometryError
from specops.geometry import Conv, ConvSizes
from specops.geometry.arguments import nan_without
from specops.maps.prepare import prepare
from specops.maps.symbol import symbol_of
from specops.maps.unread import with_unread
from specops.projections.kernels.first_order import alternate, largest
from specops.projections.kernels.support import Support
from specops.typing import Array


@arrays.entry
def clip_and_cut(w: Array, max_norm: Any, geometry: Conv) -> tuple[Array, Array, Array]:
    """(the kernel after one round, its norm before, its norm as stored) on the input's torus.

    It is `w` itself if no singular value is above `max_norm`. Cutting back raises singular values
    again, so that the result usually is outside the ball.
    """
    given = prepare(w, geometry)
    sizes = geometry.sizes(tuple(w.shape))
    if sizes.fine is None:
        raise UnsupportedGeometryError(
            f"{geometry.describe()} has no torus on which singular values could be clipped: name "
            f"its input_shape. project_spectral_ball bounds the norm for every size"
        )
    known = arrays.is_concrete(w) and (isinstance(max_norm, float) or arrays.is_concrete(max_norm))
    xp = np if known else given.xp

    def seen(x: Array) -> Array:
        # On the host, also for kernels on devices: their blocks are many small matrices.
        return arrays.to_numpy(x) if known else x

    def back(x: Array) -> Array:
        return arrays.like(x, given.w) if known else x

    def size(x: Array) -> Array:
        return (arrays.constant(np.asarray(x), given.w) if known else x) * given.scale

    kernel = geometry.kernel(seen(given.w))
    limit = seen(max_norm / given.scale)
    symbol = symbol_of(sizes, _torus_of_input(geometry, sizes), not arrays.is_complex(kernel))
    support = Support(symbol)
    x0 = support.coordinates(xp, kernel)
    before = largest(xp, support, arrays.stop_gradient(x0))
    norm_before = size(before)
    if arrays.truth(before <= limit):
        return w, norm_before, norm_before
    result = support.kernel(xp, alternate(xp, support, x0, limit))
    unseen = support.unseen(xp, kernel)
    if unseen is not None:
        result = result + unseen
    untouched = (before <= limit) | ~arrays.all_finite(xp, kernel)
    result = back(geometry.weight(xp.where(untouched, kernel, result))) * given.scale
    stored = nan_without(max_norm, with_unread(given.xp.astype(result, w.dtype), w, geometry))
    now = seen(arrays.to_compute(given.xp, stored) / given.scale)
    after = largest(xp, support, support.coordinates(xp, geometry.kernel(now)))
    return stored, norm_before, size(after)


def _torus_of_input(geometry: Conv, sizes: ConvSizes) -> tuple[int, ...]:
    """The fine grid of the same layer with a circular boundary, rounded up to its strides."""
    assert sizes.fine is not None
    assert sizes.coarse is not None
    grids = zip(sizes.fine, sizes.coarse, sizes.stride, strict=True)
    return tuple(m * s if geometry.transposed else -(-n // s) * s for n, m, s in grids)
