"""The variance of a weight's entries, normalised or not, and what bounds it."""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

from specops import arrays
from specops.errors import GeometryError
from specops.geometry import Conv, ConvSizes, Dense, Geometry, resolve_geometry
from specops.geometry.arguments import check_bound
from specops.maps.prepare import prepare
from specops.rules.base import measured_as
from specops.spectra import spectral_norm
from specops.tracking import check_norm
from specops.typing import Array


class ParameterVariance(NamedTuple):
    """The variance of s·W/σ.

    Attributes
    ----------
    measured : float
        The variance over the entries.
    bound : float
        An upper bound of it, up to rounding; inf if none is known.
    """

    measured: float
    bound: float


def parameter_variance(
    w: Array,
    geometry: Geometry | None = None,
    *,
    norm: Literal["reshaped", "bidirectional", "operator"] | None,
    scale: float = 1.0,
) -> ParameterVariance:
    r"""The variance of a spectrally normalised weight's entries beside its bound.

    For a matrix m×n divided by its norm the variance is at most :math:`1/\max(m, n)`, which is
    that of common initialisations; a kernel with k taps divided by the mean of the norms of
    both ways to reshape it, at most :math:`4/(k(\sqrt{c_{in}} + \sqrt{c_{out}})^2)`; one divided
    by its operator's norm, at most the operator's rank over the entries of the kernel and the
    outputs of the tap that fewest read, on a large grid :math:`1/(k\max(c_{in}, c_{out}))` at
    stride 1. If layers are normalised in the forward pass, much lower variances indicate
    vanishing gradients.

    Parameters
    ----------
    w : array
        The weight, before it is normalised.
    geometry : Dense or Conv, optional
        One matrix, or a convolution. None: ``Dense()``, for 2-D arrays.
    norm : "reshaped", "bidirectional", "operator" or None
        The norm that the weight is divided by; for a `Dense` weight all three are the same. None
        divides by nothing, as without spectral normalisation.
    scale : float
        The factor s of the normalised weight (SSN, BSSN); the variance and its bound have s².

    Returns
    -------
    ParameterVariance

    Raises
    ------
    ValueError
        `norm` is unknown, the weight has norm zero, or the scale is not positive and finite.
    GeometryError, UnsupportedArrayError, NonFiniteError
        As in `specops.spectral_norm`; also for stacks and fused blocks, and for the operator's
        norm of a `Conv` without ``input_shape``.

    Notes
    -----
    Theorem 3 of the paper states 2/(c_in·k + c_out·k) for the second, which does not hold
    where c_in and c_out differ much: for (1, 100) and 10×10 taps it is exceeded 1.41 times. The
    bounds here follow from ‖A‖_F ≤ √rank·‖A‖ for the matrices that are meant. Taps that nothing
    reads, or that wrap onto each other, are not bounded by an operator's norm.

    References
    ----------
    Lin, Sekar & Fanti 2021, Theorems 2 and 3, and figures 7, 16 and 22 (normalised, not
    normalised and scaled).

    Examples
    --------
    >>> import numpy as np
    >>> found = parameter_variance(np.array([[3.0, 3.0], [3.0, -3.0]]), norm="reshaped")
    >>> round(found.measured, 6), found.bound
    (0.375, 0.5)
    """
    if norm is not None:
        check_norm(norm)
    scale = float(check_bound(scale, "scale"))
    xp = arrays.namespace(w)
    geometry = resolve_geometry(w.ndim, geometry)
    if isinstance(geometry, Dense) and (geometry.batch_axes or geometry.splits is not None):
        raise GeometryError("a stack of matrices has several norms: give each matrix by itself")
    if norm is None:
        given = prepare(w, geometry, scaled=False)
        arrays.check_finite(given.xp, given.w)
    sigma, bound = (1.0, math.inf) if norm is None else _norm_and_bound(w, geometry, norm)
    if sigma == 0.0:
        raise ValueError("the weight is zero: divided by its norm it is not defined")
    # Scaled, because squares of small and large entries leave the range of single precision.
    a = arrays.to_compute(xp, w)
    unit = arrays.magnitude(xp, a)
    a = a / unit
    centred = xp.abs(a - xp.mean(a)) ** 2
    factor = arrays.number(xp.max(unit)) / sigma * scale
    return ParameterVariance(
        arrays.number(xp.mean(centred)) * factor * factor, bound * scale * scale
    )


def _norm_and_bound(w: Array, geometry: Geometry, norm: str) -> tuple[float, float]:
    """(σ, the bound of the variance of W/σ)."""
    if norm == "operator" and isinstance(geometry, Conv):
        return _norm(w, geometry), _operator_bound(geometry.sizes(tuple(w.shape)))
    first = measured_as(geometry, "reshaped")
    assert isinstance(first, Dense)
    ((rows, columns),) = first.matrix_shapes(tuple(w.shape))
    sigma = _norm(w, first)
    if norm != "bidirectional" or isinstance(geometry, Dense):
        return sigma, 1.0 / max(rows, columns)
    second = Dense(out_axes=(geometry.channel_axes[1],))
    inputs = int(w.shape[geometry.channel_axes[1]])
    taps = columns // inputs
    both = 0.5 * (sigma + _norm(w, second))
    return both, 4.0 / (taps * (math.sqrt(inputs) + math.sqrt(rows)) ** 2)


def _operator_bound(sizes: ConvSizes) -> float:
    """rank/(entries·min uses), because min uses·‖K‖_F² ≤ Σ_a uses_a·‖K_a‖² = ‖T‖_F² ≤ rank·σ²."""
    assert sizes.fine is not None
    least = 0 if sizes.wraps else math.prod(map(min, sizes.uses))
    entries = sizes.groups * sizes.rows * sizes.columns * math.prod(sizes.kernel)
    return min(sizes.matrix_shape()) / (entries * least) if least else math.inf


def _norm(w: Array, geometry: Geometry) -> float:
    return arrays.number(spectral_norm(w, geometry))
