"""The norm of a convolution's operator, tracked from step to step by vectors of its size."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from specops import arrays
from specops.errors import GeometryError
from specops.geometry import Conv, ConvSizes
from specops.linalg.golub_kahan import largest_singular_triplet
from specops.maps.convolution import ConvOperator
from specops.maps.unread import without_unread
from specops.spectra.norms import plane_wave
from specops.tracking.matrices import GRADIENT, AlongGradient
from specops.tracking.power import (
    Pairs,
    back,
    beside,
    checked,
    filled,
    steps_on_host,
    to_left_side,
    to_right_side,
    unit,
)
from specops.typing import Array, Namespace, State

_OPERATOR_RESIDUAL = 1e-4
"""Residual, over σ₁, to which the first vectors are iterated; norms are then known to its square.
Values come in pairs here, and further iterations would only turn vectors within a pair's plane."""


@dataclass(frozen=True)
class TrackedOperator(AlongGradient):
    """‖A‖₂ of a convolution, by vectors of its size, one for each group."""

    geometry: Conv

    @property
    def kept(self) -> frozenset[str]:
        """The keys of its state."""
        return frozenset(("v", "q", GRADIENT, "sigma"))

    def start(self, w: Array, name: str = "") -> State:
        """The leading pair, to about 1e-4."""
        xp = arrays.namespace(w)
        kernel, sizes = self._kernel(xp, w)
        arrays.check_finite(xp, kernel)
        scale = arrays.magnitude(xp, kernel)
        near_one = kernel / scale
        start = ConvOperator(near_one, sizes).rmatvec(plane_wave(xp, near_one, sizes))
        _, _, v = largest_singular_triplet(
            xp, ConvOperator(near_one, sizes), start, tolerance=_OPERATOR_RESIDUAL
        )
        # Groups that do not lead now may lead later: their vectors start from the name's noise.
        v = xp.reshape(v, (sizes.groups, -1))
        noise = arrays.start_vector(name, 2 * math.prod(v.shape)).reshape(2, *v.shape)
        first, second = filled(noise[0], kernel), filled(noise[1], kernel)
        v = unit(xp, v, unit(xp, first, None)[0])[0]
        return self.advance(w, {"v": v, "q": beside(xp, second, v)})

    def advance(self, w: Array, state: State, rounds: int = 1) -> State:
        """The state after `rounds` steps, with the norm and its gradient."""
        xp = arrays.namespace(w)
        kernel, sizes = self._kernel(xp, w)
        scale = arrays.magnitude(xp, kernel)
        operator = ConvOperator(kernel / scale, sizes)
        shape = (sizes.groups, operator.shape[1] // sizes.groups)
        v, q = (checked(state, key, shape, kernel) for key in "vq")
        found = _stepped_on_host(operator, v, q, rounds)
        pairs, sigmas = self._stepped(xp, operator, v, q, rounds) if found is None else found
        index = arrays.argmax(xp, sigmas)
        leads = xp.take(arrays.constant(np.eye(sizes.groups), sigmas), index, axis=0)[0, :]
        masked = pairs.u * xp.astype(leads, pairs.u.dtype)[:, None]
        # The gradient of the leading group's pair alone.
        gradient = operator.gradient(xp.reshape(masked, (-1,)), xp.reshape(pairs.v, (-1,)))
        return {
            "v": pairs.v,
            "q": pairs.q,
            GRADIENT: self.geometry.weight(gradient),
            "sigma": xp.max(sigmas) * xp.reshape(scale, ()),
        }

    def _stepped(
        self, xp: Namespace, operator: ConvOperator, v: Array, q: Array, rounds: int
    ) -> tuple[Pairs, Array]:
        def step(v: Array, q: Array) -> tuple[Pairs, Array]:
            image = partial(_rows, xp, operator.matvec)
            pairs, _ = to_left_side(xp, image, Pairs(None, v, None, q))
            return to_right_side(xp, partial(_rows, xp, operator.rmatvec), pairs)

        if rounds > 1:

            def right(_: Any, pair: tuple[Array, Array]) -> tuple[Array, Array]:
                pairs, _ = step(*pair)
                return pairs.v, pairs.q

            v, q = arrays.fori(xp, 0, rounds - 1, right, (v, q))
        return step(v, q)

    def _kernel(self, xp: Namespace, w: Array) -> tuple[Array, ConvSizes]:
        w = without_unread(arrays.stop_gradient(arrays.to_compute(xp, w)), self.geometry)
        kernel = self.geometry.kernel(w)
        sizes = self.geometry.sizes(tuple(w.shape))
        if sizes.fine is None:
            raise GeometryError(
                f"{self.geometry.describe()} has no input size, and the operator's norm "
                f"depends on it: name its input_shape, or where layers are watched run one "
                f"forward pass first"
            )
        return kernel, sizes


def _stepped_on_host(
    operator: ConvOperator, v: Array, q: Array, rounds: int
) -> tuple[Pairs, Array] | None:
    """The steps for a real map of one group on the CPU, in fewer calls; None for other maps."""
    kernel = operator.data
    if operator.blocks > 1 or arrays.is_complex(kernel) or not arrays.is_constant_on_host(kernel):
        return None

    def on_host(product: Any) -> Any:
        return lambda x: arrays.host_view(product(arrays.from_host(x, kernel)))

    products = on_host(operator.matvec), on_host(operator.rmatvec)
    near = Pairs(None, arrays.host_view(v[0, :]), None, arrays.host_view(q[0, :]))
    found = steps_on_host(products, near, (True, False) * rounds)
    if found is None:
        return None
    pairs, sigma = back(*found, kernel)
    return Pairs(*(x[None, :] for x in pairs)), sigma[None]


def _rows(xp: Namespace, product: Any, x: Array, y: Array) -> tuple[Array, Array]:
    """Products of the operator with two sets of (groups, n) vectors, again by groups."""
    both = product(xp.reshape(xp.stack([x, y]), (2, -1)))
    both = xp.reshape(both, (2, x.shape[0], -1))
    return both[0, ...], both[1, ...]
