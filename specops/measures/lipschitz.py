"""How much outputs can change with inputs: certified upper bounds, and lower bounds at points."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from specops import arrays
from specops.errors import GeometryError
from specops.geometry.arguments import check_bound, integer, non_negative
from specops.linalg.lanczos import Ritz, lanczos, random_start, safe_norm
from specops.linalg.logarithms import exp
from specops.measures.operators import JacobianOperator
from specops.spectra.bounds import norm_from_above
from specops.typing import Array


class LipschitzBound(NamedTuple):
    """An upper bound of a Lipschitz constant, in the ℓ₂ norm.

    Attributes
    ----------
    log : float
        Its natural logarithm, which does not overflow; -inf for a constant function.
    factors : tuple of float
        The factor of each layer.
    layers : tuple of str
        The names of the layers that the factors belong to, if they are known.
    """

    log: float
    factors: tuple[float, ...]
    layers: tuple[str, ...] = ()

    @property
    def value(self) -> float:
        """The bound; inf where it exceeds what a float holds."""
        return exp(self.log)


class LocalLipschitz(NamedTuple):
    """A lower bound of ‖J‖₂ at a point.

    Attributes
    ----------
    value : float
        At most ‖J‖₂, up to the rounding of the products.
    error : float
        J has a singular value at most that far from `value`.
    steps : int
        Number of products from each side.
    """

    value: float
    error: float
    steps: int


def lipschitz_upper_bound(layers: Sequence[Any]) -> LipschitzBound:
    r"""The product of a sequential network's factors, :math:`\prod_i\|W_i\|_2\prod_i Lip(a_i)`.

    The distance of two outputs is at most this factor times that of their inputs. The bound is
    certified, and can be orders of magnitude too large: it assumes that the leading directions of
    all layers align.

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
        A number is negative or not finite, or there is no layer.
    GeometryError, NonFiniteError
        As in `specops.spectral_norm_bounds`. A stack of matrices is refused, as it has several
        norms.

    Notes
    -----
    The product does not hold for residual networks, where a block with a skip connection has the
    constant ``1 + Lip(branch)``: give that as one number. `specops_torch.lipschitz_upper_bound`
    reads a model with its branches.

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
    upper = norm_from_above(weight, geometry)
    if isinstance(upper, tuple) or upper.ndim:
        raise GeometryError(
            f"layers[{index}] is a stack of matrices, with a norm for each: give the largest "
            f"as a number, or the layer that is used"
        )
    return arrays.number(upper)


def local_lipschitz(
    jacobian: JacobianOperator, *, tolerance: float = 1e-3, max_steps: int = 64, seed: int = 0
) -> LocalLipschitz:
    r"""The norm of a function's Jacobian at a point, :math:`\|J_f(x)\|_2`, by Lanczos.

    It tells how much the function amplifies the worst small change of this input. It is a lower
    bound of the Lipschitz constant, never a certificate: the true norm may be larger at other
    points, and even at this one.

    Parameters
    ----------
    jacobian : JacobianOperator
        From ``jacobian_operator`` of an adapter, or a matrix as such an operator.
    tolerance : float
        Stop when the error is below tolerance · value.
    max_steps : int
        Largest number of products with JᵀJ (or JJᵀ, the smaller one).
    seed : int
        Seed of the start vector, which is the same on every backend.

    Returns
    -------
    LocalLipschitz

    Raises
    ------
    ValueError
        The tolerance is not positive, or `max_steps` is below 1.
    NonFiniteError
        A product holds NaN or infinity.

    References
    ----------
    Golub & Kahan 1965. Sanyal, Torr & Dokania 2020, equation 2, and figures 15 and 16.
    """
    tolerance = check_bound(tolerance, "tolerance")
    max_steps = integer(max_steps, "max_steps", least=1)
    rows, columns = jacobian.shape

    wide = rows < columns
    first: Any = jacobian.rmatvec if wide else jacobian.matvec
    second: Any = jacobian.matvec if wide else jacobian.rmatvec
    start = random_start(min(rows, columns), jacobian.like, seed)
    # Scaled, because JᵀJ squares the scale, which may leave the range of single precision.
    scale = arrays.number(safe_norm(first(start / safe_norm(start))))
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
