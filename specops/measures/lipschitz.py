"""How much outputs can change with inputs: bounds from above, and what is met from below."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from specops import arrays
from specops.errors import GeometryError
from specops.geometry.arguments import check_bound, integer, non_negative
from specops.linalg.lanczos import Ritz, lanczos, random_start, safe_norm
from specops.measures.operators import JacobianOperator
from specops.measures.rows import row_norms
from specops.spectra import spectral_norm_bounds
from specops.typing import Array


class LipschitzBound(NamedTuple):
    """An upper bound of a Lipschitz constant, in the ℓ₂ norm.

    Attributes
    ----------
    log : float
        Its natural logarithm, which does not overflow; -inf for a constant function.
    factors : tuple of float
        What each layer contributes.
    """

    log: float
    factors: tuple[float, ...]

    @property
    def value(self) -> float:
        """The bound; inf where it exceeds what a float holds."""
        return math.exp(self.log) if self.log < 709.0 else math.inf


class LocalLipschitz(NamedTuple):
    """‖J‖₂ at a point, from below.

    Attributes
    ----------
    value : float
        At most ‖J‖₂, up to the rounding of the products.
    error : float
        J has a singular value at most that far from `value`.
    steps : int
        Products from each side.
    """

    value: float
    error: float
    steps: int


def lipschitz_upper_bound(layers: Sequence[Any]) -> LipschitzBound:
    r"""The product of a sequential network's factors, :math:`\prod_i\|W_i\|_2\prod_i Lip(a_i)`.

    No pair of inputs is told further apart than by this factor. It is certified and can be
    orders of magnitude too large: it assumes that the leading directions of all layers meet.

    Parameters
    ----------
    layers : sequence
        In any order: (weight, geometry) for a linear map, whose certified upper bound of the
        operator norm counts, or a number ≥ 0 for anything else: the Lipschitz constant of an
        activation (1 for ReLU, tanh and max pooling without overlap), and for batch
        normalisation in evaluation the norm of its diagonal,
        :math:`\max|\gamma|/\sqrt{var + \varepsilon}`.

    Returns
    -------
    LipschitzBound

    Raises
    ------
    ValueError
        A number that is negative or not finite; no layer.
    GeometryError, NonFiniteError
        As `specops.spectral_norm_bounds`; a stack of matrices, which has several norms.

    Notes
    -----
    Not for residual networks: a skip connection adds, ``1 + Lip(branch)``; give the sum of a
    block as one number. `specops_torch.lipschitz_upper_bound` reads a ``torch.nn.Sequential``.

    References
    ----------
    Szegedy et al. 2014, section 4.3; Yoshida & Miyato 2017.

    Examples
    --------
    >>> import numpy as np
    >>> layers = [(np.diag([3.0, 1.0]), None), 1.0, (np.diag([2.0, 0.5]), None)]
    >>> bound = lipschitz_upper_bound(layers)
    >>> round(bound.value, 6), [round(f, 6) for f in bound.factors]
    (6.0, [3.0, 1.0, 2.0])
    """
    if not layers:
        raise ValueError("layers is empty: give (weight, geometry) pairs and numbers")
    factors = tuple(_factor(index, layer) for index, layer in enumerate(layers))
    log = -math.inf if 0.0 in factors else math.fsum(math.log(f) for f in factors)
    return LipschitzBound(log, factors)


def _factor(index: int, layer: Any) -> float:
    if not isinstance(layer, tuple | list):
        return non_negative(layer, f"layers[{index}]")
    weight, geometry = layer
    upper = spectral_norm_bounds(weight, geometry).upper
    if isinstance(upper, tuple) or upper.ndim:
        raise GeometryError(
            f"layers[{index}] is a stack of matrices, with a norm for each: give the largest "
            f"as a number, or the layer that is used"
        )
    return float(upper)


def lipschitz_ratios(x: Array, y: Array, *, pairs: int = 2000, seed: int = 0) -> Array:
    r"""How far apart outputs are, relative to inputs, over pairs: an empirical Lipschitz constant.

    .. math:: \frac{\|f(x_i) - f(x_j)\|_2}{\|x_i - x_j\|_2}

    Each ratio is a lower bound of the Lipschitz constant; their histogram and its 95th
    percentile tell how the function behaves between samples, not how it can be made to behave.

    Parameters
    ----------
    x, y : array (n, ...)
        Inputs, and the outputs f(x). Axes after the first are flattened.
    pairs : int
        How many random pairs; all of them, if there are no more.
    seed : int
        Of the choice, which is the same on every backend.

    Returns
    -------
    array (pairs,)
        Fewer where inputs are equal: such pairs have no ratio.

    Raises
    ------
    ValueError
        Fewer than two samples, or different numbers of them.

    References
    ----------
    Sanyal, Torr & Dokania 2020, section 5.2.

    Examples
    --------
    >>> import numpy as np
    >>> x = np.array([[0.0], [1.0], [2.0]])
    >>> np.sort(lipschitz_ratios(x, x ** 2)).tolist()
    [1.0, 2.0, 3.0]
    """
    count = int(x.shape[0])
    if count < 2 or int(y.shape[0]) != count:
        raise ValueError(
            f"x and y must hold the same samples, two or more: got shapes {tuple(x.shape)} and "
            f"{tuple(y.shape)}"
        )
    pairs = integer(pairs, "pairs", least=1)
    first, second = _pairs(count, pairs, seed)
    xp = arrays.namespace(x)
    apart = []
    for values in (x, y):
        flat = arrays.to_compute(xp, xp.reshape(values, (count, -1)))
        parts = []
        # In slices, so that differences of many large samples need not fit at once.
        for at in range(0, len(first), _PAIRS_AT_ONCE):
            i = arrays.constant(first[at : at + _PAIRS_AT_ONCE], flat)
            j = arrays.constant(second[at : at + _PAIRS_AT_ONCE], flat)
            parts.append(row_norms(xp.take(flat, i, axis=0) - xp.take(flat, j, axis=0)))
        apart.append(xp.concat(parts))
    near, far = apart
    kept = np.flatnonzero(arrays.to_numpy(near) != 0)  # NaN stays to be seen
    chosen = arrays.constant(kept, near)
    return xp.take(far, chosen) / xp.take(near, chosen)


_PAIRS_AT_ONCE = 256
"""Pairs whose differences are held at once: a choice of memory, 256 samples' worth."""


