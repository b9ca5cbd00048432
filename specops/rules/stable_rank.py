"""`ProjectStableRank`: the nearest weight of bounded stable rank, after each step."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Literal

from specops import arrays
from specops.errors import StateError
from specops.geometry import Geometry
from specops.geometry.arguments import integer
from specops.projections import project_stable_rank
from specops.projections.stable_rank import check_stable_rank
from specops.rules.base import Figures, Schedule, Scheduled, measured_as, numbers_of, value_at
from specops.rules.stages import WeightRule
from specops.tracking import check_norm
from specops.typing import Array, State


@dataclass(frozen=True, kw_only=True, repr=False)
class ProjectStableRank(Scheduled, WeightRule):
    r"""Keep the stable rank :math:`\|W\|_F^2/\|W\|_2^2` at or below r: project if above.

    Parameters
    ----------
    ratio, target : float or callable
        Give exactly one of them: `target` is r itself, and `ratio` sets
        r = max(1, ratio · min(rows, columns)). Each may be a schedule
        ``(step, name, geometry) -> float``. Kernels of convolutions have a least stable rank,
        which is above 1 (n² for 1×1 taps on n×n points). A ratio that asks for less leads to
        that least stable rank; a target below it is refused.
    preserve : int
        How many leading singular triplets to keep; for matrices only.
    norm : "operator" or "reshaped"
        For a convolution: whether the stable rank is that of the layer's own map, or of the
        kernel reshaped to a matrix (as in the paper).

    Raises
    ------
    ValueError
        Neither or both of `ratio` and `target`, or a number out of range.

    References
    ----------
    Sanyal, Torr & Dokania 2020, Theorem 1.

    Examples
    --------
    >>> import numpy as np
    >>> from specops import Dense
    >>> rule = ProjectStableRank(target=1.5, preserve=1, norm="operator")
    >>> rule.update(np.eye(2), Dense(), {})[0].round(4)
    array([[1.    , 0.    ],
           [0.    , 0.7071]])
    """

    ratio: float | Schedule | None = None
    target: float | Schedule | None = None
    preserve: int = 0
    norm: Literal["operator", "reshaped"]
    limits_stable_rank: ClassVar[bool] = True
    numbers_at = numbers_of

    def __post_init__(self) -> None:
        check_norm(self.norm, ("operator", "reshaped"))
        integer(self.preserve, "preserve", least=0)
        fixed = [0.5 if callable(self.ratio) else self.ratio]
        fixed.append(2.0 if callable(self.target) else self.target)
        check_stable_rank(*fixed)

    def init(self, weight: Array, geometry: Geometry, name: str) -> State:
        """No state yet."""
        return {}

    def view(self, geometry: Geometry) -> Geometry:
        """The map whose stable rank is limited."""
        return measured_as(geometry, self.norm)

    @arrays.entry
    def update(
        self, weight: Array, geometry: Geometry, state: State, *, step: int = 1, name: str = ""
    ) -> tuple[Array, State, Figures]:
        """Project; the figures are ``rank_before``, ``rank_after`` and ``distance``."""
        project = partial(
            project_stable_rank,
            weight,
            self.view(geometry),
            ratio=value_at(self.ratio, step, name, geometry),
            target=value_at(self.target, step, name, geometry),
            preserve=self.preserve,
            return_info=True,
        )
        try:
            weight, info = project(state=state)
        except StateError:
            weight, info = project()
        figures = {key: getattr(info, key) for key in ("rank_before", "rank_after", "distance")}
        return weight, info.state, figures
