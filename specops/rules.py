"""Rules: what is done to one weight, and when in a training step.

A rule is a frozen dataclass with three members. `stage` says when it acts: "weights" after the
optimizer's step, "gradients" before it, "forward" in every forward pass. `init` makes its
state, a flat dict of arrays. `update` is pure: it takes the weight and the state and returns
the new weight, the new state and figures for the history. It returns the weight itself, not a
copy, where it changes nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar, Literal, Protocol, runtime_checkable

from specops.errors import StateError
from specops.geometry import Conv, Geometry
from specops.geometry.arguments import check_bound, non_negative
from specops.projections import project_spectral_ball
from specops.spectra import spectral_norm, spectral_norm_bounds, stable_rank

Array = Any
State = dict[str, Array]
Schedule = Callable[[int, str, Geometry], float]


@runtime_checkable
class Rule(Protocol):
    """What every rule has; third-party rules need nothing more."""

    @property
    def stage(self) -> Literal["weights", "gradients", "forward"]: ...

    def init(self, weight: Array, geometry: Geometry, name: str) -> State:
        """The state before the first firing."""

    def update(
        self, weight: Array, geometry: Geometry, state: State, *, step: int = 1, name: str = ""
    ) -> tuple[Array, State, dict[str, Array]]:
        """One firing at `step` (counted from 1): (weight, state, figures)."""


@dataclass(frozen=True)
class ClipSpectralNorm:
    """Keep the operator norm of a weight at or below `max_norm`: project if above, else nothing.

    The norm is the operator's own: for a convolution that of the layer, not of the reshaped
    kernel.

    Parameters
    ----------
    max_norm : float or callable
        The bound, or a schedule ``(step, name, geometry) -> float``.
    distance_tolerance : float
        Convolutions move at most ``1 + distance_tolerance`` times as far as the nearest weight
        inside the bound is away; 0 asks for that weight itself and takes three times as long.

    Raises
    ------
    ValueError
        A bound that is not positive and finite, a negative tolerance.
    """

    max_norm: float | Schedule
    distance_tolerance: float = field(default=0.1, repr=False)
    stage: ClassVar[Literal["weights"]] = "weights"

    def __post_init__(self) -> None:
        if not callable(self.max_norm):
            check_bound(self.max_norm, "max_norm")
        non_negative(self.distance_tolerance, "distance_tolerance")

    def init(self, weight: Array, geometry: Geometry, name: str) -> State:
        """No state yet."""
        return {}

    def update(
        self, weight: Array, geometry: Geometry, state: State, *, step: int = 1, name: str = ""
    ) -> tuple[Array, State, dict[str, Array]]:
        """Project; the figures are ``norm_before`` and ``norm_after``."""
        bound = self.max_norm(step, name, geometry) if callable(self.max_norm) else self.max_norm
        project = partial(
            project_spectral_ball,
            weight,
            bound,
            geometry,
            distance_tolerance=self.distance_tolerance,
            return_info=True,
        )
        try:
            weight, info = project(state=state)
        except StateError:
            # The input size, the layer or its shape has changed since.
            weight, info = project()
        figures = {"norm_before": info.norm_before, "norm_after": info.norm_after}
        return weight, info.state, figures


@dataclass(frozen=True)
class Monitor:
    """Measure and change nothing.

    Figures: ``spectral_norm`` and ``stable_rank``; for a convolution without input size
    ``norm_upper``, a bound for every size.
    """

    stage: ClassVar[Literal["weights"]] = "weights"

    def init(self, weight: Array, geometry: Geometry, name: str) -> State:
        """No state."""
        return {}

    def update(
        self, weight: Array, geometry: Geometry, state: State, *, step: int = 1, name: str = ""
    ) -> tuple[Array, State, dict[str, Array]]:
        """Measure."""
        if isinstance(geometry, Conv) and geometry.grid is None:
            return weight, state, {"norm_upper": spectral_norm_bounds(weight, geometry).upper}
        return (
            weight,
            state,
            {
                "spectral_norm": spectral_norm(weight, geometry),
                "stable_rank": stable_rank(weight, geometry),
            },
        )
