"""Spectral norms of matrices and of reshaped kernels, tracked from step to step."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

from specops import arrays
from specops.geometry import Conv, Dense
from specops.tracking.by_products import Steps, Wanted
from specops.tracking.power import (
    Pairs,
    advanced,
    along,
    checked,
    half_step,
    half_step_by,
    inner,
    leading_pairs,
)
from specops.typing import Array, Namespace, State

Step = Callable[[Any, Array, Pairs], tuple[Pairs, Array]]
Shapes = Mapping[str, tuple[int, ...]]
GRADIENT = "axis"
"""The key of a norm's gradient in the state, which saved checkpoints contain."""
NORM_KEYS = ("sigma0", "sigma")
"""Keys of norms, of which every state has one."""


@dataclass(frozen=True)
class TrackedBlocks:
    """‖W‖₂ of every matrix of a Dense weight, or of a reshaped kernel."""

    geometry: Dense

    def start(self, w: Array, name: str = "") -> State:
        """The leading pairs, to about 1e-6."""
        xp, w = arrays.namespace(w), arrays.stop_gradient(w)
        state: State = {}
        for j, a in enumerate(self.geometry.blocks(arrays.to_compute(xp, w))):
            state |= packed(j, *leading_pairs(xp, a, f"{name}.{j}"))
        return state

    def advance(self, w: Array, state: State, rounds: int = 1) -> State:
        """The state after `rounds` steps to the left and back."""
        return self._stepped(w, state, lambda xp, a, pairs: advanced(xp, a, pairs, rounds))

    def half_advance(self, w: Array, state: State, *, to_left: bool) -> State:
        """The state after half a step, which updates u (to the left) or v, in half the time."""
        return self._stepped(
            w, state, lambda xp, a, pairs: half_step(xp, a, pairs, to_left=to_left)
        )

    def advance_by_products(self, state: State, rounds: int) -> Steps[State]:
        """`advance` for a weight that is known only by its products with vectors."""
        for _ in range(rounds):
            state = yield from self.half_advance_by_products(state, to_left=True)
            state = yield from self.half_advance_by_products(state, to_left=False)
        return state

    def half_advance_by_products(self, state: State, *, to_left: bool) -> Steps[State]:
        """`half_advance` for a weight that is known only by its products with vectors."""
        known = [unpacked(state, j) for j in self._indices]
        xp = arrays.namespace(known[0].u)
        near = [(p.v, p.q) if to_left else (p.u, p.p) for p in known]
        rows = tuple(xp.stack(pair, axis=-2) for pair in near)
        images = yield Wanted(self.geometry, rows, to_left)
        result: State = {}
        for j, (pairs, image) in enumerate(zip(known, images, strict=True)):
            result |= packed(j, *half_step_by(xp, image, pairs, to_left=to_left))
        return result

    def _stepped(self, w: Array, state: State, step: Step) -> State:
        xp, w = arrays.namespace(w), arrays.stop_gradient(w)
        result: State = {}
        for j, a in enumerate(self.geometry.blocks(arrays.to_compute(xp, w))):
            result |= packed(j, *step(xp, a, _pairs(state, j, a)))
        return result

    def norms(self, w: Array, state: State) -> tuple[Array, ...]:
        """⟨u, Wv⟩ for each block, shape (*batch,), differentiable; `w` in compute precision."""
        xp = arrays.namespace(w)
        blocks = self.geometry.blocks(w)
        return tuple(along(xp, a, *_leading(state, j, a)) for j, a in enumerate(blocks))

    def measured(self, state: State) -> tuple[Array, ...]:
        """What `norms` gave for the weight of the latest `start` or `advance`."""
        return tuple(state[key] for key in self._keys[1])

    def directions(self, state: State) -> tuple[Array, ...]:
        """The vectors along which norms are taken: u and v of each matrix in turn."""
        return tuple(state[key] for key in self._keys[0])

    def gradients(self, state: State) -> tuple[Array, ...]:
        """∂σ/∂W of each matrix: uvᴴ."""
        return tuple(_outer(u, v) for u, v in self._leading(state))

    def gradient(self, w: Array, state: State, factors: tuple[Array, ...]) -> Array:
        """The gradient of the sum of norms times factors, an array of the weight's shape."""
        xp, blocks = arrays.namespace(w), []
        for (u, v), factor in zip(self._leading(state), factors, strict=True):
            blocks.append(_outer(u * xp.astype(factor, u.dtype)[..., None], v))
        return self.geometry.assemble(tuple(blocks), w.shape)

    def subtract(self, w: Array, state: State, amounts: tuple[Array, ...]) -> Array:
        """The nearest weight whose norms along the vectors are lower by the amounts."""
        xp, blocks = arrays.namespace(w), []
        given = zip(self.geometry.blocks(w), self._leading(state), amounts, strict=True)
        for a, (u, v), amount in given:
            blocks.append(a - _outer(xp.astype(amount, a.dtype)[..., None] * u, v))
        return self.geometry.assemble(tuple(blocks), w.shape)

    def scaled(self, w: Array, factors: tuple[Array, ...]) -> Array:
        """Every block times its factor."""
        if len(factors) == 1 and not self.geometry.batch_axes:
            return w * factors[0]
        blocks = self.geometry.blocks(w)
        pairs = zip(blocks, factors, strict=True)
        return self.geometry.assemble(tuple(a * f[..., None, None] for a, f in pairs), w.shape)

    @property
    def _indices(self) -> range:
        return range(len(self.geometry.splits or (0,)))

    @property
    def kept(self) -> frozenset[str]:
        """The keys of its state."""
        return frozenset(key for j in self._indices for key in _names(j))

    @cached_property
    def _keys(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """The state's keys of directions and of norms, cached for forward passes."""
        directions = tuple(f"{key}{j}" for j in self._indices for key in "uv")
        return directions, tuple(f"sigma{j}" for j in self._indices)

    def _leading(self, state: State) -> list[tuple[Array, Array]]:
        return [(state[f"u{j}"], state[f"v{j}"]) for j in self._indices]


class AlongGradient:
    """A norm computed as ⟨W, G⟩ with its gradient G, which is kept in the state."""

    def norms(self, w: Array, state: State) -> tuple[Array]:
        """⟨W, G⟩, differentiable; `w` in compute precision."""
        return (inner(arrays.namespace(w), w, checked(state, GRADIENT, tuple(w.shape), w)),)

    def measured(self, state: State) -> tuple[Array]:
        """What `norms` gave for the weight of the latest `start` or `advance`."""
        return (state["sigma"],)

    def directions(self, state: State) -> tuple[Array]:
        """The array along which the norm is taken: its gradient."""
        return (state[GRADIENT],)

    def gradients(self, state: State) -> tuple[Array]:
        """∂σ/∂W."""
        return (state[GRADIENT],)

    def gradient(self, w: Array, state: State, factors: tuple[Array, ...]) -> Array:
        """The gradient of the norm times its factor, an array of the weight's shape."""
        g = state[GRADIENT]
        return arrays.namespace(w).astype(factors[0], g.dtype) * g

    def subtract(self, w: Array, state: State, amounts: tuple[Array, ...]) -> Array:
        """The nearest kernel whose norm along the gradient is lower by the amount."""
        xp, g = arrays.namespace(w), state[GRADIENT]
        squared = xp.sum(xp.abs(g) ** 2)
        factor = amounts[0] / arrays.nonzero(xp, squared)
        return w - xp.astype(factor, w.dtype) * g

    def scaled(self, w: Array, factors: tuple[Array, ...]) -> Array:
        """The kernel times the factor."""
        return w * factors[0]


@dataclass(frozen=True)
class TrackedKernel(AlongGradient):
    """The mean of ‖Ŵ‖₂ over ways to reshape a kernel to a matrix."""

    geometry: Conv
    views: tuple[Dense, ...]

    @property
    def kept(self) -> frozenset[str]:
        """The keys of its state."""
        views = range(len(self.views))
        return frozenset([*(key for i in views for key in _names(i)), GRADIENT, "sigma"])

    def start(self, w: Array, name: str = "") -> State:
        """The leading pairs, to about 1e-6."""
        xp = arrays.namespace(w)
        w = arrays.stop_gradient(arrays.to_compute(xp, w))
        state: State = {}
        for i, view in enumerate(self.views):
            state |= packed(i, *leading_pairs(xp, view.blocks(w)[0], f"{name}.{i}"))
        return self._finished(xp, w, state)

    def advance(self, w: Array, state: State, rounds: int = 1) -> State:
        """The state after `rounds` steps to the left and back."""
        xp = arrays.namespace(w)
        w = arrays.stop_gradient(arrays.to_compute(xp, w))
        result: State = {}
        for i, view in enumerate(self.views):
            a = view.blocks(w)[0]
            result |= packed(i, *advanced(xp, a, _pairs(state, i, a), rounds))
        return self._finished(xp, w, result)

    def _finished(self, xp: Namespace, w: Array, state: State) -> State:
        """The state with the mean of the norms, and its gradient in the shape of the kernel."""
        gradients, norms = [], []
        for i, view in enumerate(self.views):
            u, v = state[f"u{i}"], state[f"v{i}"]
            gradients.append(view.assemble((_outer(u, v),), w.shape))
            norms.append(state[f"sigma{i}"])
        weight = 1.0 / len(self.views)
        state[GRADIENT] = sum(gradients[1:], start=gradients[0]) * weight
        state["sigma"] = sum(norms[1:], start=norms[0]) * weight
        return state


@lru_cache(maxsize=1024)
def _names(index: int) -> tuple[str, ...]:
    """The state's keys of the vectors and of the norm of one matrix."""
    return tuple(f"{key}{index}" for key in (*Pairs._fields, "sigma"))


def packed(index: int, pairs: Pairs, sigma: Array) -> State:
    """The part of a state that belongs to one matrix."""
    return dict(zip(_names(index), (*pairs, sigma), strict=True))


def unpacked(state: Mapping[str, Array], index: int) -> Pairs:
    """The vectors of one matrix, unchecked."""
    return Pairs(*map(state.__getitem__, _names(index)[:-1]))


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


def vectors(state: State) -> State:
    """The part of a state that `advance` needs: the vectors, without norms and gradients."""
    return {k: x for k, x in state.items() if not k.startswith(("sigma", GRADIENT))}


def are_alike(shapes: Shapes, others: Shapes) -> bool:
    """Whether states with arrays of these shapes may be of one weight.

    Vectors of a convolution's operator have the size of its input, which may have changed.
    """
    if shapes.keys() != others.keys():
        return False
    return all(key in ("v", "q") or shape == others[key] for key, shape in shapes.items())


def _outer(u: Array, v: Array) -> Array:
    return u[..., :, None] * arrays.conjugate(arrays.namespace(v), v)[..., None, :]
