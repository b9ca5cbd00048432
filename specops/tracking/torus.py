"""The norm that projections of kernels constrain, followed at its leading frequencies."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from specops import backend
from specops.errors import StateError
from specops.geometry import Conv
from specops.geometry.unread import without_unread
from specops.spectra.torus import ranked_blocks
from specops.symbol import Symbol, certified_symbol
from specops.tracking.power import Array, Pairs, State, advanced, checked

_FOLLOWED = 16
_LOOKED_AT = 8
"""Other blocks at each estimate: half of those followed, so at half their cost."""
_START_STEPS = 8


@dataclass(frozen=True)
class TrackedTorus:
    """‖A‖₂ on the torus that contains a convolution, or for every size, from below.

    The blocks of the symbol that lead when it starts are followed, each by a pair of vectors:
    far cheaper than vectors of the size of the grid. The other blocks are looked at in turn, a
    few at each estimate, and take the place of those that they exceed.
    """

    geometry: Conv

    def start(self, w: Array, name: str = "") -> State:
        """The frequencies and groups of the leading blocks, and vectors close to theirs."""
        xp = backend.namespace(w)
        kernel, symbol, _ = self._symbol(xp, w)
        coefficients = symbol.coefficients(
            np, backend.to_numpy(kernel / backend.magnitude(xp, kernel))
        )
        chosen = ranked_blocks(coefficients, symbol)[:_FOLLOWED]
        v, q = _generic(symbol.block_shape[1])
        state = {
            "block": backend.constant(chosen, kernel),
            "next": backend.constant(np.asarray(0), kernel),
            "grid": backend.constant(np.array(symbol.fine), kernel),
            "v": backend.constant(np.tile(v, (len(chosen), 1)), kernel, complex=True),
            "q": backend.constant(np.tile(q, (len(chosen), 1)), kernel, complex=True),
        }
        return self.estimate(w, state, _START_STEPS)[1]

    def estimate(self, w: Array, state: State, rounds: int = 2) -> tuple[Array, State]:
        """(a lower bound of the norm, the state after `rounds` steps)."""
        xp = backend.namespace(w)
        kernel, symbol, factor = self._symbol(xp, w)
        chosen, position = self._checked(symbol, state)
        groups, columns = symbol.sizes.groups, symbol.block_shape[1]
        v, q = (checked(state, key, (len(chosen), columns), kernel) for key in "vq")
        total = groups * len(symbol.frequencies)
        others = (position + np.arange(min(_LOOKED_AT, total))) % total
        others = others[~np.isin(others, chosen)]
        every = np.concatenate([chosen, others])
        fresh = [
            backend.constant(np.tile(x, (len(others), 1)), kernel, complex=True)
            for x in _generic(columns)
        ]
        frequency, group = np.divmod(every, groups)
        blocks = symbol.blocks(xp, symbol.coefficients(xp, kernel), frequency)
        if groups > 1:
            mask = backend.constant(np.eye(groups)[group], kernel)[:, :, None, None]
            blocks = xp.sum(blocks * xp.astype(mask, blocks.dtype), axis=1)
        else:
            blocks = blocks[:, 0, ...]
        pairs = Pairs(
            blocks[..., 0],
            xp.concat([v, fresh[0]], axis=0),
            xp.zeros_like(blocks[..., 0]),
            xp.concat([q, fresh[1]], axis=0),
        )
        pairs, sigma = advanced(xp, blocks, pairs, rounds)
        kept = np.argsort(-backend.to_numpy(sigma), kind="stable")[: len(chosen)]
        index = backend.constant(kept, kernel)
        state = {
            "block": backend.constant(every[kept], kernel),
            "next": backend.constant(np.asarray((position + _LOOKED_AT) % total), kernel),
            "grid": state["grid"],
            "v": xp.take(pairs.v, index, axis=0),
            "q": xp.take(pairs.q, index, axis=0),
        }
        return xp.max(sigma) / factor, state

    def _checked(self, symbol: Symbol, state: State) -> tuple[np.ndarray, int]:
        if not {"block", "next", "grid", "v", "q"} <= set(state):
            raise StateError(f"the state belongs to another geometry: it holds {sorted(state)}")
        if tuple(backend.to_numpy(state["grid"]).reshape(-1)) != symbol.fine:
            raise StateError(f"the state belongs to another grid than {symbol.fine}")
        return backend.to_numpy(state["block"]), int(backend.to_numpy(state["next"]))

    def _symbol(self, xp: Any, w: Array) -> tuple[Array, Symbol, float]:
        w = without_unread(backend.stop_gradient(backend.to_compute(xp, w)), self.geometry)
        kernel = self.geometry.kernel(w)
        sizes = self.geometry.sizes(tuple(w.shape))
        return kernel, *certified_symbol(sizes, not backend.is_complex(kernel))


def _generic(columns: int) -> tuple[np.ndarray, np.ndarray]:
    """Two orthonormal complex vectors in no particular direction; the second zero if alone."""
    raw = backend.start_vector("torus", 4 * columns).view(np.complex128).reshape(2, columns)
    v = raw[0] / np.linalg.norm(raw[0])
    q = raw[1] - v * np.vdot(v, raw[1])
    return v, q / np.linalg.norm(q) if columns > 1 else 0.0 * q
