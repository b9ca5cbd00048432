"""Spectral norms of matrices and of reshaped kernels, followed from step to step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from specops import arrays
from specops.geometry import Conv, Dense
from specops.tracking.power import Pairs, advanced, along, checked, half_step, inner, leading_pairs
from specops.typing import Array, State

Step = Callable[[Any, Array, Pairs], tuple[Pairs, Array]]


@dataclass(frozen=True)
class TrackedBlocks:
    """‖W‖₂ of every matrix of a Dense weight, or of a reshaped kernel."""

    geometry: Dense

    def start(self, w: Array, name: str = "") -> State:
        """The leading pairs, to about 1e-6."""
        xp, w = arrays.namespace(w), arrays.stop_gradient(w)
        state: State = {}
        for j, a in enumerate(self.geometry.blocks(arrays.to_compute(xp, w))):
            state |= _numbered(j, *leading_pairs(xp, a, f"{name}.{j}"))
        return state

    def advance(self, w: Array, state: State, rounds: int = 1) -> State:
        """The state after `rounds` steps to the left and back."""
        return self._stepped(w, state, lambda xp, a, pairs: advanced(xp, a, pairs, rounds))

    def half_advance(self, w: Array, state: State, *, to_left: bool) -> State:
        """The state after half a step, to u or to v: for half its time."""
        return self._stepped(
            w, state, lambda xp, a, pairs: half_step(xp, a, pairs, to_left=to_left)
        )

    def _stepped(self, w: Array, state: State, step: Step) -> State:
        xp, w = arrays.namespace(w), arrays.stop_gradient(w)
        result: State = {}
        for j, a in enumerate(self.geometry.blocks(arrays.to_compute(xp, w))):
            result |= _numbered(j, *step(xp, a, _pairs(state, j, a)))
        return result

    def norms(self, w: Array, state: State) -> tuple[Array, ...]:
        """⟨u, Wv⟩ for each block, shape (*batch,), differentiable; `w` in compute precision."""
        xp = arrays.namespace(w)
        blocks = self.geometry.blocks(w)
        return tuple(along(xp, a, *_leading(state, j, a)) for j, a in enumerate(blocks))

    def measured(self, state: State) -> tuple[Array, ...]:
        """What `norms` gave for the weight of the latest `start` or `advance`."""
        return tuple(state[f"sigma{j}"] for j in range(len(self.geometry.splits or (0,))))

    def scaled(self, w: Array, factors: tuple[Array, ...]) -> Array:
        """Every block times its factor."""
        if len(factors) == 1 and not self.geometry.batch_axes:
            return w * factors[0]
        blocks = self.geometry.blocks(w)
        pairs = zip(blocks, factors, strict=True)
        return self.geometry.assemble(tuple(a * f[..., None, None] for a, f in pairs), w.shape)


class AlongAxis:
    """A norm that is ⟨W, axis⟩ for an array like the kernel, which the state holds."""

    def norms(self, w: Array, state: State) -> tuple[Array]:
        """⟨W, axis⟩, differentiable; `w` in compute precision."""
        return (inner(arrays.namespace(w), w, axis_of(state, w)),)

    def measured(self, state: State) -> tuple[Array]:
        """What `norms` gave for the weight of the latest `start` or `advance`."""
        return (state["sigma"],)

    def scaled(self, w: Array, factors: tuple[Array, ...]) -> Array:
        """The kernel times the factor."""
        return w * factors[0]


@dataclass(frozen=True)
class TrackedKernel(AlongAxis):
    """The mean of ‖Ŵ‖₂ over ways to reshape a kernel to a matrix."""

    geometry: Conv
    views: tuple[Dense, ...]

    def start(self, w: Array, name: str = "") -> State:
        """The leading pairs, to about 1e-6."""
        xp = arrays.namespace(w)
        w = arrays.stop_gradient(arrays.to_compute(xp, w))
        state: State = {}
        for i, view in enumerate(self.views):
            state |= _numbered(i, *leading_pairs(xp, view.blocks(w)[0], f"{name}.{i}"))
        return self._finished(xp, w, state)

    def advance(self, w: Array, state: State, rounds: int = 1) -> State:
        """The state after `rounds` steps to the left and back."""
        xp = arrays.namespace(w)
        w = arrays.stop_gradient(arrays.to_compute(xp, w))
        result: State = {}
        for i, view in enumerate(self.views):
            a = view.blocks(w)[0]
            result |= _numbered(i, *advanced(xp, a, _pairs(state, i, a), rounds))
        return self._finished(xp, w, result)

    def _finished(self, xp: Any, w: Array, state: State) -> State:
        """With the mean of the norms and its gradient, an array like the kernel."""
        axes, norms = [], []
        for i, view in enumerate(self.views):
            u, v = state[f"u{i}"], state[f"v{i}"]
            axes.append(view.assemble((_outer(xp, u, v),), w.shape))
            norms.append(state[f"sigma{i}"])
        share = 1.0 / len(self.views)
        state["axis"] = sum(axes[1:], start=axes[0]) * share
        state["sigma"] = sum(norms[1:], start=norms[0]) * share
        return state


def _numbered(index: int, pairs: Pairs, sigma: Array) -> State:
    return {f"{key}{index}": x for key, x in pairs._asdict().items()} | {f"sigma{index}": sigma}


def _leading(state: State, index: int, a: Array) -> tuple[Array, Array]:
    *batch, m, n = a.shape
    return (
        checked(state, f"u{index}", (*batch, m), a),
        checked(state, f"v{index}", (*batch, n), a),
    )


def _pairs(state: State, index: int, a: Array) -> Pairs:
    *batch, m, n = a.shape
    return Pairs(
        *_leading(state, index, a),
        checked(state, f"p{index}", (*batch, m), a),
        checked(state, f"q{index}", (*batch, n), a),
    )


def axis_of(state: State, w: Array) -> Array:
    return checked(state, "axis", tuple(w.shape), w)


def _outer(xp: Any, u: Array, v: Array) -> Array:
    return u[..., :, None] * arrays.conjugate(xp, v)[..., None, :]
