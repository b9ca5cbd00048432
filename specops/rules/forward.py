"""Rules of the forward pass: the layer uses a normalised weight, the optimizer trains the raw one.

The paper names: ``SpectralNormalization(norm="reshaped")`` is SN_w, "operator" SN_conv,
"bidirectional" BSN; with a scale other than 1 they are SSN and BSSN.
"""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass
from typing import Any, ClassVar, Literal

from specops import arrays
from specops.geometry import Dense, Geometry
from specops.geometry.arguments import integer, nan_without
from specops.rules.base import (
    Figures,
    Schedule,
    bound_at,
    check_scheduled,
    figure,
    measured_as,
    numbers_of,
    value_at,
)
from specops.rules.following import Following
from specops.rules.normalizations import check_ratio, limit_stable_rank, normalize, stable_ranks
from specops.rules.scale import TrainableScale
from specops.rules.stages import Formula, ForwardRule
from specops.tracking import Norm, Steps, TrackedBlocks, check_norm
from specops.typing import Array, State

RANKS = ("rank_before", "rank_after")
"""The figures of rules about the stable rank."""


class _Tracking(Following, ForwardRule):
    """A rule that divides by a tracked norm; subclasses have `iterations`."""

    def view(self, geometry: Geometry) -> Geometry:
        """The map of that norm; for "bidirectional" the layer's own."""
        return measured_as(geometry, self.norm)

    @arrays.entry
    def update(
        self, weight: Array, geometry: Geometry, state: State, *, step: int = 1, name: str = ""
    ) -> tuple[Array, State, Figures]:
        """Advance the vectors; the figure is ``norm``, a lower bound."""
        state = self._advanced(weight, geometry, state, name, self.iterations)
        return weight, state, {"norm": figure(self.tracked(geometry).measured(state))}

    def by_products(
        self, geometry: Geometry, state: State, *, step: int = 1, name: str = ""
    ) -> Steps[tuple[State, Figures] | None] | None:
        """One firing by products, for matrices."""
        follow = self.tracked(geometry)
        if not state or not isinstance(follow, TrackedBlocks):
            return None
        return _by_products(follow, state, self.iterations)


def _by_products(
    follow: TrackedBlocks, state: State, iterations: int
) -> Steps[tuple[State, Figures] | None]:
    state = yield from follow.advance_by_products(state, iterations)
    return state, {"norm": figure(follow.measured(state))}


@dataclass(frozen=True, repr=False)
class SpectralNormalization(_Tracking):
    r"""Use :math:`s\,W/\sigma(W)` in the forward pass.

    Parameters
    ----------
    norm : "reshaped", "operator" or "bidirectional"
        Which σ of a convolution: of the kernel reshaped to (out, in·k), of the layer, or the
        mean of those of (out, in·k) and (in, out·k). For other layers the three are equal.
    scale : float, callable or TrainableScale
        The factor s > 0: fixed, a schedule ``(step, name, geometry) -> float``, or trained.
    iterations : int
        How many steps of power iteration update u and v at each firing.

    Raises
    ------
    ValueError
        The norm is unknown, or the scale is not positive and finite.

    Notes
    -----
    σ is estimated as ⟨u, Wv⟩ with unit vectors u, v that advance once per firing and that
    derivatives hold constant. The estimate is at most the norm, so the norm of the weight in use
    is at least s, and approaches s as the vectors converge. A second pair of vectors watches for
    singular values that grow along directions in which u and v have no part: one that overtakes
    the leading value, by a tenth of the norm per step, is found within a few firings. The blocks
    of fused weights and the matrices of stacks are each divided by a σ of their own.

    References
    ----------
    Miyato et al. 2018; Lin, Sekar & Fanti 2021 (bidirectional, scaled).

    Examples
    --------
    >>> import numpy as np
    >>> from specops import Dense
    >>> w = np.diag([4.0, 1.0])
    >>> rule = SpectralNormalization(norm="reshaped", scale=2.0)
    >>> rule.apply(w, Dense(), rule.init(w, Dense(), "w")).round(6)
    array([[2. , 0. ],
           [0. , 0.5]])
    """

    _: KW_ONLY
    norm: Norm
    scale: float | Schedule | TrainableScale = 1.0
    iterations: int = 1
    formula: ClassVar[Formula] = "normalized"
    numbers_at = numbers_of

    def __post_init__(self) -> None:
        check_norm(self.norm)
        if not isinstance(self.scale, TrainableScale):
            check_scheduled(self.scale, "scale")
        integer(self.iterations, "iterations", least=1)

    def apply(
        self,
        weight: Array,
        geometry: Geometry,
        state: State,
        *,
        step: int = 1,
        name: str = "",
        scale: Array | None = None,
    ) -> Array:
        """The weight that the layer uses; `scale` is the value of a trained one."""
        if scale is None:
            scale = self.fixed_scale(step, name, geometry)
        return normalize(weight, self.tracked(geometry), state, scale)

    def arguments(self, step: int, name: str, geometry: Geometry) -> dict[str, Any]:
        """The scale; the initial value of a trained one."""
        return {"scale": self.fixed_scale(step, name, geometry)}

    def trained_scale(self) -> TrainableScale | None:
        """The scale, if it is trained."""
        return self.scale if isinstance(self.scale, TrainableScale) else None

    def fixed_scale(self, step: int, name: str, geometry: Geometry) -> Any:
        """s at this step; the initial value of a trained one."""
        if isinstance(self.scale, TrainableScale):
            return self.scale.initial
        return bound_at(self.scale, step, name, geometry, "scale")


