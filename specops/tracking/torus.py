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
from specops.tracking.power import Array, State, checked, power_step

_FOLLOWED = 16
_START_STEPS = 8


@dataclass(frozen=True)
class TrackedTorus:
    """‖A‖₂ on the torus that contains a convolution, or for every size, from below.

    The blocks of the symbol that lead when it starts are followed, each by a vector: far
    cheaper than vectors of the size of the grid, and blind to other blocks.
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
        frequency, group = np.divmod(chosen, symbol.sizes.groups)
        columns = symbol.block_shape[1]
        raw = backend.start_vector(name, 2 * columns).view(np.complex128)
        v = np.broadcast_to(raw / np.linalg.norm(raw), (len(chosen), columns)).copy()
        state = {
            "frequency": backend.constant(frequency, kernel),
            "group": backend.constant(group, kernel),
            "grid": backend.constant(np.array(symbol.fine), kernel),
            "v": backend.constant(v, kernel, complex=True),
        }
        return self.estimate(w, state, _START_STEPS)[1]

    def estimate(self, w: Array, state: State, rounds: int = 2) -> tuple[Array, State]:
        """(a lower bound of the norm, the state after `rounds` power steps)."""
        xp = backend.namespace(w)
        kernel, symbol, factor = self._symbol(xp, w)
        frequency = self._checked_frequencies(symbol, state)
        v = checked(state, "v", (len(frequency), symbol.block_shape[1]), kernel)
        blocks = symbol.blocks(xp, symbol.coefficients(xp, kernel), frequency)
        if symbol.sizes.groups > 1:
            own = np.eye(symbol.sizes.groups)[backend.to_numpy(state["group"])]
            mask = backend.constant(own, kernel)[:, :, None, None]
            blocks = xp.sum(blocks * xp.astype(mask, blocks.dtype), axis=1)
        else:
            blocks = blocks[:, 0, ...]
        u = blocks[..., 0]
        for _ in range(rounds):
            u, v, sigma = power_step(xp, blocks, u, v)
        return xp.max(sigma) / factor, {**state, "v": v}

    def _checked_frequencies(self, symbol: Symbol, state: State) -> np.ndarray:
        if not {"frequency", "group", "grid", "v"} <= set(state):
            raise StateError(f"the state belongs to another geometry: it holds {sorted(state)}")
        if tuple(backend.to_numpy(state["grid"]).reshape(-1)) != symbol.fine:
            raise StateError(f"the state belongs to another grid than {symbol.fine}")
        return backend.to_numpy(state["frequency"])

    def _symbol(self, xp: Any, w: Array) -> tuple[Array, Symbol, float]:
        w = without_unread(backend.stop_gradient(backend.to_compute(xp, w)), self.geometry)
        kernel = self.geometry.kernel(w)
        sizes = self.geometry.sizes(tuple(w.shape))
        return kernel, *certified_symbol(sizes, not backend.is_complex(kernel))
