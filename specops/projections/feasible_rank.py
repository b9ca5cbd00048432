"""The end of a stable rank projection: a result that is feasible in the dtype it is stored in."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from specops import arrays
from specops.errors import StateError
from specops.typing import Array, Namespace, State

_STORE_ROUNDS = 24
"""Most rounds: a bound by reasoning, not a measurement. The least change doubles from ε/16 up to a
half, so in half precision ten of so many rounds take off a half; single and double precision need
one round, as storing does not round them."""
_STORE_ROUNDS_WHEN_TRACED = {True: 3, False: 1}
"""Rounds if storing rounds the entries (True) and if not: of 600 normal matrices in float16 and
bfloat16 none took more than 3."""
_LARGEST_HALF = 65504.0
"""The largest number in float16."""


@dataclass
class Candidates:
    """Weights ``weight(g)``: a part that stays, plus g times the rest of the weight."""

    weight: Callable[[Array], Array]
    rank: Callable[[Array], Array]
    """An upper bound of the stable rank of a stored candidate, from the part that stays."""
    wanted: Array
    """The g of the nearest one within the limit, of shape (*batch,)."""
    growth: Array
    """The growth of the stable rank with g²."""


def rank_limit(xp: Namespace, ratio: Any, target: Any, side: int, like: Array) -> Array:
    """r as a 0-d array."""
    value = target if ratio is None else ratio
    if arrays.is_array(value):
        value = xp.astype(value, arrays.real_dtype(xp, like.dtype))
    else:
        value = arrays.constant(np.asarray(float(value)), like)
    if ratio is not None:
        value = value * side
    return xp.where(value < 1.0, xp.ones_like(value), value)


def rank_tolerance(dtype: Any, compute_dtype: Any) -> float:
    """The relative excess that counts as rounding; storing in `dtype` adds the square of its ε."""
    return 8.0 * arrays.epsilon(compute_dtype) + arrays.epsilon(dtype) ** 2


def store_below(
    xp: Namespace, candidates: Candidates, dtype: Any, limit: Array, above: Array
) -> tuple[Array, Array, int]:
    """(candidate cast to `dtype`, its stable rank, rounds) with a rank of at most `limit`.

    Rounding adds to the rest of the weight, so as much more of the rest is removed, until the
    stored array is feasible or no rest is left. Only matrices where `above` is true count. While a
    compiler traces, a half precision dtype gets three rounds.
    """
    g = candidates.wanted
    eps = arrays.epsilon(dtype)
    for round_ in range(1, _STORE_ROUNDS + 1):
        stored = xp.astype(_in_range(xp, candidates.weight(g), dtype, g.ndim), dtype)
        wide = arrays.to_compute(xp, stored)
        rank = candidates.rank(wide)
        rounds = wide.dtype != stored.dtype
        feasible = rank <= limit * (1.0 + 4.0 * arrays.epsilon(wide.dtype))
        done = feasible | (g <= 0) | ~above
        finished = arrays.truth(xp.all(done))
        if finished or (finished is None and round_ == _STORE_ROUNDS_WHEN_TRACED[rounds]):
            break
        growth = candidates.growth
        excess = (rank - limit) / arrays.nonzero(xp, growth)
        squared = g**2 - 1.5 * excess
        less = xp.sqrt(xp.where(squared > 0, squared, xp.zeros_like(squared)))
        least_change = g * (1.0 - min(0.5, eps * 2.0 ** (round_ - 5)))
        g = xp.where(done, g, xp.where(less < least_change, less, least_change))
    return stored, rank, round_


def _in_range(xp: Namespace, x: Array, dtype: Any, batch: int) -> Array:
    """`x` scaled down if float16 would overflow, which does not change its stable rank."""
    if arrays.dtype_name(dtype) != "float16":
        return x
    largest = xp.max(xp.abs(x), axis=tuple(range(batch, x.ndim)), keepdims=True)
    factor = _LARGEST_HALF / arrays.nonzero(xp, largest)
    return x * xp.where(largest > _LARGEST_HALF, factor, xp.ones_like(factor))


def energy(xp: Namespace, a: Array) -> Array:
    """Squared Frobenius norms; row by row, so that single precision sums stay accurate."""
    return xp.sum(xp.sum(xp.abs(a) ** 2, axis=-1), axis=-1)


def shape_of(value: Any) -> str:
    """The shape of a state's entry, or its type, for messages."""
    return str(tuple(value.shape)) if hasattr(value, "shape") else type(value).__name__


def refuse_unread(state: State) -> None:
    """Raise StateError if entries of a state are left, which nothing has used."""
    if state:
        found = ", ".join(f"{name} {shape_of(value)}" for name, value in state.items())
        raise StateError(f"state does not belong to this weight and options: it holds {found}")
