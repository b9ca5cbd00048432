"""Equal norms along a chain of layers, without changing the function."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from specops import arrays
from specops.errors import GeometryError, NonFiniteError
from specops.geometry import Dense, Geometry
from specops.linalg.logarithms import exp
from specops.spectra import spectral_norm
from specops.typing import Array


class Balanced(NamedTuple):
    """What `balance_norms` returns.

    Attributes
    ----------
    weights : list of array
    biases : list of array or None
    factors : list of float
        The factor of each weight; their product is 1.
    """

    weights: list[Array]
    biases: list[Array | None]
    factors: list[float]


@arrays.entry
def balance_norms(
    weights: Sequence[Array],
    geometries: Sequence[Geometry | None] | None = None,
    biases: Sequence[Array | None] | None = None,
) -> Balanced:
    r"""Rescale the layers of a ReLU chain to equal operator norms; its function stays the same.

    .. math:: W_i \to c_i W_i, \qquad b_i \to \Bigl(\prod_{j\le i} c_j\Bigr) b_i, \qquad
              c_i = \frac{\lambda}{\|W_i\|_2}, \qquad \lambda = \prod_i \|W_i\|_2^{1/L}.

    Since ∏ c = 1 and activations between the layers are positively homogeneous, outputs and
    their derivatives by the input are unchanged. Among all such rescalings this one has the
    least gradient norm with respect to the weights, if gradient norms of layers are inverse to
    their spectral norms.

    Parameters
    ----------
    weights : sequence of array
        The weights in the order in which they are applied. The activations between them must
        satisfy a(t·x) = t·a(x) for t > 0, as ReLU, leaky ReLU, max and average pooling do, and
        tanh and normalisation layers do not.
    geometries : sequence of Dense or Conv, optional
        The geometry of each weight; None is ``Dense()``. Stacks and fused blocks have several
        norms and are refused.
    biases : sequence of array or None, optional
        The bias of each layer; None for a layer without one.

    Returns
    -------
    Balanced
        New arrays of the same kinds.

    Raises
    ------
    ValueError
        Sequences of different lengths, or a weight of norm zero.
    GeometryError, UnsupportedArrayError, NonFiniteError
        As in `specops.spectral_norm`.

    References
    ----------
    Lin, Sekar & Fanti 2021, Proposition 2 and Theorem 1.

    Examples
    --------
    >>> import numpy as np
    >>> done = balance_norms([np.diag([8.0, 1.0]), np.array([[0.5, 0.0]])])
    >>> [round(float(np.linalg.norm(w, 2)), 6) for w in done.weights]
    [2.0, 2.0]
    """
    count = len(weights)
    geometries = [None] * count if geometries is None else list(geometries)
    biases = [None] * count if biases is None else list(biases)
    if not count or len(geometries) != count or len(biases) != count:
        raise ValueError(
            f"weights, geometries and biases must be as many, at least one: got {count}, "
            f"{len(geometries)} and {len(biases)}"
        )
    logs = [
        math.log(_norm(i, w, g)) for i, (w, g) in enumerate(zip(weights, geometries, strict=True))
    ]
    mean = math.fsum(logs) / count
    factors = [exp(mean - log) for log in logs]
    new_weights, new_biases, product = [], [], 0.0
    for w, b, log in zip(weights, biases, logs, strict=True):
        product += mean - log
        new_weights.append(_times(w, mean - log))
        new_biases.append(None if b is None else _times(b, product))
    return Balanced(new_weights, new_biases, factors)


def _norm(index: int, w: Array, geometry: Geometry | None) -> float:
    if isinstance(geometry, Dense) and (geometry.batch_axes or geometry.splits):
        raise GeometryError(
            f"weights[{index}] is {geometry.describe()}, which has several norms: balance its "
            f"matrices one by one"
        )
    measured: Any = spectral_norm(w, geometry)
    norm = arrays.number(measured)
    if not math.isfinite(norm):
        raise NonFiniteError(f"weights[{index}] has no finite norm")
    if norm == 0.0:
        raise ValueError(f"weights[{index}] is zero: no factor can change its norm")
    return norm


def _times(x: Array, log: float) -> Array:
    """x·e^log, in two steps: the factor may overflow although the product does not."""
    xp, half = arrays.namespace(x), exp(0.5 * log)
    return xp.astype(arrays.to_compute(xp, x) * half * half, x.dtype)
