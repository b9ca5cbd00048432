"""Upper bounds of gradients and Hessians by the weights, from the norms of the layers alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from specops import arrays
from specops.geometry.arguments import nan_unless, non_negative
from specops.typing import Array


class GradientNormBounds(NamedTuple):
    """Upper bounds of the norms of a network's gradients with respect to its weights.

    Attributes
    ----------
    layers : tuple of float or array (n,)
        The bound for each layer's gradient.
    total : float or array (n,)
        The bound for the gradient with respect to all weights: the root of the sum of squares.
    """

    layers: tuple[float | Array, ...]
    total: float | Array


def gradient_norm_bounds(
    norms: Sequence[float], input_norm: float | Array, *, activations: float = 1.0
) -> GradientNormBounds:
    r"""Upper bounds of each layer's gradient, from the norms of all other layers.

    .. math:: \|\nabla_{W_t} D(x)\|_F \le
              \|x\|\,\prod_i Lip(a_i)\,\prod_{i\ne t}\|W_i\|_2

    for :math:`D = a_L\circ W_L\circ\dots\circ a_1\circ W_1` with one output. Where all norms are
    at most 1, as under spectral normalisation, that is :math:`\|x\|\prod_i Lip(a_i)`, and
    √L times as much for the whole gradient. `gradient_norms` measures the norms themselves.

    Parameters
    ----------
    norms : sequence of float
        ‖W_i‖₂ of all layers, in any order.
    input_norm : float or array (n,)
        ‖x‖₂.
    activations : float
        :math:`\prod_i Lip(a_i)`: 1 for ReLU layers, and 1/4 if a sigmoid follows the last.

    Returns
    -------
    GradientNormBounds
        In the order of the norms; inf where a bound exceeds what a float holds.

    Raises
    ------
    ValueError
        There is no norm, or a number is negative or not finite; while a compiler traces, the
        bounds of such a sample are NaN.

    Notes
    -----
    The bounds hold without biases, for activations that keep zero (ReLU, leaky ReLU, tanh; the
    last may be any). The gradients are those with respect to the weight that the layer computes
    with, which under a normalisation of the forward pass is not the raw parameter. The gradient
    with respect to a kernel of k taps is at most √k times as large, with the operator's norms.

    References
    ----------
    Lin, Sekar & Fanti 2021, Proposition 1 and appendix A.

    Examples
    --------
    >>> gradient_norm_bounds([2.0, 3.0], 10.0)
    GradientNormBounds(layers=(30.0, 20.0), total=36.05551275463989)
    """
    others = _others(norms)
    factor = non_negative(activations, "activations")
    x = _checked(input_norm)
    factors = [_product([factor, *rest]) for rest in others]
    largest = max((exponent for mantissa, exponent in factors if mantissa), default=0)
    root = math.hypot(*(math.ldexp(m, exponent - largest) for m, exponent in factors))
    return GradientNormBounds(tuple(_scaled(x, f) for f in factors), _scaled(x, (root, largest)))


def hessian_norm_bounds(
    norms: Sequence[float], input_norm: float | Array, *, output_curvature: float
) -> tuple[float | Array, ...]:
    r"""Upper bounds of each layer's Hessian, from the norms of all other layers.

    .. math:: \|H_{W_t} D(x)\|_2 \le \|H_o\|_2\,\|x\|^2\,\prod_{i\ne t}\|W_i\|_2^2

    for ReLU and leaky ReLU between the layers, with :math:`H_o` the Hessian with respect to the
    input of the last activation.

    Parameters
    ----------
    norms, input_norm
        As in `gradient_norm_bounds`.
    output_curvature : float
        :math:`\|H_o\|_2`: 0 without a last activation, and never more than
        :math:`1/(6\sqrt3)\approx 0.0963` for the sigmoid.

    Returns
    -------
    tuple of float or array (n,)
        The bound of each layer, in the order of the norms; inf where a bound exceeds what a float
        holds.

    Raises
    ------
    ValueError
        As in `gradient_norm_bounds`.

    Notes
    -----
    These are the blocks of single layers on the diagonal of the Hessian; its other blocks are not
    bounded. At the kink of a ReLU there is no second derivative.

    References
    ----------
    Lin, Sekar & Fanti 2021, Proposition 3 (appendix D).

    Examples
    --------
    >>> hessian_norm_bounds([2.0, 3.0], 10.0, output_curvature=0.5)
    (450.0, 200.0)
    """
    curvature = non_negative(output_curvature, "output_curvature")
    x = _checked(input_norm)
    if arrays.is_array(x):
        # By the square root, which is in range whenever the bound is.
        roots = [_root(_product([curvature, *rest, *rest])) for rest in _others(norms)]
        with np.errstate(over="ignore"):
            return tuple(_scaled(x, root) ** 2 for root in roots)
    return tuple(_scaled(1.0, _product([curvature, *rest, *rest, x, x])) for rest in _others(norms))


def _checked(input_norm: float | Array) -> float | Array:
    if not arrays.is_array(input_norm):
        return non_negative(input_norm, "input_norm")
    fits = (input_norm >= 0) & (input_norm < math.inf)
    if arrays.truth(arrays.namespace(input_norm).all(fits)) is False:
        raise ValueError(f"input_norm must be finite numbers, zero or more, got {input_norm!r}")
    return nan_unless(fits, input_norm)


def _others(norms: Sequence[float]) -> list[list[float]]:
    """For each norm the list of all others: a quotient of products would fail for zero."""
    found = [non_negative(arrays.number(n), f"norms[{i}]") for i, n in enumerate(norms)]
    if not found:
        raise ValueError("norms is empty: give the norm of every layer")
    return [found[:t] + found[t + 1 :] for t in range(len(found))]


def _product(numbers: Sequence[float]) -> tuple[float, int]:
    """The product as (m, e) with value m·2^e, which neither overflows nor underflows."""
    mantissa, exponent = 1.0, 0
    for number in numbers:
        part, power = math.frexp(number)
        mantissa, carried = math.frexp(mantissa * part)
        exponent += power + carried
    return mantissa, exponent


def _root(number: tuple[float, int]) -> tuple[float, int]:
    mantissa, exponent = number
    odd = exponent % 2
    return math.sqrt(mantissa * 2**odd), (exponent - odd) // 2


def _scaled(x: float | Array, number: tuple[float, int]) -> float | Array:
    """x·m·2^e; inf if a float cannot hold it, but zero if x is zero."""
    mantissa, exponent = number
    if not arrays.is_array(x):
        part, power = math.frexp(x)
        try:
            return math.ldexp(part * mantissa, exponent + power)
        except OverflowError:
            return math.inf
    found = arrays.to_compute(arrays.namespace(x), x) * mantissa
    exponent = max(-_BEYOND, min(_BEYOND, exponent))
    with np.errstate(over="ignore"):
        while exponent:
            step = max(-_STEP, min(_STEP, exponent))
            found = found * 2.0**step
            exponent -= step
    return found


_STEP = 100
"""Exponents are applied in steps of 2^100, which is in the range of single precision."""
_BEYOND = 2200
"""A factor of 2^2200 moves even the smallest double out of range."""
