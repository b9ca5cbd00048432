"""Whether matrices are inside the spectral ball, by a factorisation that exists only there."""

from __future__ import annotations

from typing import Any

import numpy as np

from specops import arrays
from specops.arrays import host, workers
from specops.arrays.gram import below, gram
from specops.arrays.solvers import has_cholesky, svdvals
from specops.linalg.rounding import CHOLESKY_MARGIN
from specops.maps.matrix import MatrixOperator
from specops.typing import Array, Namespace

BEYOND = 1e9
"""A limit that no matrix with entries near 1 reaches: it would need 1e18 entries."""
_TRIAL_STEPS = 3
"""Power steps before a factorisation. Of 30 normal matrices of 256² to 1024² they detected all with
σ₁ = 1.2 times the limit, and none with 1.05."""
_TRIAL_FROM = 256
"""Smaller side from which the steps pay: they take a quarter of the time of a factorisation at
256², a three-hundredth at 1024²."""


def inside(xp: Namespace, a: Array, limit: Array, *, sharp: bool = False) -> Array:
    r"""Which of stacked matrices have ‖A‖ ≤ limit: booleans of shape (...).

    They are those for which limit²·I − G has a Cholesky factor, G being the Gram matrix of the
    smaller side. Single precision, with a margin, is tried first. Matrices that it does not decide
    are tested in double precision, or by their singular values on a device without it.

    Parameters
    ----------
    xp : namespace
        The namespace of the arrays, which are concrete.
    a : array, shape (..., m, n)
        Scaled to entries near 1.
    limit : array, shape (...)
        Positive.
    sharp : bool
        Whether to skip single precision, for matrices that are known to be close to the limit.
    """
    on_host = None if arrays.solves_alone(a) else arrays.on_host(a)
    if on_host is not None:
        flat = on_host.reshape(-1, *on_host.shape[-2:])
        bounds = np.broadcast_to(arrays.to_numpy(limit), a.shape[:-2]).reshape(-1)

        def work(chunk: slice) -> np.ndarray:
            return _host_inside(flat[chunk], bounds[chunk], sharp)

        found = np.concatenate(workers.map_chunks(work, len(flat), flat[0].nbytes))
        return arrays.constant(found.reshape(a.shape[:-2]), a)
    double = arrays.double_dtype(xp, a)
    # A norm is at least the largest entry. Larger entries, and huge limits, would overflow.
    possible = arrays.largest_entry(xp, a, (-2, -1)) <= 2.0 * limit
    beyond = xp.full_like(limit, BEYOND)
    limit = xp.where(limit < beyond, limit, beyond)
    if double is None:
        return possible & (svdvals(xp, a)[..., 0] <= limit)
    if not arrays.truth(xp.all(possible)):
        a = xp.where(possible[..., None, None], a, xp.zeros_like(a))
    clearly = xp.zeros_like(possible)
    if not sharp and double != a.dtype:
        if a.ndim == 2 and seen_outside(xp, a, limit):
            return clearly
        clearly = has_cholesky(
            xp, below(xp, a, limit * (1.0 - CHOLESKY_MARGIN["float32"]), a.dtype)
        )
        if arrays.truth(xp.all(clearly)):
            return clearly & possible
    return (clearly | has_cholesky(xp, below(xp, a, limit, double))) & possible


def _host_inside(a: np.ndarray, limit: np.ndarray, sharp: bool) -> np.ndarray:
    unit = limit[:, None, None]
    result = np.zeros(len(a), bool)
    with np.errstate(over="ignore", divide="ignore", invalid="ignore"):
        # A norm is at least the largest entry; squares of larger entries would overflow.
        rest = np.flatnonzero(arrays.largest_entry(np, a, (-2, -1)) <= 2.0 * limit)
        if not sharp and a.real.dtype == np.float32:
            scaled = (a if len(rest) == len(a) else a[rest]) / unit[rest].astype(a.real.dtype)
            if len(rest) == 1 and seen_outside(np, scaled[0], 1.0):
                return result
            uncertain = host.exceeds(gram(np, scaled), 1.0 - CHOLESKY_MARGIN["float32"])
            del scaled  # each copy of a large matrix counts
            result[rest] = ~uncertain
            rest = rest[uncertain]
    if len(rest):
        # Divided here again, in double: the quotient in single precision was rounded.
        few = a if len(rest) == len(a) else a[rest]
        kind = np.result_type(a, np.float64)
        double = np.divide(few, unit[rest].astype(float), dtype=kind)
        result[rest] = ~host.exceeds(host.gram(double), 1.0)
    return result


def seen_outside(xp: Namespace, a: Array, limit: Any) -> bool:
    """Whether a few power steps, far cheaper than a factorisation, already exceed the limit.

    False for small matrices (m, n), whose factorisation is cheap.
    """
    if min(a.shape) < _TRIAL_FROM:
        return False
    start = arrays.start_vector("inside", a.shape[0])
    v = xp.astype(arrays.constant(start, a), a.dtype)
    operator = MatrixOperator(a)
    norm = xp.linalg.vector_norm(v)
    for _ in range(_TRIAL_STEPS):
        v = operator.matvec(operator.rmatvec(v / xp.astype(norm, v.dtype)))
        norm = xp.linalg.vector_norm(v)
        # ‖AAᴴv‖ never exceeds ‖A‖² for unit vectors v.
        if arrays.truth(norm > limit**2 * (1.0 + CHOLESKY_MARGIN["float32"])):
            return True
        if not arrays.truth(norm > 0):
            break
    return False
