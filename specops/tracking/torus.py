"""The norm that projections of kernels constrain, tracked at its leading frequencies."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from specops import arrays
from specops.errors import StateError
from specops.geometry import Conv
from specops.maps.every_size import certified_symbol
from specops.maps.symbol import Symbol
from specops.maps.unread import without_unread
from specops.spectra.torus import ranked_blocks
from specops.tracking.power import checked
from specops.typing import Array, Namespace, State

_FOLLOWED = 16
"""How many blocks are tracked, those that lead at the start: a choice of the cost of an estimate
against the chance that another block takes the lead before it is looked at."""
_GENERIC_PART = 0.05
"""Length of the generic vector that is added to an old unit vector. Its bias, the square of what
two steps leave of it, is far below the margin of the screening."""
_LOOKED_AT = 8
"""How many other blocks each estimate looks at: half as many as are tracked, at half their cost."""
_START_STEPS = 8
"""Power steps at the start, from generic vectors; an estimate takes two. A choice, as the estimates
that follow go on from there."""


@dataclass(frozen=True)
class TrackedTorus:
    """‖A‖₂ on the torus that contains a convolution, or for every size, from below.

    The symbol's blocks that lead at the start are tracked, each by a vector, which is far cheaper
    than vectors of the size of the grid. The other blocks are looked at in turn, a few at each
    estimate, and take the place of those that they exceed.
    """

    geometry: Conv

    def start(self, w: Array, name: str = "") -> State:
        """The frequencies and groups of the leading blocks, and vectors close to theirs."""
        xp = arrays.namespace(w)
        kernel, symbol, _ = self._symbol(xp, w)
        coefficients = symbol.coefficients(
            np, arrays.to_numpy(kernel / arrays.magnitude(xp, kernel))
        )
        chosen = ranked_blocks(coefficients, symbol)[:_FOLLOWED]
        v = _generic(symbol.block_shape[1])
        state = {
            "block": arrays.constant(chosen, kernel),
            "next": arrays.constant(np.asarray(0), kernel),
            "grid": arrays.constant(np.array(symbol.fine), kernel),
            "v": arrays.constant(np.tile(v, (len(chosen), 1)), kernel, complex=True),
        }
        return self.estimate(w, state, _START_STEPS)[1]

    def estimate(self, w: Array, state: State, rounds: int = 2) -> tuple[Array, State]:
        """(a lower bound of the norm, the state after `rounds` steps)."""
        xp = arrays.namespace(w)
        kernel, symbol, factor = self._symbol(xp, w)
        chosen, position = self._checked(symbol, state)
        groups, columns = symbol.sizes.groups, symbol.block_shape[1]
        v = checked(state, "v", (len(chosen), columns), kernel)
        total = groups * len(symbol.frequencies)
        others = (position + np.arange(min(_LOOKED_AT, total))) % total
        others = others[~np.isin(others, chosen)]
        every = np.concatenate([chosen, others])
        generic = arrays.constant(_generic(columns)[None, :], kernel, complex=True)
        # A generic vector is added, because power steps never leave an invariant subspace.
        v = xp.concat([v + _GENERIC_PART * generic, xp.tile(generic, (len(others), 1))], axis=0)
        frequency, group = np.divmod(every, groups)
        blocks = symbol.blocks(xp, symbol.coefficients(xp, kernel), frequency)
        if groups > 1:
            mask = arrays.constant(np.eye(groups)[group], kernel)[:, :, None, None]
            blocks = xp.sum(blocks * xp.astype(mask, blocks.dtype), axis=1)
        else:
            blocks = blocks[:, 0, ...]
        scale = arrays.magnitude(xp, kernel)
        blocks, v = blocks / xp.astype(xp.reshape(scale, (1, 1, 1)), blocks.dtype), v[..., None]
        for _ in range(rounds):
            u, _ = _unit(xp, arrays.matmul(blocks, v))
            v, sigma = _unit(xp, arrays.matmul(arrays.adjoint(xp, blocks), u))
        v, sigma = v[..., 0], sigma * xp.reshape(scale, ())
        kept = np.argsort(-arrays.to_numpy(sigma), kind="stable")[: len(chosen)]
        index = arrays.constant(kept, kernel)
        state = {
            "block": arrays.constant(every[kept], kernel),
            "next": arrays.constant(np.asarray((position + _LOOKED_AT) % total), kernel),
            "grid": state["grid"],
            "v": xp.take(v, index, axis=0),
        }
        return xp.max(sigma) / factor, state

    def _checked(self, symbol: Symbol, state: State) -> tuple[np.ndarray, int]:
        if not {"block", "next", "grid", "v"} <= set(state):
            raise StateError(f"the state belongs to another geometry: it holds {sorted(state)}")
        if tuple(arrays.to_numpy(state["grid"]).reshape(-1)) != symbol.fine:
            raise StateError(f"the state belongs to another grid than {symbol.fine}")
        return arrays.to_numpy(state["block"]), int(arrays.to_numpy(state["next"]))

    def _symbol(self, xp: Namespace, w: Array) -> tuple[Array, Symbol, float]:
        w = without_unread(arrays.stop_gradient(arrays.to_compute(xp, w)), self.geometry)
        kernel = self.geometry.kernel(w)
        sizes = self.geometry.sizes(tuple(w.shape))
        return kernel, *certified_symbol(sizes, not arrays.is_complex(kernel))


def _generic(columns: int) -> np.ndarray:
    """A fixed unit vector in no particular direction."""
    raw = arrays.start_vector("torus", 2 * columns).view(np.complex128)
    return np.asarray(raw / np.linalg.norm(raw))


def _unit(xp: Namespace, x: Array) -> tuple[Array, Array]:
    """(columns over their lengths, the lengths), for columns of length near 1 or 0."""
    norm = xp.linalg.vector_norm(x, axis=(-2, -1), keepdims=True)
    return x / xp.astype(arrays.nonzero(xp, norm), x.dtype), norm[..., 0, 0]
