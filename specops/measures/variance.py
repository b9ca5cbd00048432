"""The variance of a normalised weight's entries, and what bounds it."""

from __future__ import annotations

import math
from typing import Any, Literal, NamedTuple

from specops import arrays
from specops.errors import GeometryError
from specops.geometry import Conv, Dense, Geometry
from specops.rules.base import measured_as
from specops.spectra import spectral_norm
from specops.tracking import check_norm
from specops.typing import Array


class ParameterVariance(NamedTuple):
    """The variance of W/σ.

    Attributes
    ----------
    measured : float
        Over the entries.
    bound : float
        What it never exceeds, but for rounding.
    """

    measured: float
    bound: float


def parameter_variance(
    w: Array, geometry: Geometry | None = None, *, norm: Literal["reshaped", "bidirectional"]
) -> ParameterVariance:
    r"""The variance of a spectrally normalised weight's entries beside its bound.

    For a matrix m×n divided by its norm the variance is at most :math:`1/\max(m, n)`, which is
    that of common initialisations; a kernel with k taps divided by the mean of the norms of
    both ways to reshape it, at most :math:`4/(k(\sqrt{c_{in}} + \sqrt{c_{out}})^2)`. Much lower
    figures tell of vanishing gradients where layers are normalised in the forward pass.

    Parameters
    ----------
    w : array
        The weight, before it is normalised.
    geometry : Dense or Conv, optional
        One matrix, or a convolution. None: ``Dense()``, for 2-D arrays.
    norm : "reshaped" or "bidirectional"
        What it is divided by; for a `Dense` weight both are its norm.

    Returns
    -------
    ParameterVariance

    Raises
    ------
    ValueError
        Another norm; a weight of norm zero.
    GeometryError, UnsupportedArrayError, NonFiniteError
        As `specops.spectral_norm`; stacks and fused blocks.

    Notes
    -----
    Theorem 3 of the paper states 2/(c_in·k + c_out·k) for the second, which does not hold
    where c_in and c_out differ much: for (1, 100) and 10×10 taps it is exceeded 1.41 times. The
    bound here follows from ‖W‖_F ≤ √rank·‖Ŵ‖ for both matrices.

    References
    ----------
    Lin, Sekar & Fanti 2021, Theorems 2 and 3.

    Examples
    --------
    >>> import numpy as np
    >>> found = parameter_variance(np.array([[3.0, 3.0], [3.0, -3.0]]), norm="reshaped")
    >>> round(found.measured, 6), found.bound
    (0.375, 0.5)
    """
    check_norm(norm, ("reshaped", "bidirectional"))
    geometry = Dense() if geometry is None else geometry
    if isinstance(geometry, Dense) and (geometry.batch_axes or geometry.splits is not None):
        raise GeometryError("a stack of matrices has several norms: give each matrix by itself")
    first = measured_as(geometry, "reshaped")
    assert isinstance(first, Dense)
    rows, columns = first.blocks(w)[0].shape
    sigma = _norm(w, first)
    bound = 1.0 / max(rows, columns)
    if norm == "bidirectional" and isinstance(geometry, Conv):
        second = Dense(out_axes=(geometry.channel_axes[1],))
        inputs = int(w.shape[geometry.channel_axes[1]])
        taps = columns // inputs
        sigma = 0.5 * (sigma + _norm(w, second))
        bound = 4.0 / (taps * (math.sqrt(inputs) + math.sqrt(rows)) ** 2)
    if sigma == 0.0:
        raise ValueError("the weight is zero: divided by its norm it is not defined")
    xp = arrays.namespace(w)
    scaled = arrays.to_compute(xp, w) / sigma
    centred = xp.abs(scaled - xp.mean(scaled)) ** 2
    return ParameterVariance(float(xp.mean(centred)), bound)


def _norm(w: Array, geometry: Dense) -> float:
    norm: Any = spectral_norm(w, geometry)
    return float(norm)