def _pairs(count: int, pairs: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    total = count * (count - 1) // 2
    if pairs >= total:
        i, j = np.triu_indices(count, 1)
        return i, j
    rng = np.random.Generator(np.random.Philox(key=[seed, count]))
    first = rng.integers(0, count, pairs)
    second = (first + rng.integers(1, count, pairs)) % count
    return first, second


def local_lipschitz(
    jacobian: JacobianOperator, *, tolerance: float = 1e-3, max_steps: int = 64, seed: int = 0
) -> LocalLipschitz:
    r"""The norm of a function's Jacobian at a point, :math:`\|J_f(x)\|_2`, by Lanczos.

    How much the function stretches the worst small change of this input. A lower bound of the
    Lipschitz constant, never a certificate: other points, and even this one, may be worse.

    Parameters
    ----------
    jacobian : JacobianOperator
        From ``jacobian_operator`` of an adapter, or a matrix as such an operator.
    tolerance : float
        Stop when the error is below tolerance · value.
    max_steps : int
        Products with JᵀJ (or JJᵀ, the smaller one) at the most.
    seed : int
        Of the start, which is the same on every backend.

    Returns
    -------
    LocalLipschitz

    Raises
    ------
    ValueError
        A tolerance that is not positive, fewer than one step.
    NonFiniteError
        A product holds NaN or infinity.

    References
    ----------
    Golub & Kahan 1965. Sanyal, Torr & Dokania 2020, section 5.2.
    """
    tolerance = check_bound(tolerance, "tolerance")
    max_steps = integer(max_steps, "max_steps", least=1)
    rows, columns = jacobian.shape

    wide = rows < columns
    first: Any = jacobian.rmatvec if wide else jacobian.matvec
    second: Any = jacobian.matvec if wide else jacobian.rmatvec
    start = random_start(min(rows, columns), jacobian.like, seed)
    # JᵀJ squares the scale, which may leave the range of single precision.
    scale = float(safe_norm(first(start / safe_norm(start))))
    scale = scale if 0.0 < scale < math.inf else 1.0

    def gram(x: Array) -> Array:
        return second(first(x) / scale) / scale

    def settled(found: Ritz) -> bool:
        # |σ² − θ| ≤ r means |σ − √θ| ≤ r/√θ.
        return bool(found.residuals[-1] <= tolerance * found.values[-1])

    found = lanczos(gram, start, steps=max_steps, settled=settled)
    squared = max(float(found.values[-1]), 0.0)
    value, residual = math.sqrt(squared), float(found.residuals[-1])
    error = residual / value if value > 0 else math.sqrt(residual)
    return LocalLipschitz(value * scale, error * scale, len(found.values))
