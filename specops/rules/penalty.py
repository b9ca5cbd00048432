"""`SpectralNormPenalty`: the gradient of a penalty on spectral norms, added before the step."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass
from typing import Any, ClassVar

from specops import arrays
from specops.geometry import Geometry
from specops.geometry.arguments import integer
from specops.rules.base import Figures, Schedule, bound_at, check_scheduled, figure, numbers_of
from specops.rules.following import Following
from specops.rules.stages import Formula, GradientRule
from specops.tracking import Norm, Steps, Tracked, TrackedBlocks, check_norm
from specops.typing import Array, Namespace, State


@dataclass(frozen=True, repr=False)
class SpectralNormPenalty(Following, GradientRule):
    r"""Add :math:`\tfrac\lambda2\sigma(W)^2` to the loss, by its gradient.

    The gradient :math:`\lambda\sigma\,uv^H` goes to the weight's own before the optimizer's
    step; the vectors u, v advance first and count as constants.

    Parameters
    ----------
    strength : float or callable
        λ > 0, or a schedule ``(step, name, geometry) -> float``.
    norm : "reshaped", "operator" or "bidirectional"
        Which σ of a convolution: of the kernel reshaped to (out, in·k) (the paper), of the
        layer, or the mean of those of (out, in·k) and (in, out·k).
    iterations : int
        How many steps of power iteration update u and v at each firing.

    Raises
    ------
    ValueError
        A strength that is not positive and finite, an unknown norm.

    Notes
    -----
    Algorithm 1 of the paper prints σ = ‖u‖/‖v‖ for v = Wᵀu, which is 1/σ; here u and v are
    unit vectors and σ = ⟨u, Wv⟩, at most the norm. The gradient of a zero weight is zero.

    References
    ----------
    Yoshida & Miyato 2017, equation 1 and Algorithm 1.

    Examples
    --------
    >>> import numpy as np
    >>> from specops import Dense
    >>> w = np.diag([4.0, 1.0])
    >>> rule = SpectralNormPenalty(0.5, norm="reshaped")
    >>> term, _, figures = rule.update(w, Dense(), rule.init(w, Dense(), "w"))
    >>> term.round(6), round(float(figures["penalty"]), 6)
    (array([[2., 0.],
           [0., 0.]]), 4.0)
    """

    strength: float | Schedule
    _: KW_ONLY
    norm: Norm
    iterations: int = 1
    formula: ClassVar[Formula] = "penalty"
    numbers_at = numbers_of

    def __post_init__(self) -> None:
        check_scheduled(self.strength, "strength")
        check_norm(self.norm)
        integer(self.iterations, "iterations", least=1)

    @arrays.entry
    def update(
        self, weight: Array, geometry: Geometry, state: State, *, step: int = 1, name: str = ""
    ) -> tuple[Array, State, Figures]:
        """(what to add to the gradient, the state advanced, ``norm`` and ``penalty``)."""
        state, figures = self.advance(weight, geometry, state, step=step, name=name)
        follow = self.tracked(geometry)
        strength = self.strength_at(step, name, geometry)
        xp, norms = arrays.namespace(weight), follow.measured(state)
        return _term(xp, weight, follow, state, norms, strength), state, figures

    @arrays.entry
    def advance(
        self, weight: Array, geometry: Geometry, state: State, *, step: int = 1, name: str = ""
    ) -> tuple[State, Figures]:
        """The state and figures of `update`, for adapters that add λσuvᴴ in place themselves."""
        state = self._advanced(weight, geometry, state, name, self.iterations)
        strength = self.strength_at(step, name, geometry)
        return state, self._figures(self.tracked(geometry), state, strength)

    def by_products(
        self, geometry: Geometry, state: State, *, step: int = 1, name: str = ""
    ) -> Steps[tuple[State, Figures] | None] | None:
        """One firing by products, for matrices."""
        follow = self.tracked(geometry)
        if not state or not isinstance(follow, TrackedBlocks):
            return None
        return self._by_products(follow, state, self.strength_at(step, name, geometry))

    def _by_products(
        self, follow: TrackedBlocks, state: State, strength: Any
    ) -> Steps[tuple[State, Figures] | None]:
        state = yield from follow.advance_by_products(state, self.iterations)
        return state, self._figures(follow, state, strength)

    def _figures(self, follow: Tracked, state: State, strength: Any) -> Figures:
        norms = follow.measured(state)
        return {"norm": figure(norms), "penalty": _penalty(norms, strength)}

    def strength_at(self, step: int, name: str, geometry: Geometry) -> Any:
        """λ at this step."""
        return bound_at(self.strength, step, name, geometry, "strength")

    @arrays.entry
    def penalty(
        self, weight: Array, geometry: Geometry, state: State, *, step: int = 1, name: str = ""
    ) -> tuple[Array, Array]:
        """(value, gradient) with the vectors of `state`, which stays as it is."""
        follow = self.tracked(geometry)
        xp = arrays.namespace(weight)
        strength = self.strength_at(step, name, geometry)
        norms = follow.norms(arrays.to_compute(xp, weight), state)
        return _penalty(norms, strength), _term(xp, weight, follow, state, norms, strength)


def _penalty(norms: tuple[Array, ...], strength: Any) -> Array:
    """½λ Σσ²."""
    xp = arrays.namespace(norms[0])
    return 0.5 * strength * sum(xp.sum(n * n) for n in norms)


def _term(
    xp: Namespace, w: Array, follow: Tracked, state: State, norms: tuple[Array, ...], strength: Any
) -> Array:
    factors = tuple(strength * norm for norm in norms)
    return xp.astype(follow.gradient(w, state, factors), w.dtype, copy=False)
