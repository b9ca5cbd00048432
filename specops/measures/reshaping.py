"""By how much the norm of a convolution can exceed that of its reshaped kernel."""

from __future__ import annotations

import math

import numpy as np

from specops.errors import GeometryError
from specops.geometry import Conv
from specops.typing import Array


def tsuzuku_alpha(w: Array, geometry: Conv) -> float:
    r"""α in :math:`\|T\|_2 \le \alpha\,\|\hat W\|_2`, T the operator and Ŵ the reshaped kernel.

    .. math:: \alpha^2 = \max_p\,|\{(q, a): \text{output } q \text{ reads input } p
              \text{ by tap } a\}|

    At a stride s and a dilation d α² is at most :math:`\prod\lceil k/s'\rceil` over the axes,
    s' = s / gcd(s, d), and exactly that where the grid has room; for a transposed convolution,
    and a circular one whose stride does not divide its grid, at most the number of taps. Where
    the input holds one full receptive field, and for one group, :math:`\|\hat W\|_2\le\|T\|_2`
    as well, so that 1 and α enclose the ratio of both.

    Parameters
    ----------
    w : array
        The kernel, of which only the shape counts.
    geometry : Conv
        With or without an ``input_shape``; without one, of every size.

    Returns
    -------
    float

    Raises
    ------
    GeometryError
        The geometry is not a `Conv`, or does not fit the array.

    References
    ----------
    Tsuzuku, Sato & Sugiyama 2018, Corollary 1; Lin, Sekar & Fanti 2021, section 4 and figure 20.

    Examples
    --------
    >>> import numpy as np
    >>> tsuzuku_alpha(np.ones((8, 4, 3, 3)), Conv((32, 32), stride=2))
    2.0
    """
    if not isinstance(geometry, Conv):
        raise GeometryError(f"a reshaped kernel is that of a Conv, got {geometry!r}")
    sizes = geometry.sizes(tuple(w.shape))
    most = 1
    for t, (k, s, d) in enumerate(zip(sizes.kernel, sizes.stride, sizes.dilation, strict=True)):
        if sizes.fine is None:
            # Without a size, grids that the stride does not divide count, too; on circular ones
            # all taps may read the same input.
            all_meet = geometry.transposed or (sizes.circular and s > 1)
            most *= k if all_meet else -(-k * math.gcd(s, d) // s)
            continue
        assert sizes.coarse is not None
        assert sizes.lower is not None
        reads = s * np.arange(sizes.coarse[t])[:, None] + d * np.arange(k) - sizes.lower[t]
        inside = np.full(reads.shape, True)
        if sizes.circular:
            reads = reads % sizes.fine[t]
        else:
            inside = (reads >= 0) & (reads < sizes.fine[t])
        counts = inside.sum(axis=1) if geometry.transposed else np.bincount(reads[inside])
        most *= int(counts.max(initial=0))
    return math.sqrt(most)
