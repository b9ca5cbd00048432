"""Screening of weights that were found inside a ball: by estimates, until a certificate is due."""

from __future__ import annotations

from typing import Any

import numpy as np

from specops import arrays
from specops.errors import StateError
from specops.geometry import Dense, Geometry
from specops.maps.explicit import small_explicit_map
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
"""Part of the bound below which an estimate, which is a lower bound, is trusted."""
CERTIFY_EVERY = 100
"""Firings at which estimates are trusted before a certificate again: a choice that leaves it a
hundredth of its cost, against steps for which a norm may be above what was seen of it."""
_STEADY = 0.1
"""Relative change of an estimate between firings up to which training explains it: a choice. Along
old vectors of a weight that was loaded or reset it is a fifth to a half of the norm, which only by
chance is what it was."""
_TRACKED = "tracked."
FIRINGS = "firings"
SEEN = "seen"
"""The latest estimate, that was trusted if the rule is not compiled."""


def parted(state: State) -> tuple[State, State]:
    """(state of the projection, vectors of the screen)."""
    tracked = {k.removeprefix(_TRACKED): v for k, v in state.items() if k.startswith(_TRACKED)}
    counted = (FIRINGS, SEEN)
    own = {k: v for k, v in state.items() if k not in counted and not k.startswith(_TRACKED)}
    return own, tracked


def follow_of(geometry: Geometry, weight: Array) -> TrackedBlocks | TrackedOperator | TrackedTorus:
    """What follows the norm that the projection constrains."""
    if isinstance(geometry, Dense):
        return TrackedBlocks(geometry)
    if small_explicit_map(geometry.sizes(tuple(weight.shape))) is not None:
        return TrackedOperator(geometry)
    return TrackedTorus(geometry)


def estimate(
    weight: Array, geometry: Geometry, state: State, *, to_left: bool
) -> tuple[Array, State] | None:
    """(norms of shape (*batch[, blocks]) from below, the new state); None: start anew.

    Matrices take half a step at a firing, to one side and to the other in turn: weights move
    little in between, and large ones cost what it takes to read them.
    """
    follow = follow_of(geometry, weight)
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
    """The norms that the latest step gave; those of split blocks along a last axis."""
    norms, geometry = follow.measured(state), follow.geometry
    split = isinstance(geometry, Dense) and geometry.splits is not None
    return arrays.namespace(norms[0]).stack(norms, axis=-1) if split else norms[0]


def screened(geometry: Dense, state: State, bound: Any) -> Steps[tuple[State, Figures] | None]:
    """`update` where the estimate is clearly inside and no certificate is due; else None."""
    follow, (own, tracked) = TrackedBlocks(geometry), parted(state)
    firings = int(arrays.to_numpy(state[FIRINGS]))
    tracked = yield from follow.half_advance_by_products(tracked, to_left=firings % 2 == 0)
    norm = seen_along(follow, tracked)
    firings = (firings + 1) % CERTIFY_EVERY
    if not firings or not is_trusted(norm, state, bound):
        return None
    return own | screening(tracked, firings, norm, norm), {"norm_before": norm, "norm_after": norm}


def is_trusted(norms: Array, state: State, bound: Any) -> bool:
    """Whether estimates are clearly inside, and about those of the firing before.

    One that is not finite is neither.
    """
    trusted, before = norms < CLEARLY * bound, _seen_before(norms, state)
    trusted = trusted if before is None else trusted & steady(norms, before)
    return bool(arrays.truth(arrays.namespace(norms).all(trusted)))


def is_steady(norms: Array, state: State) -> bool:
    """Whether estimates are about those of the firing before; else weights were replaced."""
    before = _seen_before(norms, state)
    if before is None:
        return True
    return bool(arrays.truth(arrays.namespace(norms).all(steady(norms, before))))


def steady(norms: Array, before: Array) -> Array:
    """For each estimate, whether it is about what it was."""
    return arrays.namespace(norms).abs(norms - before) <= _STEADY * before


def _seen_before(norms: Array, state: State) -> Array | None:
    """Those of the firing before; None where there are none, or of another shape."""
    try:
        return checked(state, SEEN, tuple(norms.shape), norms)
    except StateError:
        return None


def screening(tracked: State, firings: int, like: Array, seen: Array) -> State:
    """The vectors alone, how often they were trusted, and what was seen along them."""
    counted = {FIRINGS: arrays.constant(np.asarray(firings), like), SEEN: seen}
    return prefixed(tracked, _TRACKED) | counted


def prefixed(tracked: State, prefix: str) -> State:
    return {prefix + key: x for key, x in vectors(tracked).items()}
