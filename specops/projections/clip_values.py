"""`clip_singular_values`: all singular values between two bounds."""

from __future__ import annotations

import math

from specops import arrays
from specops.geometry import Conv, Geometry
from specops.geometry.arguments import integer, is_real
from specops.linalg.spectral_function import spectral_function
from specops.linalg.value_functions import between
from specops.maps.prepare import MatrixBlock, prepare
from specops.projections.kernels.clip_values import clip_kernel
from specops.projections.of_values import changed_blocks
from specops.typing import Array


@arrays.entry
def clip_singular_values(
    w: Array,
    lower: float,
    upper: float,
    geometry: Geometry | None = None,
    *,
    iterations: int = 1,
) -> Array:
    r"""``U clip(Σ, lower, upper) Vᴴ``: every singular value between two bounds.

    Dense: a nearest matrix in Frobenius norm with all min(m, n) values in the interval. Conv:
    the values are clipped on the torus and the kernel is cut back to its support, once for
    each of `iterations`, as in the paper: an approach to the bounds, *not* a projection.

    Parameters
    ----------
    w : array
        Real or complex; half precision is computed in float32 and rounded at the end.
    lower, upper : float
        0 ≤ lower ≤ upper; `upper` may be infinite.
    geometry : Dense or Conv, optional
        The map; None is ``Dense()`` for a two-dimensional array. A Conv must be circular.
    iterations : int
        Conv: rounds of clipping and cutting back.

    Returns
    -------
    array
        Of the shape, dtype, namespace and device of `w`. Up to rounding the values of a Dense
        weight are inside the bounds; those of a Conv need not be, as cutting back moves them
        out again (a norm of 2.03 clipped at 1 is 1.27 after one round, 1.004 after 50). For a
        kernel within an operator norm see `project_spectral_ball`.

    Raises
    ------
    ValueError
        Bounds out of order, negative or NaN; `iterations` below 1.
    UnsupportedGeometryError
        A Conv that is zero-padded, of no fixed size, or of a stride that does not divide its
        grid: it has no blocks whose values could be clipped.
    GeometryError, UnsupportedArrayError, NonFiniteError
        As in `specops.singular_values`.

    Notes
    -----
    Where singular values are zero and `lower` is not, the directions that are raised are
    arbitrary, as then the nearest matrix is not unique, and neither is the derivative.

    References
    ----------
    Sedghi, Gupta & Long 2019, appendix A.

    Examples
    --------
    >>> import numpy as np
    >>> clip_singular_values(np.diag([3.0, 1.0, 0.5]), 0.75, 2.0).diagonal()
    array([2.  , 1.  , 0.75])
    """
    lower, upper = _checked(lower, upper)
    iterations = integer(iterations, "iterations", least=1)
    given = prepare(w, geometry)
    if isinstance(given.geometry, Conv):
        return clip_kernel(given, w, lower, upper, iterations)
    xp = given.xp

    def change(block: MatrixBlock) -> Array:
        def function(s: Array, scale: Array) -> tuple[Array, Array]:
            # Values are scaled back before they are clipped: bounds over the scale might overflow.
            values, slopes = between(xp, s * scale, lower, upper)
            return values, slopes * scale

        clipped, _ = spectral_function(xp, block.matrices, function, block.scale[..., 0])
        return xp.astype(clipped, w.dtype)

    return changed_blocks(given, w, change)


def _checked(lower: float, upper: float) -> tuple[float, float]:
    for name, value in (("lower", lower), ("upper", upper)):
        if not is_real(value):
            raise ValueError(f"{name} must be a number, got {value!r}")
    if not 0.0 <= float(lower) <= float(upper) or math.isinf(lower):
        raise ValueError(f"bounds must satisfy 0 <= lower <= upper, got {lower} and {upper}")
    return float(lower), float(upper)
