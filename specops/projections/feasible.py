"""Ending a projection: feasible in the dtype that it is stored in, and measured there."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from specops import backend

Array = Any
_ROUNDS = 24


@dataclass
class ProjectionInfo:
    """What a projection did.

    Attributes
    ----------
    norm_before, norm_after : array
        The constrained norm of the weight given and of the weight returned, the latter
        measured as stored. Shape (\\*batch,), one more axis for ``Dense(splits=...)``. For a
        zero-padded Conv these are upper bounds: norms on the torus that contains the layer.
    iterations : int
        Rounds that an iterative method took; 0 if the weight was inside, 1 for a direct one.
    state : dict of str to array
        What the next call on a similar weight may start from.
    """

    norm_before: Array
    norm_after: Array
    iterations: int
    state: dict[str, Array] = field(default_factory=dict)


def store_within(
    xp: Any,
    x: Array,
    dtype: Any,
    limit: Array,
    measure: Callable[[Array], Array],
) -> tuple[Array, Array]:
    """Cast `x` to `dtype`, shrunk until ``measure`` of the stored array is at most `limit`.

    `limit` and the measured norm broadcast against the leading axes of `x`. Returns the array
    and its norm. While a compiler traces, two rounds run and the result may exceed the limit by
    the rounding of `dtype`.
    """
    eps = backend.epsilon(dtype)
    shrink = xp.ones_like(limit)
    for round_ in range(_ROUNDS):
        stored = xp.astype(x * _expand(shrink, x), dtype)
        norm = measure(backend.to_compute(xp, stored))
        fits = backend.truth(xp.all(norm <= limit))
        if fits or (fits is None and round_ == 2):
            break
        above = norm > limit
        safe = xp.where(above, norm, xp.ones_like(norm))
        ratio = xp.where(above, limit / safe * (1.0 - min(0.5, eps * 2.0 ** (round_ - 5))), shrink)
        shrink = xp.where(above, shrink * ratio, shrink)
    return stored, norm


def _expand(factor: Array, x: Array) -> Array:
    return factor[(..., *([None] * (x.ndim - factor.ndim)))]
