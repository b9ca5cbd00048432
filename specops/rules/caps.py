"""The caps of enforced-Lipschitz training: cheaper than projections, and not projections."""

from __future__ import annotations

import math
from dataclasses import KW_ONLY, dataclass
from typing import Any, Literal

from specops import arrays
from specops.errors import NonFiniteError, UnsupportedGeometryError
from specops.geometry import Conv, Dense, Geometry
from specops.geometry.arguments import nan_without
from specops.maps.prepare import prepare
from specops.rules.base import (
    Figures,
    Schedule,
    Scheduled,
    bound_at,
    check_scheduled,
    figure,
    measured_as,
    numbers_of,
)
from specops.rules.stages import WeightRule
from specops.spectra import spectral_norm, spectral_norm_bounds
from specops.tracking import TrackedBlocks, check_norm
from specops.typing import Array, Namespace, State

_NORMS = ("operator", "reshaped")
_REACH = 1.3
"""σ₁/c up to which one round of the soft cap's polynomials is monotone: 81/62, rounded down."""
_FAR = 64.0
"""A matrix with a larger σ₁/c is first scaled down to this one, which bounds the number of rounds:
a choice."""
_CAP_ROUNDS_WHEN_TRACED = 16
"""The rounds that σ₁ = 64·c needs: one, and ln(64/1.3)/ln(81/62) = 14.6 rounded up."""
_HALVINGS = 50
"""Bisections for α: they shrink its interval, at most 1/3 long, to the rounding of double
precision."""


@dataclass(frozen=True, repr=False)
class Cap(Scheduled, WeightRule):
    """The base of the caps. Each of them is a dataclass too, so that errors name its own class."""

    max_norm: float | Schedule
    _: KW_ONLY
    norm: Literal["operator", "reshaped"]

    def __post_init__(self) -> None:
        check_scheduled(self.max_norm, "max_norm")
        check_norm(self.norm, _NORMS)

    def init(self, weight: Array, geometry: Geometry, name: str) -> State:
        """No state."""
        return {}

    def view(self, geometry: Geometry) -> Geometry:
        """The map whose norm is capped."""
        return measured_as(geometry, self.norm)

    def _bound(self, step: int, name: str, geometry: Geometry) -> Any:
        return bound_at(self.max_norm, step, name, geometry, "max_norm")


@dataclass(frozen=True, repr=False)
class NormalizeIfAbove(Cap):
    r"""Scale a weight down where its norm exceeds `max_norm`: :math:`W\min(1, c/\|W\|_2)`.

    All singular values shrink alike, so the weight moves further than its projection. Unlike
    `SpectralNormalization` it never scales up.

    Parameters
    ----------
    max_norm : float or callable
        The bound, or a schedule ``(step, name, geometry) -> float``.
    norm : "operator" or "reshaped"
        For a convolution: whether the norm is the layer's (for every input size if none is known),
        or that of the kernel reshaped to a matrix.

    Notes
    -----
    The bound holds up to rounding, and up to how far the norm of a zero-padded convolution has
    converged (1e-6).

    References
    ----------
    Newhouse et al. 2025 ("spectral normalize").

    Examples
    --------
    >>> import numpy as np
    >>> from specops import Dense
    >>> w = np.diag([4.0, 1.0])
    >>> rule = NormalizeIfAbove(2.0, norm="operator")
    >>> rule.update(w, Dense(), rule.init(w, Dense(), "w"))[0].round(6)
    array([[2. , 0. ],
           [0. , 0.5]])
    """

    numbers_at = numbers_of

    @arrays.entry
    def update(
        self, weight: Array, geometry: Geometry, state: State, *, step: int = 1, name: str = ""
    ) -> tuple[Array, State, Figures]:
        """Scale; the figures are ``norm_before`` and ``norm_after``."""
        bound = self._bound(step, name, geometry)
        view = self.view(geometry)
        given = prepare(weight, view, scaled=False)
        xp = given.xp
        before = _norms(given.w, view)
        # Slightly below the bound, so that rounding does not exceed it.
        target = bound * (1.0 - 4.0 * arrays.epsilon(weight.dtype))
        factors = tuple(
            xp.where(n > bound, target / arrays.nonzero(xp, n), xp.ones_like(n)) for n in before
        )
        if arrays.truth(xp.all(xp.stack([xp.all(f == 1.0) for f in factors]))):
            result = weight
        else:
            # Scales all entries, including kernel taps that the map never reads.
            new = _scaled(arrays.to_compute(xp, weight), view, factors)
            result = nan_without(bound, xp.astype(new, weight.dtype))
        after = tuple(n * f for n, f in zip(before, factors, strict=True))
        figures = {"norm_before": figure(before), "norm_after": figure(after)}
        return result, state, figures


