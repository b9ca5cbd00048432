"""Weights as forward passes use them: divided by a tracked norm, or of limited stable rank.

Pure and differentiable functions of the weight; the singular vectors are constants, which
`specops.tracking` advances.
"""

from __future__ import annotations

from typing import Any

from specops import arrays
from specops.geometry import Conv
from specops.geometry.arguments import number_where
from specops.maps.convolution import ConvOperator
from specops.projections.kernels.taps import taps_of
from specops.tracking import Tracked, TrackedBlocks, TrackedOperator
from specops.typing import Array, Namespace, State


def normalize(w: Array, follow: Tracked, state: State, scale: Any = 1.0) -> Array:
    r"""``s·W/σ`` with :math:`\sigma = \langle u, Wv\rangle`, block by block; zeros stay zero.

    Parameters
    ----------
    w : array
        Half precision is divided in float32 and rounded.
    follow : tracked norm
        The tracked norm of the weight's geometry.
    state : dict
        The vectors u and v that the tracked norm follows.
    scale : float or 0-d array
        The factor s, which may carry a derivative.
    """
    xp = arrays.namespace(w)
    a = _near_one(xp, w)
    factors = tuple(scale / arrays.nonzero(xp, n) for n in follow.norms(a, state))
    return xp.astype(follow.scaled(a, factors), w.dtype, copy=False)


def limit_stable_rank(w: Array, follow: Tracked, state: State, ratio: Any) -> Array:
    r"""W/σ with the rest beside its leading pair scaled down to stable rank r.

    With :math:`\hat W = W/\sigma` and :math:`R = \hat W - uv^H`,

    .. math:: uv^H + R\,\min\bigl(1, \sqrt{r - 1}/\|R\|_F\bigr).

    For a convolution's operator it is the same in the space of kernels, along the gradient of
    the norm and in the Frobenius norm of the operator. A matrix with one row or column has no
    rest: it is W/σ. Where r = 1 the rest is gone, and with it the derivative: a layer that uses
    the dyad alone does not learn.

    Parameters
    ----------
    w, follow, state
        As in `normalize`.
    ratio : float
        r = max(1, ratio · min(rows, columns)) of the matrix whose norm is followed.

    References
    ----------
    Sanyal, Torr & Dokania 2020, Algorithm 2.
    """
    xp = arrays.namespace(w)
    a = _near_one(xp, w)
    norms = follow.norms(a, state)
    unit = follow.scaled(a, tuple(1.0 / arrays.nonzero(xp, n) for n in norms))
    there = tuple(xp.astype(n != 0, n.dtype) for n in norms)
    if isinstance(follow, TrackedOperator):
        if min(follow.geometry.sizes(tuple(w.shape)).matrix_shape()) == 1:
            return xp.astype(unit, w.dtype, copy=False)
        result = _limited_operator(
            xp, unit, follow.geometry, follow.gradients(state)[0], ratio, there[0]
        )
    else:
        assert isinstance(follow, TrackedBlocks)
        blocks = []
        given = zip(follow.geometry.blocks(unit), follow.gradients(state), there, strict=True)
        for b, dyad, nonzero in given:
            if min(b.shape[-2:]) == 1:
                blocks.append(b)
                continue
            lead = xp.astype(nonzero, dyad.dtype)[..., None, None] * dyad
            blocks.append(_limited(xp, b, lead, ratio * min(b.shape[-2:])))
        result = follow.geometry.assemble(tuple(blocks), w.shape)
    return xp.astype(result, w.dtype, copy=False)


