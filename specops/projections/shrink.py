"""Ending a stable rank projection: shrunk until it holds in the dtype that it is stored in."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from specops import arrays
from specops.typing import Array

_ROUNDS = 24
_ROUNDS_WHEN_TRACED = {True: 3, False: 1}
"""By whether storing rounds."""
_LARGEST_HALF = 65504.0


@dataclass
class StableRankInfo:
    """What a stable rank projection did.

    Attributes
    ----------
    rank_before, rank_after : array
        Stable rank of the weight given and of the weight returned, the latter measured as
        stored. Shape (\\*batch,), one more axis for ``Dense(splits=...)``. Upper bounds, as
        they divide by a lower bound of the norm: sharp for Dense and for a Conv that is given,
        within 0.1 % for one that is returned unless its iteration was cut short.
    distance : array
        Frobenius norm of the change, of the same shape.
    preserved : int or array
        Leading singular triplets that were kept exactly: the largest feasible number up to
        `preserve`, of the same shape; 0 for ``preserve=0``.
    iterations : int
        0 if the weight was inside; for Dense, how often it was rounded to its dtype until that
        held; for a Conv, along how many axes it was projected.
    state : dict of str to array
        What the next call on a similar weight may start from; empty where nothing is gained.
    """

    rank_before: Array
    rank_after: Array
    distance: Array
    preserved: Array
    iterations: int
    state: dict[str, Array] = field(default_factory=dict)


@dataclass
class Family:
    """Candidates ``place(g)``: a part that stays, plus g times the rest of the weight."""

    place: Callable[[Array], Array]
    measure: Callable[[Array], Array]
    """An upper bound of the stable rank of a candidate, from the part that stays."""
    share: Array
    """The g wanted, of shape (*batch,)."""
    slope: Array
    """Growth of the stable rank with g²."""


def rank_tolerance(dtype: Any, compute_dtype: Any) -> float:
    """Relative excess that is put down to rounding: entries stored in `dtype` add its square."""
    return 8.0 * arrays.epsilon(compute_dtype) + arrays.epsilon(dtype) ** 2


def store_below(
    xp: Any, family: Family, dtype: Any, limit: Array, above: Array
) -> tuple[Array, Array, int]:
    """(candidate cast to `dtype`, its stable rank, rounds) with a rank of at most `limit`.

    Rounding adds to the rest of the weight, so as much more of the rest is taken off, until the
    stored array holds or no rest is left. Only matrices where `above` count. While a compiler
    traces, a half precision dtype gets three rounds.
    """
    share = family.share
    eps = arrays.epsilon(dtype)
    for round_ in range(1, _ROUNDS + 1):
        stored = xp.astype(_in_range(xp, family.place(share), dtype, share.ndim), dtype)
        wide = arrays.to_compute(xp, stored)
        rank = family.measure(wide)
        rounds = wide.dtype != stored.dtype
        holds = rank <= limit * (1.0 + 4.0 * arrays.epsilon(wide.dtype))
        done = holds | (share <= 0) | ~above
        finished = arrays.truth(xp.all(done))
        if finished or (finished is None and round_ == _ROUNDS_WHEN_TRACED[rounds]):
            break
        slope = family.slope
        excess = (rank - limit) / xp.where(slope > 0, slope, xp.ones_like(slope))
        squared = share**2 - 1.5 * excess
        less = xp.sqrt(xp.where(squared > 0, squared, xp.zeros_like(squared)))
        least_change = share * (1.0 - min(0.5, eps * 2.0 ** (round_ - 5)))
        share = xp.where(done, share, xp.where(less < least_change, less, least_change))
    return stored, rank, round_


def _in_range(xp: Any, x: Array, dtype: Any, batch: int) -> Array:
    """`x` scaled down, which leaves its stable rank alone, where float16 would overflow."""
    if arrays.dtype_name(dtype) != "float16":
        return x
    largest = xp.max(xp.abs(x), axis=tuple(range(batch, x.ndim)), keepdims=True)
    factor = _LARGEST_HALF / nonzero(xp, largest)
    return x * xp.where(largest > _LARGEST_HALF, factor, xp.ones_like(factor))


def energy(xp: Any, a: Array) -> Array:
    """Squared Frobenius norms; row by row, so that single precision sums stay accurate."""
    return xp.sum(xp.sum(xp.abs(a) ** 2, axis=-1), axis=-1)


def nonzero(xp: Any, x: Array) -> Array:
    """`x` as a divisor: 1 where it is 0."""
    return xp.where(x == 0, xp.ones_like(x), x)


def shape_of(value: Any) -> str:
    """What to say of a state's entry."""
    return str(tuple(value.shape)) if hasattr(value, "shape") else type(value).__name__
