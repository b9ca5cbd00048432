"""Norms of a weight followed from step to step by power iteration on its leading pairs.

A tracked norm keeps unit vectors u, v of each matrix that it measures. `advance` takes one or
more steps u ← Av/‖Av‖, v ← Aᴴu/‖Aᴴu‖; in between, σ = ⟨u, Av⟩ is linear in the weight with
the gradient uvᴴ, and a lower bound of the norm. Vectors live in a flat dict of arrays, which
is the state of the rules that use them. Nothing here changes what it is given.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import numpy as np

from specops import backend
from specops.errors import GeometryError, StateError
from specops.geometry import Conv, ConvSizes, Dense, Geometry
from specops.linalg.decompositions import svd
from specops.linalg.lanczos import MatrixOperator, largest_singular_triplet
from specops.operators import ConvOperator
from specops.spectra.norms import plane_wave
from specops.symbol import certified_symbol

Array = Any
State = dict[str, Array]
Norm = Literal["operator", "reshaped", "bidirectional"]
_SVD_BELOW = 2**13
"""Entries of a matrix up to which its decomposition costs less than the steps of Lanczos."""
_START_TOLERANCE = 1e-4


def check_norm(norm: Any, allowed: tuple[str, ...] = get_args(Norm)) -> None:
    """Raise unless `norm` is one of those allowed."""
    if norm not in allowed:
        raise ValueError(f"norm must be one of {', '.join(map(repr, allowed))}, got {norm!r}")


def track(geometry: Geometry, norm: Norm) -> TrackedBlocks | TrackedKernel | TrackedOperator:
    """The follower of a norm: all three are one for a Dense geometry."""
    if isinstance(geometry, Dense):
        return TrackedBlocks(geometry)
    if norm == "operator":
        return TrackedOperator(geometry)
    out, inn = geometry.channel_axes
    views = (Dense((out,)), Dense((inn,)))
    return TrackedKernel(geometry, views if norm == "bidirectional" else views[:1])


@dataclass(frozen=True)
class TrackedBlocks:
    """‖W‖₂ of every matrix of a Dense weight."""

    geometry: Dense

    def start(self, w: Array, name: str = "") -> State:
        """The leading pairs, to about 1e-4."""
        xp = backend.namespace(w)
        state: State = {}
        for j, a in enumerate(self.geometry.blocks(backend.to_compute(xp, w))):
            state |= _numbered(j, _leading(xp, a, f"{name}.{j}"))
        return state

    def advance(self, w: Array, state: State, rounds: int = 1) -> State:
        """The state after `rounds` power steps."""
        xp = backend.namespace(w)
        result: State = {}
        for j, a in enumerate(self.geometry.blocks(backend.to_compute(xp, w))):
            u, v = _pair(state, j, a)
            for _ in range(rounds):
                u, v, sigma = _step(xp, a, u, v)
            result |= _numbered(j, (u, v, sigma))
        return result

    def norms(self, w: Array, state: State) -> tuple[Array, ...]:
        """⟨u, Wv⟩ for each block, shape (*batch,), differentiable; `w` in compute precision."""
        xp = backend.namespace(w)
        blocks = self.geometry.blocks(w)
        return tuple(_along(xp, a, *_pair(state, j, a)) for j, a in enumerate(blocks))

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


@dataclass(frozen=True)
class TrackedKernel:
    """The mean of ‖Ŵ‖₂ over ways to reshape a kernel to a matrix."""

    geometry: Conv
    views: tuple[Dense, ...]

    def start(self, w: Array, name: str = "") -> State:
        """The leading pairs, to about 1e-4."""
        xp = backend.namespace(w)
        w = backend.to_compute(xp, w)
        state: State = {}
        for i, view in enumerate(self.views):
            state |= _numbered(i, _leading(xp, view.blocks(w)[0], f"{name}.{i}"))
        return self._finished(xp, w, state)

    def advance(self, w: Array, state: State, rounds: int = 1) -> State:
        """The state after `rounds` power steps."""
        xp = backend.namespace(w)
        w = backend.to_compute(xp, w)
        result: State = {}
        for i, view in enumerate(self.views):
            a = view.blocks(w)[0]
            u, v = _pair(state, i, a)
            for _ in range(rounds):
                u, v, sigma = _step(xp, a, u, v)
            result |= _numbered(i, (u, v, sigma))
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

    def norms(self, w: Array, state: State) -> tuple[Array]:
        """⟨W, axis⟩, differentiable; `w` in compute precision."""
        return (_inner(backend.namespace(w), w, _axis(state, w)),)

    def measured(self, state: State) -> tuple[Array]:
        """What `norms` gave for the weight of the latest `start` or `advance`."""
        return (state["sigma"],)

    def scaled(self, w: Array, factors: tuple[Array, ...]) -> Array:
        """The kernel times the factor."""
        return w * factors[0]


@dataclass(frozen=True)
class TrackedOperator:
    """‖A‖₂ of a convolution, by vectors of its size, one for each group.

    With `containing` it is the torus that contains a zero-padded layer, or every size, which
    is what projections constrain: never less than the layer's own norm.
    """

    geometry: Conv
    containing: bool = False

    def start(self, w: Array, name: str = "") -> State:
        """The leading pair, to about 1e-4."""
        xp = backend.namespace(w)
        kernel, sizes, _ = self._kernel(xp, w)
        unit = backend.magnitude(xp, kernel)
        start = ConvOperator(kernel, sizes).rmatvec(plane_wave(xp, kernel, sizes))
        _, _, v = largest_singular_triplet(
            xp, ConvOperator, kernel / unit, sizes, start, tolerance=_START_TOLERANCE
        )
        # Groups that do not lead now may lead later: their vectors start from the name's.
        v = xp.reshape(v, (sizes.groups, -1))
        noise = backend.start_vector(name, math.prod(v.shape)).reshape(v.shape)
        v = _unit(xp, v, _unit(xp, _like(noise, kernel), None)[0])[0]
        return self.advance(w, {"v": v})

    def advance(self, w: Array, state: State, rounds: int = 1) -> State:
        """The state after `rounds` power steps, with the norm and its gradient."""
        xp = backend.namespace(w)
        v, sigma, leads, operator, image = self._steps(xp, w, state, rounds)
        masked = xp.reshape(image * leads, (-1,))
        # The pair's gradient: σ is linear along it, whatever the other groups do.
        axis = operator.gradient(masked, xp.reshape(v, (-1,)))
        return {"v": v, "axis": self.geometry.weight(axis), "sigma": sigma}

    def estimate(self, w: Array, state: State, rounds: int = 1) -> tuple[Array, State]:
        """(a lower bound of the norm, the state after `rounds` steps), without the gradient."""
        v, sigma, *_ = self._steps(backend.namespace(w), w, state, rounds)
        return sigma, {"v": v}

    def _steps(
        self, xp: Any, w: Array, state: State, rounds: int
    ) -> tuple[Array, Array, Array, ConvOperator, Array]:
        kernel, sizes, factor = self._kernel(xp, w)
        operator = ConvOperator(kernel, sizes)
        expected = (sizes.groups, operator.shape[1] // sizes.groups)
        v = _checked(state, "v", expected)
        for _ in range(rounds):
            image, _ = _unit(xp, _rows(xp, operator.matvec, v), None)
            v, sigmas = _unit(xp, _rows(xp, operator.rmatvec, image), v)
        index = backend.argmax(xp, sigmas)
        leads = xp.take(backend.constant(np.eye(sizes.groups), sigmas), index, axis=0)[0, :]
        return v, xp.max(sigmas) / factor, xp.astype(leads, v.dtype)[:, None], operator, image

    def _kernel(self, xp: Any, w: Array) -> tuple[Array, ConvSizes, float]:
        """(kernel, sizes, the factor of `certified_symbol`)."""
        kernel = self.geometry.kernel(backend.to_compute(xp, w))
        sizes = self.geometry.sizes(tuple(w.shape))
        if not self.containing:
            if sizes.fine is None:
                raise GeometryError(
                    f"{self.geometry.describe()} has no input size, and the operator's norm "
                    f"depends on it: run one forward pass first, or pass the geometry"
                )
            return kernel, sizes, 1.0
        symbol, factor = certified_symbol(sizes, not backend.is_complex(kernel))
        zero = (0,) * len(symbol.fine)
        around = replace(
            symbol.sizes, circular=True, fine=symbol.fine, coarse=symbol.coarse, lower=zero
        )
        return kernel, around, factor

    def norms(self, w: Array, state: State) -> tuple[Array]:
        """⟨W, axis⟩, differentiable; `w` in compute precision."""
        return (_inner(backend.namespace(w), w, _axis(state, w)),)

    def measured(self, state: State) -> tuple[Array]:
        """What `norms` gave for the weight of the latest `start` or `advance`."""
        return (state["sigma"],)

    def scaled(self, w: Array, factors: tuple[Array, ...]) -> Array:
        """The kernel times the factor."""
        return w * factors[0]


def _numbered(index: int, pair: tuple[Array, Array, Array]) -> State:
    return {f"{key}{index}": x for key, x in zip(("u", "v", "sigma"), pair, strict=True)}


def _pair(state: State, index: int, a: Array) -> tuple[Array, Array]:
    *batch, m, n = a.shape
    return (
        _checked(state, f"u{index}", (*batch, m)),
        _checked(state, f"v{index}", (*batch, n)),
    )


def _axis(state: State, w: Array) -> Array:
    return _checked(state, "axis", tuple(w.shape))


def _checked(state: State, key: str, shape: tuple[int, ...]) -> Array:
    found = state.get(key)
    if found is None or tuple(found.shape) != shape:
        got = None if found is None else tuple(found.shape)
        raise StateError(
            f"the state must hold {key} of shape {shape}, got {got}: it belongs to another "
            f"weight or input size"
        )
    return found


def _leading(xp: Any, a: Array, name: str) -> tuple[Array, Array, Array]:
    """(u, v, σ) of stacked matrices to start from."""
    backend.check_finite(xp, a)
    *batch, m, n = a.shape
    unit = backend.magnitude(xp, a, axis=(-2, -1))
    if not batch and m * n > _SVD_BELOW:
        start = _like(backend.start_vector(name, n), a)
        operator = MatrixOperator
        start = largest_singular_triplet(
            xp, operator, a / unit, None, start, tolerance=_START_TOLERANCE
        )[2]
    else:
        start = backend.conjugate(xp, svd(xp, a / unit)[2][..., 0, :])
    fallback = _like(np.broadcast_to(backend.start_vector(name, n), (*batch, n)).copy(), a)
    v, _ = _unit(xp, start, fallback)
    u = _like(np.broadcast_to(backend.start_vector(name + "u", m), (*batch, m)).copy(), a)
    return _step(xp, a, u, v)


def _step(xp: Any, a: Array, u: Array, v: Array) -> tuple[Array, Array, Array]:
    """One power step: (u, v, σ) with σ = ‖Aᴴu‖ = ⟨u, Av⟩."""
    u, _ = _unit(xp, (a @ v[..., None])[..., 0] if a.ndim > 2 else a @ v, u)
    image = backend.conjugate(xp, u)
    image = (image[..., None, :] @ a)[..., 0, :] if a.ndim > 2 else image @ a
    v, sigma = _unit(xp, backend.conjugate(xp, image), v)
    return u, v, sigma


def _along(xp: Any, a: Array, u: Array, v: Array) -> Array:
    """Re⟨u, Av⟩."""
    product = xp.sum(
        backend.conjugate(xp, u) * ((a @ v[..., None])[..., 0] if a.ndim > 2 else a @ v), axis=-1
    )
    return xp.real(product) if backend.is_complex(product) else product


def _unit(xp: Any, x: Array, fallback: Array | None) -> tuple[Array, Array]:
    """(x/‖x‖ along the last axis, ‖x‖): `fallback`, or x, where x is zero or not finite."""
    largest = xp.max(xp.abs(x), axis=-1, keepdims=True)
    usable = (largest > 0) & xp.isfinite(largest)
    scale = xp.where(usable, largest, xp.ones_like(largest))
    # Squares of what is scaled to 1 neither overflow nor vanish.
    scaled = x / xp.astype(scale, x.dtype)
    norm = xp.linalg.vector_norm(scaled, axis=-1, keepdims=True)
    unit = scaled / xp.astype(xp.where(usable, norm, xp.ones_like(norm)), x.dtype)
    if fallback is not None:
        unit = xp.where(usable, unit, fallback)
    return unit, (norm * scale)[..., 0]


def _rows(xp: Any, product: Any, x: Array) -> Array:
    """A product of the operator with (groups, n) vectors, again by groups."""
    return xp.reshape(product(xp.reshape(x, (-1,))), (x.shape[0], -1))


def _outer(xp: Any, u: Array, v: Array) -> Array:
    return u[..., :, None] * backend.conjugate(xp, v)[..., None, :]


def _inner(xp: Any, w: Array, axis: Array) -> Array:
    product = xp.sum(w * backend.conjugate(xp, axis))
    return xp.real(product) if backend.is_complex(product) else product


def _like(values: np.ndarray, like: Array) -> Array:
    return backend.constant(values, like, complex=backend.is_complex(like))
