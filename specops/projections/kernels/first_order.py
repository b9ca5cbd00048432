"""First-order methods for kernels of a support inside the operator ball.

With A the map from coordinates to blocks, S(·) soft thresholding of their singular values at c and
L = ‖A‖²:

    alternating   X ← P(X − (A*A)⁻¹A* S(A X))               feasible in the limit, not nearest
    Dykstra       Z ← S(Z + A X / L), X = K − A* Z           the nearest point in the limit
    accelerated   the same from Z extrapolated by momentum, restarted where it points uphill

Dykstra's method on a subspace and a ball is the proximal gradient method on the dual

    max_Z ⟨K, A* Z⟩ − ½‖A* Z‖² − c‖Z‖_*,

so both methods certify: X scaled onto the ball is feasible, and Z bounds the distance from below.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from specops import arrays
from specops.arrays.solvers import svdvals
from specops.linalg.clip import clip
from specops.projections.kernels.excess import thresholded
from specops.projections.kernels.support import Support
from specops.spectra.torus import leading_norm, map_blocks
from specops.typing import Array, Namespace

_CHECK_EVERY = 10
"""Rounds between two certificates. Each takes an eighth of a round's time (64² channels on 32²
points), so that they cost about one part in eighty."""
_ASK_WHEN_TRACED = 4
"""The same for traced kernels, where a certificate takes half a round's time: normal kernels of 16²
to 64² channels were certified within a tenth of the distance after 4 rounds at c = 0.25·σ₁, 8 at
0.5 and 12 to 20 at 0.9."""
_DIFFERENCE_UP_TO = 16.0
"""x − A*S(A x) is computed as a difference if the root mean square of the singular values, over c,
is at most this: the difference then loses no more than this factor, four binary digits."""


def largest(xp: Namespace, support: Support, x: Array) -> Array:
    """‖A x‖: the largest singular value of all blocks."""
    coefficients = support.coefficients(xp, x)
    if arrays.by_workers(x):
        return np.asarray(leading_norm(coefficients, support.symbol)[0], x.real.dtype)
    return xp.max(svdvals(xp, support.symbol.blocks(xp, coefficients))[..., 0])


def alternate(xp: Namespace, support: Support, x: Array, limit: Array) -> Array:
    """One round: clip every block, cut back to the support (Sedghi et al., appendix A)."""
    symbol, coefficients = support.symbol, support.coefficients(xp, x)
    # The root mean square of all singular values is at most the largest.
    squares = xp.sum(xp.abs(coefficients) ** 2) / (symbol.values_per_block * symbol.sizes.groups)
    near = arrays.truth(squares <= (_DIFFERENCE_UP_TO * limit) ** 2)

    def taken(blocks: Array, chunk: slice) -> Array:
        if near:
            return support.gather(xp, thresholded(xp, blocks, limit)[0], chunk)
        limits = xp.broadcast_to(limit, blocks.shape[:-2])
        return support.gather(xp, clip(xp, blocks, limits).matrices, chunk)

    parts = map_blocks(xp, symbol, coefficients, taken)
    total = support.per_tap(xp, sum(parts[1:], start=parts[0]))
    # Far outside the ball the difference would cancel.
    return x - total if near else total


class Dual(NamedTuple):
    """The dual iterate: blocks Z, their nuclear norm, and X = K − A* Z."""

    z: Array
    nuclear: Array
    x: Array


class _Carry(NamedTuple):
    now: Dual
    ahead: Array
    x_ahead: Array
    """K − A* ahead, extrapolated in the same way."""
    t: Array


def dual_gradient(
    xp: Namespace,
    support: Support,
    kernel: Array,
    limit: Array,
    *,
    momentum: bool,
    done: Callable[[Dual], Any] | None,
    max_rounds: int,
) -> tuple[Dual, Any]:
    """Iterate from Z = 0 until `done`, which is asked now and then: (the last iterate, rounds).

    With None all rounds run. For traced kernels `done` gives a boolean array.

    References
    ----------
    Beck & Teboulle 2009; O'Donoghue & Candès 2015 (restarts); Boyle & Dykstra 1986.
    """
    symbol = support.symbol
    shape = (len(symbol.frequencies), symbol.sizes.groups, *symbol.block_shape)
    zero = arrays.zeros(shape, like=kernel)
    zero = xp.astype(zero, arrays.complex_dtype(xp, kernel.dtype))
    one = xp.ones_like(limit)
    carry = _Carry(Dual(zero, 0.0 * one, kernel), zero, kernel, one)

    def step(_: Any, carry: _Carry) -> _Carry:
        now, ahead, x_ahead, t = carry
        z, nuclear = _dual_step(xp, support, ahead, x_ahead, limit)
        new = Dual(z, nuclear, kernel - support.gather(xp, z))
        if not momentum:
            return _Carry(new, z, new.x, t)
        uphill = xp.sum(xp.real(xp.conj(ahead - z) * (z - now.z))) > 0
        t = xp.where(uphill, one, t)
        following = 0.5 * (1.0 + xp.sqrt(1.0 + 4.0 * t * t))
        speed = xp.where(uphill, 0.0 * one, (t - 1.0) / following)
        z_ahead = z + xp.astype(speed, z.dtype) * (z - now.z)
        x_ahead = new.x + xp.astype(speed, new.x.dtype) * (new.x - now.x)
        return _Carry(new, z_ahead, x_ahead, following)

    if arrays.is_traced(kernel):
        if done is None or not arrays.is_staged(kernel) or max_rounds % _ASK_WHEN_TRACED:
            carry = arrays.fori(xp, 0, max_rounds, step, carry)
            return carry.now, max_rounds
        return _asked(xp, step, carry, done, max_rounds // _ASK_WHEN_TRACED)
    rounds = 0
    while rounds < max_rounds:
        carry = step(rounds, carry)
        rounds += 1
        look = rounds % _CHECK_EVERY == 0 or rounds in (1, max_rounds)
        if look and done is not None and done(carry.now):
            break
    return carry.now, rounds


def _asked(
    xp: Namespace,
    step: Callable[[Any, _Carry], _Carry],
    carry: _Carry,
    done: Callable[[Dual], Array],
    times: int,
) -> tuple[Dual, Array]:
    """`times` × four rounds, which are skipped once it is done: a loop of known length, which can
    be differentiated."""

    def on(_: Any, held: tuple[_Carry, Array, Array]) -> tuple[_Carry, Array, Array]:
        carry, rounds, enough = held

        def more() -> tuple[_Carry, Array, Array]:
            following = arrays.fori(xp, 0, _ASK_WHEN_TRACED, step, carry)
            return following, rounds + _ASK_WHEN_TRACED, done(following.now)

        decided: tuple[_Carry, Array, Array] = arrays.cond(enough, lambda: held, more)
        return decided

    zero = xp.asarray(0)
    carry, rounds, _ = arrays.fori(xp, 0, times, on, (carry, zero, zero > 0))
    return carry.now, rounds


def _dual_step(
    xp: Namespace, support: Support, ahead: Array, x: Array, limit: Array
) -> tuple[Array, Array]:
    """S(ahead + A x / L) at threshold c / L, and its nuclear norm over the torus."""
    symbol, coefficients = support.symbol, support.coefficients(xp, x)
    counts = symbol.counts / np.prod(symbol.coarse)

    def work(blocks: Array, chunk: slice) -> tuple[Array, Array]:
        moved = ahead[chunk, ...] + blocks / support.most
        return thresholded(xp, moved, limit / support.most)[:2]

    parts = map_blocks(xp, symbol, coefficients, work)
    z, nuclear = (xp.concat(p, axis=0) if len(p) > 1 else p[0] for p in zip(*parts, strict=True))
    weights = arrays.constant(counts, nuclear)
    return z, xp.sum(weights[:, None] * nuclear)
