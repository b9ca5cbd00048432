"""Certified bounds of the norm of a large matrix, to 1e-3 from one Gram matrix, or to 1e-5.

The lower bound comes from a vector, the upper one from a Cholesky factor, which exists only for
limits above the norm.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from specops.arrays import host
from specops.linalg.golub_kahan import largest_singular_triplet
from specops.linalg.rounding import CHOLESKY_MARGIN
from specops.maps.matrix import MatrixOperator

_SLICE_ENTRIES = 2**20
"""Entries that are cast to double precision at a time: a choice of memory, 8 MiB."""
_SUMMED = 4096
"""Rows that are summed in single precision: such sums drift by less than the factor's margin."""
_SINGLE_FROM = 2048
"""With a larger smaller side single precision is tried first: at 4096² it took 3.7 s of processor
time, and double 11.2 s. A choice: for smaller matrices it hardly matters."""
_STEPS = 32
"""Steps of Lanczos on the Gram matrix, each of which takes half the time of a step on A. For six
normal matrices of 2304² to 4096² the norm was at most 8e-5 too small after so many, 3e-3 after 24.
Of 45 of 4096² four were more than 5e-4 too small, and none after twice as many."""
_ROOM = 5e-4
"""How far above the lower bound, relatively, the Cholesky factor is tried."""


@dataclass(frozen=True)
class Bounds:
    """Bounds of the norm of a matrix, and its Frobenius norm."""

    lower: float
    upper: float
    frobenius: float


def norm_bounds(a: np.ndarray) -> Bounds:
    """Bounds for a nonzero matrix (m, n), scaled so that squares neither overflow nor underflow.

    The upper bound comes from a Cholesky factor as in `specops.linalg.inside`; if there is none, it
    is the Frobenius norm.
    """
    a = a if a.shape[0] >= a.shape[1] else a.T
    single = a.real.dtype == np.float32
    found = _by_single(a) if single and a.shape[1] > _SINGLE_FROM else None
    return _by_double(a) if found is None else found


def _by_single(a: np.ndarray) -> Bounds | None:
    """Bounds to 6e-4; None if Lanczos is not that accurate after few steps, or twice as many."""
    v = _start(a.shape[1], a)
    for _ in range(2):
        gram = _gram(a, a.dtype, _SUMMED)
        v = largest_singular_triplet(np, MatrixOperator(gram), v, max_steps=_STEPS)[2]
        sigma, frobenius = _measured(a, v)
        limit = sigma * (1.0 + _ROOM)
        gram *= -1.0
        np.einsum("ii->i", gram)[...] += a.real.dtype.type(limit**2)
        if host.have_factors(gram):
            upper = limit / (1.0 - CHOLESKY_MARGIN["float32"])
            return Bounds(_below(a, sigma), min(upper, _above(a, frobenius)), frobenius)
    return None


def _by_double(a: np.ndarray) -> Bounds:
    """Bounds to 1e-5, if Lanczos has converged."""
    v = largest_singular_triplet(np, MatrixOperator(a), _start(a.shape[1], a), tolerance=1e-5)[2]
    sigma, frobenius = _measured(a, v)
    gram = _gram(a, np.result_type(a, np.float64), _slice(a))
    gram *= -1.0
    diagonal = np.einsum("ii->i", gram)
    step, added = 1e-5, 0.0
    while sigma * (1.0 + step) < frobenius:
        bound = sigma * (1.0 + step)
        diagonal += bound**2 - added
        added = bound**2
        try:
            np.linalg.cholesky(gram)
        except np.linalg.LinAlgError:
            step *= 10.0
            continue
        upper = bound * (1.0 + sum(a.shape) * np.finfo(float).eps)
        return Bounds(_below(a, sigma), upper, frobenius)
    return Bounds(_below(a, sigma), _above(a, frobenius), frobenius)


def _gram(a: np.ndarray, dtype: np.dtype, step: int) -> np.ndarray:
    """AᴴA, summed over slices of `step` rows, which saves memory for copies."""
    total: np.ndarray | None = None
    for at in range(0, len(a), step):
        rows = a[at : at + step].astype(dtype, copy=False)
        # For a product of a matrix with its own transpose NumPy computes only half.
        part = (rows.conj() if np.iscomplexobj(rows) else rows).T @ rows
        if total is None:
            total = part
        else:
            total += part
    assert total is not None
    return total


def _measured(a: np.ndarray, v: np.ndarray) -> tuple[float, float]:
    """(‖A v‖/‖v‖, ‖A‖_F) in double precision: the first is a lower bound of the norm."""
    wide = np.result_type(a, np.float64)
    v = v.astype(wide)
    squares = image = 0.0
    for at in range(0, len(a), _slice(a)):
        rows = a[at : at + _slice(a)].astype(wide)
        squares += float(np.vdot(rows, rows).real)
        image += float(np.linalg.norm(rows @ v)) ** 2
    return math.sqrt(image) / float(np.linalg.norm(v)), math.sqrt(squares)


def _start(size: int, like: np.ndarray) -> np.ndarray:
    return np.asarray(np.random.default_rng(0).normal(size=size)).astype(like.dtype)


def _slice(a: np.ndarray) -> int:
    return max(1, _SLICE_ENTRIES // int(a.shape[1]))


def _below(a: np.ndarray, sigma: float) -> float:
    """A lower bound: σ less the rounding of a product."""
    return sigma * (1.0 - sum(a.shape) * float(np.finfo(float).eps))


def _above(a: np.ndarray, frobenius: float) -> float:
    """An upper bound: the Frobenius norm plus the rounding of a sum of squares."""
    return frobenius * (1.0 + a.size * float(np.finfo(float).eps))