@dataclass(frozen=True, repr=False)
class SpectralSoftCap(Cap):
    r"""Press all singular values below `max_norm` by odd polynomials of the matrix.

    :math:`p_2(p_1(W))` with :math:`p_1(x) = x - \alpha x^3` and
    :math:`p_2(x) = x + \alpha x^3`, where α is the least for which the largest singular value
    lands on the bound. The order of the singular values is kept, small ones hardly move, and only
    products of matrices are needed. Where σ₁ exceeds 1.3 times the bound, this is repeated.

    Parameters
    ----------
    max_norm : float or callable
        The bound, or a schedule ``(step, name, geometry) -> float``.
    norm : "operator" or "reshaped"
        A convolution can only be capped as a reshaped kernel, whose norm is not the layer's.

    References
    ----------
    Newhouse et al. 2025 ("spectral soft cap"), with the largest singular value measured
    instead of bounded by the learning rate and weight decay.

    Examples
    --------
    >>> import numpy as np
    >>> from specops import Dense
    >>> w = np.diag([4.0, 1.0])
    >>> rule = SpectralSoftCap(3.5, norm="operator")
    >>> rule.update(w, Dense(), rule.init(w, Dense(), "w"))[0].round(6)
    array([[3.5     , 0.      ],
           [0.      , 0.999389]])
    """

    numbers_at = numbers_of

    def obstacle(self, geometry: Geometry) -> str:
        """Why a convolution's operator cannot be capped; "" for other maps."""
        if isinstance(geometry, Conv) and self.norm == "operator":
            return (
                'a polynomial of a convolution is no kernel of the same support: norm="reshaped" '
                "caps the reshaped kernel, ClipSpectralNorm the operator"
            )
        return ""

    @arrays.entry
    def update(
        self, weight: Array, geometry: Geometry, state: State, *, step: int = 1, name: str = ""
    ) -> tuple[Array, State, Figures]:
        """Cap; the figures are ``norm_before`` and ``norm_after``."""
        bound = self._bound(step, name, geometry)
        view = self.view(geometry)
        if not isinstance(view, Dense):
            raise UnsupportedGeometryError(self.obstacle(geometry))
        given = prepare(weight, view, scaled=False)
        xp = given.xp
        before = _norms(given.w, view)
        target = bound * (1.0 - 4.0 * arrays.epsilon(weight.dtype))
        blocks, after = [], []
        for a, n in zip(view.blocks(given.w), before, strict=True):
            done, top = _soft_cap(xp, a / target, n / target)
            above = n > bound
            blocks.append(xp.where(above[..., None, None], done * target, a))
            after.append(xp.where(above, top * target, n))
        result = weight
        if arrays.truth(xp.all(xp.stack([xp.all(n <= bound) for n in before]))) is not True:
            new = view.assemble(tuple(blocks), weight.shape)
            result = nan_without(bound, xp.astype(new, weight.dtype))
        figures = {"norm_before": figure(before), "norm_after": figure(tuple(after))}
        return result, state, figures


def _norms(w: Array, view: Geometry) -> tuple[Array, ...]:
    """The norms that count, one array for each block."""
    norms = spectral_norm(w, view) if view.has_size else spectral_norm_bounds(w, view).upper
    found = norms if isinstance(norms, tuple) else (norms,)
    check_norms(arrays.namespace(w), found)
    return found


def check_norms(xp: Namespace, norms: tuple[Array, ...]) -> None:
    """Raise if a norm overflows its dtype: scaling by it would give zeros or infinity."""
    if arrays.truth(xp.any(xp.stack([xp.any(xp.isinf(n)) for n in norms]))):
        dtype = arrays.dtype_name(norms[0].dtype)
        raise NonFiniteError(f"its norm is beyond {dtype}: look for a diverged step")


def _scaled(w: Array, view: Geometry, factors: tuple[Array, ...]) -> Array:
    if isinstance(view, Dense):
        return TrackedBlocks(view).scaled(w, factors)
    return w * factors[0]


def _soft_cap(xp: Namespace, a: Array, top: Array) -> tuple[Array, Array]:
    """(matrices with values at most 1, their norms) from matrices of norms `top`."""
    top = xp.where(xp.isfinite(top), top, xp.zeros_like(top))
    down = xp.where(top > _FAR, _FAR / arrays.nonzero(xp, top), xp.ones_like(top))
    a, top = a * down[..., None, None], top * down
    rounds = _CAP_ROUNDS_WHEN_TRACED
    if arrays.is_concrete(top):
        highest = float(xp.max(top))
        # With the largest α that is allowed, a round multiplies the norm by 62/81.
        deep = math.ceil(math.log(max(highest, 1.0) / _REACH) / math.log(81.0 / 62.0))
        rounds = 1 + max(0, deep)
    for _ in range(rounds):
        alpha = _least_alpha(xp, top)
        low = a - alpha[..., None, None] * _cubed(xp, a)
        a = low + alpha[..., None, None] * _cubed(xp, low)
        y = top - alpha * top**3
        top = y + alpha * y**3
    return a, top


def _least_alpha(xp: Namespace, top: Array) -> Array:
    """The least α ≥ 0 with p₂(p₁(top)) ≤ 1, but at most the largest with which p₁ is monotone."""
    top = xp.where(top > 1.0, top, xp.ones_like(top))
    most = 1.0 / (3.0 * top**2)

    def halve(_: int, ends: tuple[Array, Array]) -> tuple[Array, Array]:
        middle = 0.5 * (ends[0] + ends[1])
        y = top - middle * top**3
        enough = y + middle * y**3 <= 1.0
        return xp.where(enough, ends[0], middle), xp.where(enough, middle, ends[1])

    _, high = arrays.fori(xp, 0, _HALVINGS, halve, (xp.zeros_like(top), most))
    # The derivative of α by σ₁: -∂f/∂σ₁ / ∂f/∂α where α is a root of f(α, σ₁); where α is the
    # largest that is allowed, the derivative of this limit.
    high = arrays.stop_gradient(high)
    y = top - high * top**3
    slope = arrays.stop_gradient(top**3 * (1.0 + 3.0 * high * y**2) - y**3)
    slope = xp.where(slope > 0, slope, xp.ones_like(slope))
    change = xp.where(high < arrays.stop_gradient(most), (y + high * y**3) / slope, most)
    high = high + (change - arrays.stop_gradient(change))
    return xp.where(top > 1.0, high, xp.zeros_like(top))


def _cubed(xp: Namespace, a: Array) -> Array:
    """A AᴴA by the smaller Gram matrix."""
    ah = arrays.adjoint(xp, a)
    return (a @ ah) @ a if a.shape[-2] <= a.shape[-1] else a @ (ah @ a)
