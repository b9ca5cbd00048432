"""The nearest kernel with operator norm at most c, by half-spaces of which only a sum is kept."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np

from specops import arrays
from specops.arrays.solvers import eigh_of_finite
from specops.projections.kernels.excess import thresholded
from specops.projections.kernels.solution import Tolerance
from specops.projections.kernels.stabilised_planes import OUTER
from specops.projections.kernels.support import Support
from specops.typing import Array, Namespace

_UNITS = 2.0
"""The bound is lowered by so many units of rounding of ν·c. For normal kernels at 1e-4 and 1e-3
above c, in single precision, it was too high by at most 0.8 units."""


class Found(NamedTuple):
    """A kernel inside the ball, and what is known about it."""

    x: Array
    norm: Array
    """The norm of x."""
    dual: Array
    """A lower bound of half the squared distance of the nearest kernel."""
    before: Array
    """The norm of the kernel that was given."""
    rounds: Array


class _Carry(NamedTuple):
    x: Array
    """The query X."""
    change: Array
    """K − X, computed by itself: near the ball the difference would be all rounding."""
    plane: Array
    """E, a sum of half-spaces ⟨Y, E⟩ ≤ ν."""
    violation: Array
    """⟨K, E⟩ − ν."""
    best: Found
    primal: Array
    """Half the squared distance of the best from K."""
    going: Array


def nearest_by_summed_half_spaces(
    xp: Namespace,
    support: Support,
    kernel: Array,
    limit: Array,
    target: Array,
    *,
    tolerance: Tolerance,
    max_rounds: int,
    differentiable: bool,
) -> Found:
    """As `stabilised_planes`, for compiled code, which knows neither values nor numbers of rounds.

    Only the weighted sum of the half-spaces so far is kept. It bounds the distance from below as
    well as all of them do, so that a round ends with a quadratic program in two variables. For
    normal kernels at 0.9 to 0.1·σ₁ that took at most one round more than keeping all.

    Certificates hold in single precision, and just outside the ball: each difference that would be
    lost in rounding is computed from its parts instead.

    Parameters
    ----------
    xp : namespace
        The namespace of the arrays, which are staged.
    support : Support
        Coordinates and blocks.
    kernel : array
        Coordinates of K, finite: decompositions of infinities need not return.
    limit, target : array
        The bound c, within which there is nothing to do, and the slightly smaller norm to which
        a kernel outside is brought.
    tolerance : Tolerance
        When to stop.
    max_rounds : int
        Largest number of decompositions of all blocks.
    differentiable : bool
        Whether to compute the same rounds by SVD, in a loop of known length.
    """
    half_space = _differentiable_half_space if differentiable else _half_space

    def advanced(now: _Carry) -> _Carry:
        new, excess, top = half_space(xp, support, now.x, target)
        outside = top > target
        over = xp.where(outside, top, xp.ones_like(top))
        scale = xp.where(outside, target / over, xp.ones_like(top))
        share = xp.where(outside, (top - target) / over, xp.zeros_like(top))
        primal = 0.5 * _inner(xp, *(2 * [now.change + share * now.x]))
        # At the query X itself ⟨X, E⟩ − ν is the sum of squares of what exceeds c.
        violations = now.violation, _inner(xp, now.change, new) + excess
        products = (_inner(xp, a, b) for a, b in ((now.plane, now.plane), (now.plane, new)))
        (a, b), dual = _of_two(xp, (*products, _inner(xp, new, new)), violations)
        plane = a * now.plane + b * new
        inner = now.change + support.per_tap(xp, new)
        change = OUTER * plane + (1.0 - OUTER) * inner
        best, better, first = now.best, primal < now.primal, now.best.rounds == 0
        best = Found(
            xp.where(better, now.x * scale, best.x),
            xp.where(better, top * scale, best.norm),
            xp.where(dual > best.dual, dual, best.dual),
            xp.where(first, top, best.before),
            best.rounds + 1,
        )
        primal = xp.where(better, primal, now.primal)
        # These comparisons are false for NaN: it is not decomposed again.
        going = primal > (1.0 + tolerance.distance) ** 2 * best.dual
        going = going & ((top > limit) | ~first) & (best.rounds < max_rounds)
        violation = a * violations[0] + b * violations[1]
        return _Carry(kernel - change, change, plane, violation, best, primal, going)

    zero, none = xp.zeros_like(target), xp.zeros_like(kernel)
    best = Found(kernel, zero, zero, zero, xp.asarray(0))
    start = _Carry(kernel, none, none, zero, best, zero + math.inf, xp.asarray(True))
    if differentiable:

        def step(_: Any, now: _Carry) -> Any:
            return arrays.cond(now.going, lambda: advanced(now), lambda: now)

        found: _Carry = arrays.fori(xp, 0, max_rounds, step, start)
    else:
        found = arrays.while_loop(xp, lambda now: now.going, advanced, start)
    best = found.best
    # Rounding may have raised the bound, which matters just outside the ball.
    dual = best.dual - _UNITS * arrays.epsilon(target.dtype) * _inner(xp, kernel, found.plane)
    inside = best.before <= limit
    return best._replace(dual=dual, rounds=xp.where(inside, xp.asarray(0), best.rounds))


def _half_space(
    xp: Namespace, support: Support, x: Array, limit: Array
) -> tuple[Array, Array, Array]:
    """(A*Z, ⟨x, A*Z⟩ − c·ν, the largest singular value) of Z = S(A x), with ν ≥ ‖Z‖_*.

    By eigenvectors V of Gram matrices, at less than half the cost of an SVD. The lengths of the
    columns of AV serve as singular values, so that the result holds whatever rounding did to V.
    """
    symbol = support.symbol
    blocks = symbol.blocks(xp, support.coefficients(xp, x))
    tall = symbol.block_shape[0] > symbol.block_shape[1]
    rows = xp.matrix_transpose(blocks) if tall else blocks
    conjugates = xp.conj(rows)
    _, v = eigh_of_finite(xp, rows @ xp.matrix_transpose(conjugates))
    # Just outside the ball ν·c is far larger than the excess over c: an error of a millionth shows.
    v = v / xp.astype(xp.sqrt(xp.sum(xp.abs(v) ** 2, axis=-2, keepdims=True)), v.dtype)
    images = xp.conj(xp.matrix_transpose(v) @ conjugates)
    values = xp.sqrt(xp.sum(xp.abs(images) ** 2, axis=-1))
    outside = values > limit
    above = xp.where(outside, values - limit, xp.zeros_like(values))
    part = above / xp.where(outside, values, xp.ones_like(values))
    z = v @ (images * xp.astype(part, images.dtype)[..., None])
    shares = arrays.constant(_shares(support), above)[:, None, None]
    direction = support.gather(xp, xp.matrix_transpose(z) if tall else z)
    return direction, xp.sum(shares * above**2), xp.max(values)


def _differentiable_half_space(
    xp: Namespace, support: Support, x: Array, limit: Array
) -> tuple[Array, Array, Array]:
    blocks = support.symbol.blocks(xp, support.coefficients(xp, x))
    z, _, norms = thresholded(xp, blocks, limit)
    shares = arrays.constant(_shares(support), norms)[:, None, None, None]
    excess = xp.sum(shares * (xp.real(z) ** 2 + xp.imag(z) ** 2))
    return support.gather(xp, z), excess, xp.max(norms)


def _shares(support: Support) -> np.ndarray:
    return support.symbol.counts / np.prod(support.symbol.coarse)


def _of_two(
    xp: Namespace, gram: tuple[Array, ...], linear: tuple[Array, Array]
) -> tuple[tuple[Array, Array], Array]:
    """(the x ≥ 0 of two entries that minimises ½xᵀGx − bᵀx, minus the minimum).

    `gram` has the entries of G on and above the diagonal.
    """
    (a, b, c), (first, second) = gram, linear
    zero = xp.zeros_like(a)

    def ratio(x: Array, y: Array) -> Array:
        fine = (x > 0) & (y > 0)
        return xp.where(fine, x / xp.where(fine, y, xp.ones_like(y)), zero)

    def value(x: Array, y: Array) -> Array:
        return x * first + y * second - 0.5 * (x * x * a + 2.0 * x * y * b + y * y * c)

    determinant = a * c - b * b
    best = ratio(first * c - second * b, determinant), ratio(second * a - first * b, determinant)
    highest = value(*best)
    # One half-space alone may be better; rounding spoils the solution of two nearly parallel ones.
    for x, y in ((ratio(first, a), zero), (zero, ratio(second, c))):
        higher = value(x, y) > highest
        best = xp.where(higher, x, best[0]), xp.where(higher, y, best[1])
        highest = xp.where(higher, value(x, y), highest)
    return best, highest


def _inner(xp: Namespace, x: Array, y: Array) -> Array:
    return arrays.real_part(xp, xp.sum(arrays.conjugate(xp, x) * y))