@dataclass(frozen=True, repr=False)
class StableRankNormalization(_Tracking):
    r"""Use W/σ with its stable rank limited in the forward pass.

    With :math:`\hat W = W/\sigma`, :math:`R = \hat W - uv^H` and
    r = max(1, ratio · min(rows, columns)):

    .. math:: uv^H + R\,\min\bigl(1, \sqrt{r-1}/\|R\|_F\bigr).

    Parameters
    ----------
    ratio : float or callable
        The ratio in (0, 1], or a schedule ``(step, name, geometry) -> float``.
    norm : "reshaped" or "operator"
        For a convolution: whether the stable rank is that of the reshaped kernel (as in the
        paper) or of the layer.
    iterations : int
        How many steps of power iteration update u and v at each firing.

    Raises
    ------
    ValueError
        The ratio is outside (0, 1], or the norm unknown.

    Notes
    -----
    σ, u and v are followed from firing to firing as in `SpectralNormalization`, whose notes apply.

    A matrix with a single row or column has no R and is used as W/σ. Where r = 1 for a larger one,
    the layer uses uvᴴ alone, which has no derivative by W: the layer does not learn, and adapters
    warn of it.

    The operator of a convolution has a least stable rank, which kernels reach along their leading
    direction; a ratio that asks for less gives that kernel. In a kernel so limited another pair of
    vectors may come to lead, with a norm above 1, which reports show. Random 3×3 kernels of 8 and
    32 channels on 8² and 16² points had norms up to 1.05 at a ratio of 0.1 and 1.2 at the least
    rank, kernels of one channel on a few points 1.3.

    References
    ----------
    Sanyal, Torr & Dokania 2020, Algorithm 2.

    Examples
    --------
    >>> import numpy as np
    >>> from specops import Dense
    >>> rule, w = StableRankNormalization(0.5, norm="reshaped"), np.diag([4.0, 2.0, 2.0])
    >>> rule.apply(w, Dense(), rule.init(w, Dense(), "w")).round(4)
    array([[1. , 0. , 0. ],
           [0. , 0.5, 0. ],
           [0. , 0. , 0.5]])
    """

    ratio: float | Schedule
    _: KW_ONLY
    norm: Literal["reshaped", "operator"]
    iterations: int = 1
    formula: ClassVar[Formula] = "rank limited"
    limits_stable_rank: ClassVar[bool] = True
    numbers_at = numbers_of

    def __post_init__(self) -> None:
        if not callable(self.ratio):
            check_ratio(self.ratio)
        check_norm(self.norm, ("reshaped", "operator"))
        integer(self.iterations, "iterations", least=1)

    def apply(
        self,
        weight: Array,
        geometry: Geometry,
        state: State,
        *,
        step: int = 1,
        name: str = "",
        ratio: Array | None = None,
    ) -> Array:
        """The weight that the layer uses; `ratio` is the value of a schedule, as an array."""
        if ratio is None:
            ratio = self._ratio_at(step, name, geometry)
        limited = limit_stable_rank(weight, self.tracked(geometry), state, ratio)
        return nan_without(ratio, limited)

    def arguments(self, step: int, name: str, geometry: Geometry) -> dict[str, Any]:
        """The ratio."""
        return {"ratio": self._ratio_at(step, name, geometry)}

    def _ratio_at(self, step: int, name: str, geometry: Geometry) -> Any:
        return check_ratio(value_at(self.ratio, step, name, geometry))

    def is_traceable(self, geometry: Geometry) -> bool:
        """False for a convolution's operator, which needs tables made outside the compiler."""
        return self.norm != "operator" or isinstance(geometry, Dense)

    def caution(self, geometry: Geometry, shape: tuple[int, ...]) -> str:
        """Why a layer of this shape will not learn under the rule; "" if it will."""
        view = self.view(geometry)
        if callable(self.ratio) or not isinstance(view, Dense):
            return ""
        sides = [min(s) for s in view.matrix_shapes(shape)]
        if any(1 < side <= 1.0 / self.ratio for side in sides):
            return (
                f"ratio={self.ratio} of {min(s for s in sides if s > 1)} singular values asks for "
                f"stable rank 1: the layer uses uvᵀ alone, which has no derivative by its weight, "
                f"so that it does not learn. Take a ratio above {1 / max(sides):.3g}, or exclude it"
            )
        return ""

    @arrays.entry
    def update(
        self, weight: Array, geometry: Geometry, state: State, *, step: int = 1, name: str = ""
    ) -> tuple[Array, State, Figures]:
        """Advance the vectors; the figures are ``norm``, a lower bound, and the stable ranks.

        ``rank_before`` is that of the weight, ``rank_after`` that of the one in use, both with
        the norm along the vectors; of several matrices the largest.
        """
        weight, state, figures = super().update(weight, geometry, state, step=step, name=name)
        ratio = self._ratio_at(step, name, geometry)
        ranks = stable_ranks(weight, self.tracked(geometry), state, ratio)
        return weight, state, figures | dict(zip(RANKS, ranks, strict=True))