def stable_ranks(w: Array, follow: Tracked, state: State, ratio: Any) -> tuple[Array, Array]:
    """The largest stable rank of the tracked matrices: (before, after `limit_stable_rank`).

    Both use the norms along the tracked vectors; the stable rank of a zero matrix is 0.
    """
    xp = arrays.namespace(w)
    a = arrays.stop_gradient(_near_one(xp, w))
    norms = follow.norms(a, state)
    before: list[Array] = []
    after: list[Array] = []
    if isinstance(follow, TrackedOperator):
        used = limit_stable_rank(a, follow, state, ratio)
        (along,) = follow.norms(used, state)
        sizes = follow.geometry.sizes(tuple(w.shape))
        for x, norm, ranks in ((a, norms[0], before), (used, along, after)):
            squared = ConvOperator(follow.geometry.kernel(x), sizes).squared_frobenius()
            ranks.append(squared / arrays.nonzero(xp, norm) ** 2)
    else:
        assert isinstance(follow, TrackedBlocks)
        for block, norm in zip(follow.geometry.blocks(a), norms, strict=True):
            squared = xp.sum(xp.abs(block) ** 2, axis=(-2, -1))
            rank = squared / arrays.nonzero(xp, norm) ** 2
            most = ratio * min(block.shape[-2:]) + xp.zeros_like(rank)
            most = xp.where(most > 1.0, most, xp.ones_like(most))
            before.append(xp.max(rank))
            after.append(xp.max(xp.where(rank > most, most, rank)))
    return xp.max(xp.stack(before)), xp.max(xp.stack(after))


def _near_one(xp: Namespace, w: Array) -> Array:
    """The weight over a power of two near its size: squares of its entries do not overflow."""
    a = arrays.to_compute(xp, w)
    return a / arrays.magnitude(xp, arrays.stop_gradient(a))


def _limited(xp: Namespace, a: Array, lead: Array, rank: Any) -> Array:
    """Matrices A with all but their part `lead`, a unit dyad with ⟨lead, A⟩ = 1, scaled down."""
    rest = a - lead
    squared = xp.sum(xp.abs(rest) ** 2, axis=(-2, -1))
    factor = _factor(xp, rank - 1.0, squared)
    return lead + xp.astype(factor, a.dtype)[..., None, None] * rest


def _limited_operator(
    xp: Namespace, w: Array, geometry: Conv, gradient: Array, ratio: Any, there: Array
) -> Array:
    """`_limited` in the space of kernels, in the Frobenius norm of the operator."""
    kernel = geometry.kernel(w)
    sizes = geometry.sizes(tuple(w.shape))
    taps = taps_of(sizes)
    z, e = taps.coordinates(xp, kernel), taps.coordinates(xp, geometry.kernel(gradient))
    weights = arrays.constant(taps.weights, z)[:, None, None]
    used = weights > 0
    safe = xp.where(used, weights, xp.ones_like(weights))
    dual = xp.where(used, e / safe, xp.zeros_like(e))
    energy = xp.sum(xp.abs(dual) ** 2 * weights)
    lead = xp.astype(there / arrays.nonzero(xp, energy), dual.dtype) * dual
    rest = xp.where(used, z - lead, xp.zeros_like(z))
    least = 1.0 / arrays.nonzero(xp, energy)
    # No matrix has a stable rank below 1, so a smaller ratio asks for 1.
    room = ratio * min(sizes.matrix_shape()) - least
    at_one = 1.0 - least
    room = xp.where(room > at_one, room, at_one)
    factor = _factor(xp, room, xp.sum(weights * xp.abs(rest) ** 2))
    limited = xp.where(used, lead + xp.astype(factor, z.dtype) * rest, z)
    if taps.folds:
        return geometry.weight(kernel + taps.kernel(xp, limited - z, kernel))
    return geometry.weight(taps.kernel(xp, limited, kernel))


def _factor(xp: Namespace, room: Any, squared: Array) -> Array:
    """min(1, √(room/squared)), with a derivative that is finite at 0."""
    room = room + xp.zeros_like(squared)
    room = xp.where(room > 0, room, xp.zeros_like(room))
    over = squared > room
    safe = xp.where(over, squared, xp.ones_like(squared))
    return xp.where(over, xp.sqrt(room) / xp.sqrt(safe), xp.ones_like(squared))


def check_ratio(ratio: Any) -> Any:
    """The ratio; raise unless it is in (0, 1]. Traced ratios are treated as by `check_bound`."""
    found = number_where(ratio, lambda x: (x > 0) & (x <= 1))
    if found is None:
        raise ValueError(f"ratio must be in (0, 1], got {ratio!r}")
    return found
