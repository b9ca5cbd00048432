"""Screening: the norm of a weight that was certified inside a ball is only estimated for a while.

The next certificate is due after some firings, or when an estimate is large or jumps.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from specops import arrays
from specops.errors import StateError
from specops.geometry import Dense, Geometry
from specops.projections.kernels.layer_ball import own_map
from specops.projections.kernels.solution import Tolerance
from specops.rules.base import Figures
from specops.tracking import (
    Steps,
    TrackedBlocks,
    TrackedOperator,
    TrackedTorus,
    checked,
    vectors,
)
from specops.typing import Array, State

CLEARLY = 0.9
"""An estimate, which is only a lower bound of the norm, is trusted below this part of the bound."""
CERTIFY_EVERY = 100
"""Firings from one certificate to the next: a choice. It divides the cost of certificates by a
hundred; for so many firings, a norm may be larger than its estimate shows."""
_STEADY = 0.1
"""Relative change of an estimate between two firings that training explains: a choice. After a
weight was loaded or reset, the old vectors see a fifth to a half of its norm, which is close to the
previous estimate only by chance."""
_TRACKED = "tracked."
FIRINGS = "firings"
"""Key of the state: firings since the last certificate, which counts as the first."""
SEEN = "seen"
"""Key of the state: the latest norm that was certified or trusted; in compiled code the latest
estimate."""


def parted(state: State) -> tuple[State, State]:
    """A state in two parts: (the state of the projection, the vectors for screening)."""
    tracked = {k.removeprefix(_TRACKED): v for k, v in state.items() if k.startswith(_TRACKED)}
    counted = (FIRINGS, SEEN)
    own = {k: v for k, v in state.items() if k not in counted and not k.startswith(_TRACKED)}
    return own, tracked


def follow_of(
    geometry: Geometry, weight: Array, distance_tolerance: float
) -> TrackedBlocks | TrackedOperator | TrackedTorus:
    """What tracks the norm that a projection with this tolerance constrains."""
    if isinstance(geometry, Dense):
        return TrackedBlocks(geometry)
    sizes = geometry.sizes(tuple(weight.shape))
    if own_map(sizes, Tolerance(0.0, distance_tolerance)) is not None:
        return TrackedOperator(geometry)
    return TrackedTorus(geometry)


def estimate(
    weight: Array,
    geometry: Geometry,
    state: State,
    *,
    to_left: bool,
    distance_tolerance: float,
) -> tuple[Array, State] | None:
    """(lower bounds of the norms, of shape (*batch[, blocks]); the new state); None: start anew.

    Matrices take half a power step per firing, from the left and from the right in turn: weights
    change little in between, and half a step reads a large weight only once.
    """
    follow = follow_of(geometry, weight, distance_tolerance)
    try:
        if isinstance(follow, TrackedTorus):
            return follow.estimate(weight, state)
        if isinstance(follow, TrackedOperator):
            state = follow.advance(weight, state)
        else:
            state = follow.half_advance(weight, state, to_left=to_left)
    except StateError:
        return None
    return seen_along(follow, state), state


def seen_along(follow: TrackedBlocks | TrackedOperator, state: State) -> Array:
    """The norms that the latest step measured; those of split blocks along a last axis."""
    norms, geometry = follow.measured(state), follow.geometry
    split = isinstance(geometry, Dense) and geometry.splits is not None
    return arrays.namespace(norms[0]).stack(norms, axis=-1) if split else norms[0]


def screened(geometry: Dense, state: State, bound: Any) -> Steps[tuple[State, Figures] | None]:
    """The result of `update` if the estimate is trusted and no certificate is due, else None."""
    follow, (own, tracked) = TrackedBlocks(geometry), parted(state)
    firings = int(arrays.to_numpy(state[FIRINGS]))
    tracked = yield from follow.half_advance_by_products(tracked, to_left=firings % 2 == 0)
    norm = seen_along(follow, tracked)
    firings = (firings + 1) % CERTIFY_EVERY
    if not firings or not is_trusted(norm, state, bound):
        return None
    return own | screening(tracked, firings, norm, norm), {"norm_before": norm, "norm_after": norm}


def is_trusted(norms: Array, state: State, bound: Any) -> bool:
    """Whether all estimates are clearly inside the bound and close to those of the last firing.

    An estimate that is not finite never is.
    """
    trusted, before = norms < CLEARLY * bound, _seen_before(norms, state)
    trusted = trusted if before is None else trusted & steady(norms, before)
    return bool(arrays.truth(arrays.namespace(norms).all(trusted)))


def is_steady(norms: Array, state: State) -> bool:
    """Whether all estimates are close to those of the last firing; else weights were replaced."""
    before = _seen_before(norms, state)
    if before is None:
        return True
    return bool(arrays.truth(arrays.namespace(norms).all(steady(norms, before))))


def steady(norms: Array, before: Array) -> Array:
    """Whether each estimate is close to the one before."""
    return arrays.namespace(norms).abs(norms - before) <= _STEADY * before


def _seen_before(norms: Array, state: State) -> Array | None:
    """The norms of the last firing; None if there are none of this shape."""
    try:
        return checked(state, SEEN, tuple(norms.shape), norms)
    except StateError:
        return None


def screening(tracked: State, firings: int, like: Array, seen: Array) -> State:
    """The state of the screen: the vectors, the number of firings, the latest norm."""
    counted = {FIRINGS: arrays.constant(np.asarray(firings), like), SEEN: seen}
    return prefixed(tracked, _TRACKED) | counted


def prefixed(tracked: State, prefix: str) -> State:
    return {prefix + key: x for key, x in vectors(tracked).items()}
