"""`ClipSpectralNorm`: the nearest weight inside the spectral ball, screened by an estimate."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import numpy as np

from specops import arrays
from specops.errors import StateError
from specops.geometry import Conv, Dense, Geometry
from specops.geometry.arguments import non_negative
from specops.maps.every_size import on_a_torus
from specops.projections import project_spectral_ball
from specops.rules.base import (
    Figures,
    Schedule,
    Scheduled,
    bound_at,
    check_scheduled,
    measured_as,
    shown,
)
from specops.rules.screening import (
    CERTIFY_EVERY,
    CLEARLY,
    FIRINGS,
    SEEN,
    estimate,
    follow_of,
    is_steady,
    is_trusted,
    parted,
    prefixed,
    screened,
    screening,
    seen_along,
    steady,
)
from specops.rules.stages import WeightRule
from specops.tracking import (
    Steps,
    TrackedBlocks,
    TrackedOperator,
    check_norm,
)
from specops.typing import Array, State

_WATCHED = "watched."
_SHORT = "short"
"""Key of the state: the last certified norm, divided by the estimate at the same firing."""


@dataclass(frozen=True)
class ClipSpectralNorm(Scheduled, WeightRule):
    """Keep the operator norm of a weight at or below `max_norm`, by projecting weights above it.

    The norm is that of the operator (for a convolution, of the layer), unless `norm` says
    otherwise.

    A decomposition at every firing would be expensive, so a weight that was found inside is only
    screened from then on: its leading singular vectors are kept, and each firing takes one power
    step on them. While the norm that this gives stays below 0.9 of the bound, the weight is left
    alone. The norm is certified, as `enforce` always does, if the estimate is above that, if it has
    changed by more than a tenth since the firing before (as after loading or resetting weights),
    and at the first and every 100th firing. The estimate, which the figures show, is a lower bound
    of the norm. Compiled loops in JAX never start the vectors anew; there the estimate is
    multiplied by the factor by which it fell short of the norm at the last certificate, and the
    product is no bound.

    A small zero-padded convolution ends at the bound. A larger one ends below it, since a torus
    that contains it is constrained: one projection leaves it up to a few per cent lower, and many
    projections in training add up on grids of few points (in the example on digits 48 channels
    ended at 0.85 of the bound on 4×4, others at 0.98 on 8×8).
    Compiled, any convolution may end below it: by up to a tenth on grids of few points, by more
    where the strides of a circular one do not divide its grid. `project_spectral_ball` says which.

    Parameters
    ----------
    max_norm : float or callable
        The bound, or a schedule ``(step, name, geometry) -> float``.
    norm : "operator" or "reshaped"
        For a convolution: the layer's own norm, or that of the kernel reshaped to (out, in·k),
        whose singular values are then clipped. That is not the layer's norm, which may be up to √k
        times as large with k taps: bound, figures and `enforce` are about the reshaped kernel.
    distance_tolerance : float
        Convolutions move at most ``1 + distance_tolerance`` times as far as the nearest weight
        inside the bound is away, or end within a hundredth of their own Frobenius norm of it,
        whichever is certified first; 0 asks for the latter alone, at three to many times the cost.
        The remaining deviation is mostly that a kernel shrinks as a whole, which adds up over
        firings. 0.25 takes a third less time in training.
    screen : bool
        Whether to screen as above; False certifies the norm at every firing.

    Raises
    ------
    ValueError
        The bound is not positive and finite, the tolerance is negative, or the norm unknown.

    References
    ----------
    Sedghi, Gupta & Long 2019, section 4.4, for the reshaped kernel.
    """

    max_norm: float | Schedule
    distance_tolerance: float = field(default=0.1, repr=False)
    screen: bool = field(default=True, repr=False)
    norm: Literal["operator", "reshaped"] = field(default="operator", kw_only=True)

    def __post_init__(self) -> None:
        check_scheduled(self.max_norm, "max_norm")
        check_norm(self.norm, ("operator", "reshaped"))
        non_negative(self.distance_tolerance, "distance_tolerance")

    def __repr__(self) -> str:
        norm = "" if self.norm == "operator" else f", norm={self.norm!r}"
        return f"{type(self).__name__}(max_norm={shown(self.max_norm)}{norm})"

    def init(self, weight: Array, geometry: Geometry, name: str) -> State:
        """No state yet."""
        return {}

    def view(self, geometry: Geometry) -> Geometry:
        """The map whose norm is bounded."""
        return measured_as(geometry, self.norm)

    @arrays.entry
    def watch(self, weight: Array, geometry: Geometry, name: str) -> State:
        """A state for compiled loops, whose keys and shapes stay; {} without screening.

        With this state `update` decides on the device whether to project. The vectors follow the
        norm of `view` itself or, where that has no input size, the norm on a small torus.
        """
        if not self.screen:
            return {}
        follow = _own_norm(self._map(weight, geometry), tuple(weight.shape))
        started = follow.start(weight, name)
        seen, none = seen_along(follow, started), arrays.constant(np.asarray(0.0), weight)
        one = arrays.namespace(weight).ones_like(seen)
        return prefixed(started, _WATCHED) | {FIRINGS: none, SEEN: seen, _SHORT: one}

    @arrays.entry
    def update(
        self, weight: Array, geometry: Geometry, state: State, *, step: int = 1, name: str = ""
    ) -> tuple[Array, State, Figures]:
        """Project where needed; the figures are ``norm_before`` and ``norm_after``."""
        bound = self._bound(step, name, geometry)
        geometry = self._map(weight, geometry)
        if any(key.startswith(_WATCHED) for key in state):
            return self._watched(weight, geometry, state, bound)
        own, tracked = parted(state)
        seen, firings = None, 0
        if tracked and arrays.is_concrete(weight):
            firings = int(arrays.to_numpy(state[FIRINGS]))
            seen = estimate(
                weight,
                geometry,
                tracked,
                to_left=firings % 2 == 0,
                distance_tolerance=self.distance_tolerance,
            )
        if seen is not None and is_trusted(seen[0], state, bound):
            norm, tracked = seen
            figures = {"norm_before": norm, "norm_after": norm}
            firings = (firings + 1) % CERTIFY_EVERY
            if firings or self._is_inside(weight, bound, geometry):
                return weight, own | screening(tracked, firings, weight, norm), figures
        followed = seen[1] if seen is not None and is_steady(seen[0], state) else None
        return self._certified(weight, geometry, own, followed, bound, name)

    def by_products(
        self, geometry: Geometry, state: State, *, step: int = 1, name: str = ""
    ) -> Steps[tuple[State, Figures] | None] | None:
        """A firing of matrices that the estimate alone decides."""
        bound = self._bound(step, name, geometry)
        geometry = self.view(geometry)
        if not parted(state)[1] or not isinstance(geometry, Dense):
            return None
        return screened(geometry, state, bound)

    @arrays.entry
    def enforce(
        self, weight: Array, geometry: Geometry, state: State, *, step: int = 1, name: str = ""
    ) -> tuple[Array, State, Figures]:
        """As `update`, but always with a certified norm."""
        bound = self._bound(step, name, geometry)
        geometry = self._map(weight, geometry)
        own, tracked = parted(state)
        # It starts no vectors for screening: the next firing does, if there is one.
        return self._certified(weight, geometry, own, tracked or None, bound, name, screens=False)

    def refuses_nonfinite(self, geometry: Geometry) -> bool:
        """True but for stacks, of which it may leave alone matrices that it estimates inside."""
        return not (isinstance(geometry, Dense) and geometry.batch_axes)

    def costly_to_compile(self, geometry: Geometry) -> bool:
        """True for convolutions: how many decompositions they take depends on the values."""
        return isinstance(self.view(geometry), Conv)

    def numbers_at(self, step: int, name: str, geometry: Geometry) -> dict[str, Any]:
        """The bound, if it is a schedule or an array; NaN for an invalid one under a compiler.

        `numbers_of` would not check it, and the host, which may be called back, would raise.
        """
        if not (callable(self.max_norm) or arrays.is_array(self.max_norm)):
            return {}
        return {"max_norm": self._bound(step, name, geometry)}

    def _bound(self, step: int, name: str, geometry: Geometry) -> Any:
        return bound_at(self.max_norm, step, name, geometry, "max_norm")

    def _map(self, weight: Array, geometry: Geometry) -> Geometry:
        """The `view`; if its map consists of copies of one matrix, that matrix."""
        geometry = self.view(geometry)
        if isinstance(geometry, Conv):
            return geometry.repeated_matrix(tuple(weight.shape)) or geometry
        return geometry

    def _watched(
        self, weight: Array, geometry: Geometry, state: State, bound: Any
    ) -> tuple[Array, State, Figures]:
        """`update` in a compiled loop: the estimate decides on the device whether to project."""
        xp, follow = arrays.namespace(weight), _own_norm(geometry, tuple(weight.shape))
        own = {k.removeprefix(_WATCHED): v for k, v in state.items() if k.startswith(_WATCHED)}
        moved = follow.advance(weight, own)
        found, short = seen_along(follow, moved), state[_SHORT]
        # Among many large values one step per firing finds the largest slowly: hence the factor.
        seen = found * short
        firings = state[FIRINGS]
        trusted = xp.all((seen < CLEARLY * bound) & steady(found, state[SEEN]))
        trusted = trusted & (firings > 0) & (firings < CERTIFY_EVERY)

        def certify() -> tuple[Array, Array, Array]:
            new, info = project_spectral_ball(
                weight,
                bound,
                geometry,
                distance_tolerance=self.distance_tolerance,
                return_info=True,
            )
            return new, *(xp.astype(x, seen.dtype) for x in (info.norm_before, info.norm_after))

        new, before, after = arrays.cond(trusted, lambda: (weight, seen, seen), certify)
        inside = xp.astype(xp.all(before <= bound), firings.dtype)
        firings = xp.where(trusted, firings + 1.0, inside)
        one = xp.ones_like(short)
        now = before / xp.where(found > 0, found, one)
        short = xp.where(trusted, short, xp.where((found > 0) & (now > 1), now, one))
        figures = {"norm_before": before, "norm_after": after}
        counted = {FIRINGS: firings, SEEN: found, _SHORT: short}
        return new, prefixed(moved, _WATCHED) | counted, figures

    def _is_inside(self, weight: Array, bound: Any, geometry: Geometry) -> bool:
        """Whether the weight is certified to be inside; measures no more than that takes."""
        tolerance = self.distance_tolerance
        new = project_spectral_ball(weight, bound, geometry, distance_tolerance=tolerance)
        return new is weight

    def _certified(
        self,
        weight: Array,
        geometry: Geometry,
        own: State,
        tracked: State | None,
        bound: Any,
        name: str,
        *,
        screens: bool = True,
    ) -> tuple[Array, State, Figures]:
        """Project, with a certified norm; `screens`: a weight inside is screened from now on."""
        project = partial(
            project_spectral_ball,
            weight,
            bound,
            geometry,
            distance_tolerance=self.distance_tolerance,
            return_info=True,
        )
        try:
            new, info = project(state=own)
        except StateError:
            # The state belongs to another input size, layer or shape.
            new, info = project()
        figures = {"norm_before": info.norm_before, "norm_after": info.norm_after}
        state = dict(info.state)
        if self.screen and new is weight and arrays.is_concrete(weight):
            # Inside: the next firings only estimate the norm.
            if screens and not tracked:
                follow = follow_of(geometry, weight, self.distance_tolerance)
                tracked = follow.start(weight, name)
            state |= screening(tracked, 1, weight, info.norm_before) if tracked else {}
        return new, state, figures


def _own_norm(geometry: Geometry, shape: tuple[int, ...]) -> TrackedBlocks | TrackedOperator:
    """What estimates the layer's norm in compiled code; without an input size, on a torus."""
    if isinstance(geometry, Dense):
        return TrackedBlocks(geometry)
    return TrackedOperator(geometry if geometry.grid is not None else on_a_torus(geometry, shape))
