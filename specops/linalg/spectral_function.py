r"""Spectral functions of matrices, differentiable where singular values are repeated as well.

For :math:`A = U\Sigma V^H` and f of the singular values, :math:`F(A) = U f(\Sigma) V^H`. The
derivative does not need that of the vectors, which does not exist at repeated values. With
:math:`K = U^H H V`,

.. math:: DF(A)[H] = U\Bigl(\Gamma\circ\tfrac12(K + K^H) + \Delta\circ\tfrac12(K - K^H)\Bigr)V^H
          + (I - UU^H)HV\,\tfrac{f}{\sigma}V^H + U\,\tfrac{f}{\sigma}\,U^HH(I - VV^H),

:math:`\Gamma_{ij} = (f_i - f_j)/(\sigma_i - \sigma_j)`, whose limit at :math:`\sigma_i = \sigma_j`
is the slope f′, and :math:`\Delta_{ij} = (f_i + f_j)/(\sigma_i + \sigma_j)`, as f is continued to
be odd. On the diagonal Γ is the derivative of f by all values, by which a threshold that depends
on them has its share.

References
----------
Daleckii & Krein 1965; Noferini 2017, "A formula for the Fréchet derivative of a generalized matrix
function".
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from specops import arrays
from specops.arrays.solvers import svd
from specops.typing import Array, Namespace

Function = Callable[..., tuple[Array, Array]]
"""(f(s), f′(s)) of descending values (..., k) and of parameters. The slope f′ is that by one value
alone; it is used where values are equal."""


def spectral_function(
    xp: Namespace, a: Array, function: Function, *parameters: Array
) -> tuple[Array, Array]:
    """(``U f(Σ) Vᴴ``, Σ) of stacked matrices, by SVD.

    Parameters
    ----------
    xp : namespace
        The arrays' namespace.
    a : array, shape (..., m, n)
        Scaled so that squares neither overflow nor underflow.
    function : callable
        The function f, called with the values and the parameters.
    parameters : array
        Parameters of f, with respect to which the result can be differentiated.

    Notes
    -----
    At a kink of f the derivative is that from one side. If f(0) is not 0, there is no derivative at
    singular matrices, and a finite value is given instead. As to Σ, single values are
    differentiable where they are not repeated, and symmetric functions of the values everywhere.
    Second derivatives are those of the SVD: they are NaN at repeated values. Under `torch.compile`
    there are none.
    """

    def expansion(change: Array | None, factors: tuple[Array, ...], *parameters: Array) -> Any:
        u, s, vh = factors
        if change is None:
            values = function(s, *parameters)[0]
            return (u * xp.astype(values, u.dtype)[..., None, :]) @ vh, 1.0 * s
        return _expanded(xp, change, factors, lambda s: function(s, *parameters))

    found: tuple[Array, Array] = arrays.expanded(lambda x: svd(xp, x), expansion, a, *parameters)
    return found


def leading_pair(xp: Namespace, a: Array) -> Array:
    """``u₁v₁ᴴ`` of stacked matrices, differentiable wherever σ₁ is not repeated."""

    def function(s: Array) -> tuple[Array, Array]:
        none = xp.zeros_like(s)
        return xp.concat([xp.ones_like(s[..., :1]), none[..., 1:]], axis=-1), none

    return spectral_function(xp, a, function)[0]


def _expanded(
    xp: Namespace, h: Array, factors: tuple[Array, ...], function: Function
) -> tuple[Array, Array]:
    """F(A + h) and its singular values, to first order in h."""
    u, s, vh = factors
    uh, v = arrays.adjoint(xp, u), arrays.adjoint(xp, vh)
    k = uh @ h @ v
    kh = arrays.adjoint(xp, k)
    diagonal = xp.linalg.diagonal(k)
    moved = s + arrays.real_part(xp, diagonal)
    values = function(moved)[0]
    held, slopes = function(s)
    identity = xp.eye(s.shape[-1], dtype=s.dtype, device=arrays.device_of(s))
    quotients = xp.astype(_differences(xp, s, held, slopes) * (1.0 - identity), k.dtype)
    sums = xp.astype(_sums(xp, s, held, slopes), k.dtype)
    core = 0.5 * quotients * (k + kh) + 0.5 * sums * (k - kh)
    core = core + xp.astype(values[..., None, :] * identity, k.dtype)
    result = u @ core @ vh
    rows, columns = h.shape[-2:]
    if rows != columns:
        ratios = xp.astype(_ratio(xp, held, s, slopes), k.dtype)[..., None, :]
        if rows > columns:
            result = result + ((h @ v - u @ k) * ratios) @ vh
        else:
            result = result + (u * ratios) @ (uh @ h - k @ vh)
    return result, moved


def _differences(xp: Namespace, s: Array, f: Array, slopes: Array) -> Array:
    """(fᵢ − fⱼ)/(σᵢ − σⱼ); for close values of equal slope that slope, as differences cancel."""
    left, right = s[..., :, None], s[..., None, :]
    apart = left - right
    smooth = slopes[..., :, None] == slopes[..., None, :]
    near = xp.abs(apart) <= arrays.epsilon(s.dtype) ** 0.5 * (left + right)
    quotient = (f[..., :, None] - f[..., None, :]) / arrays.nonzero(xp, apart)
    return xp.where(near & smooth, slopes[..., :, None] + 0.0 * apart, quotient)


def _sums(xp: Namespace, s: Array, f: Array, slopes: Array) -> Array:
    """(fᵢ + fⱼ)/(σᵢ + σⱼ)."""
    total = s[..., :, None] + s[..., None, :]
    return _ratio(xp, f[..., :, None] + f[..., None, :], total, slopes[..., :, None] + 0.0 * total)


def _ratio(xp: Namespace, f: Array, s: Array, slopes: Array) -> Array:
    return xp.where(s == 0, slopes, f / arrays.nonzero(xp, s))
