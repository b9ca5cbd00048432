"""The steps of `specops.tracking.power` for one real matrix on the host, in few calls.

On a small layer a step takes the time of its calls: some four hundred microseconds in the general
form, about forty here. Within a step vectors are kept in double precision.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from specops import arrays

_ORDINARY = {4: (1e-60, 1e60), 8: (1e-280, 1e280)}
"""The range of squared lengths, by item size, in which products neither overflow nor underflow."""
_TWICE_IS_ENOUGH = 0.7
"""If a unit vector's part orthogonal to another is at least so long, rounding spoils no angle."""


class Unusual(Exception):
    """Raised for numbers that only the general form handles correctly."""


class Side(NamedTuple):
    """The side to which a step goes, and the constants of `specops.tracking.power`."""

    to_left: bool
    stir: float
    reluctance: float
    independent: float


Products = tuple[Callable[[np.ndarray], np.ndarray], Callable[[np.ndarray], np.ndarray]]
"""Two functions: for an array with rows x they give Ax, and Aᵀx, as rows."""


def step(
    products: Products, dtype: Any, near: np.ndarray, side: Side
) -> tuple[np.ndarray, np.ndarray, float]:
    """(both vectors of one side, turned; both of the other side; the length of the first image).

    `near` holds the leading vector and the second one as rows, in double precision.
    """
    to_left, stir, reluctance, independent = side
    far = products[0 if to_left else 1](near.astype(dtype)).astype(np.float64)
    (aa, ab), (_, bb) = far.dot(far.T).tolist()
    least, greatest = _ORDINARY[dtype.itemsize]
    if not least < aa + bb < greatest:
        raise Unusual
    angle = 0.5 * math.atan2(2.0 * abs(ab), aa - bb + reluctance * (aa + bb))
    cos, sin = math.cos(angle), math.sin(angle)
    # The second vector gets the sign with which its image has a positive overlap with the first's.
    sign = math.copysign(1.0, ab)
    turn = np.array(((cos, sin * sign), (-sin, cos * sign)))
    far, length = _orthonormal(turn.dot(far), stir, independent)
    return turn.dot(near), far, length


def _orthonormal(rows: np.ndarray, stir: float, independent: float) -> tuple[np.ndarray, float]:
    """(a unit vector along the first row and one orthogonal to it, the length of the first row).

    By the Gram matrix of the rows, which is a single call.
    """
    noise = 0.0
    if stir:
        rows = np.concatenate((rows, _noise(rows.shape[1])))
    gram = rows.dot(rows.T).tolist()
    length, size = math.sqrt(gram[0][0]), math.sqrt(gram[1][1])
    own = 1.0 / size if size > 0 else 0.0
    overlap, squared = own * gram[0][1], own * size
    if stir:
        # The sign of a vector is arbitrary, and must not matter to the mixture.
        noise = math.copysign(stir, gram[1][2])
        overlap += noise * gram[0][2]
        squared += noise * (2.0 * own * gram[1][2] + noise)
    overlap /= length
    left = math.sqrt(max(squared - overlap**2, 0.0))
    part = 1.0 / left if left > independent else 0.0
    mix = ((1.0 / length, 0.0, 0.0), (-part * overlap / length, part * own, part * noise))
    rows = np.array(mix)[:, : len(rows)].dot(rows)
    if part > 0.0 and left < _TWICE_IS_ENOUGH:
        rows, _ = _orthonormal(rows, 0.0, independent)
    return rows, length


@lru_cache(maxsize=256)
def _noise(size: int) -> np.ndarray:
    """The fixed direction that is mixed into the second pair, as a row."""
    return arrays.start_vector("look-out", size)[None, :]
