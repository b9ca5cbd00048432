"""The norm of a convolution's operator, followed from step to step by vectors of its size."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from specops import backend
from specops.errors import GeometryError
from specops.geometry import Conv, ConvSizes
from specops.geometry.unread import without_unread
from specops.linalg.lanczos import largest_singular_triplet
from specops.operators import ConvOperator
from specops.spectra.norms import plane_wave
from specops.tracking.matrices import AlongAxis
from specops.tracking.power import START_TOLERANCE, Array, State, checked, filled, unit


@dataclass(frozen=True)
class TrackedOperator(AlongAxis):
    """‖A‖₂ of a convolution, by vectors of its size, one for each group."""

    geometry: Conv

    def start(self, w: Array, name: str = "") -> State:
        """The leading pair, to about 1e-4."""
        xp = backend.namespace(w)
        kernel, sizes = self._kernel(xp, w)
        backend.check_finite(xp, kernel)
        scale = backend.magnitude(xp, kernel)
        near_one = kernel / scale
        start = ConvOperator(near_one, sizes).rmatvec(plane_wave(xp, near_one, sizes))
        _, _, v = largest_singular_triplet(
            xp, ConvOperator, near_one, sizes, start, tolerance=START_TOLERANCE
        )
        # Groups that do not lead now may lead later: their vectors start from the name's.
        v = xp.reshape(v, (sizes.groups, -1))
        noise = backend.start_vector(name, math.prod(v.shape)).reshape(v.shape)
        v = unit(xp, v, unit(xp, filled(noise, kernel), None)[0])[0]
        return self.advance(w, {"v": v})

    def advance(self, w: Array, state: State, rounds: int = 1) -> State:
        """The state after `rounds` power steps, with the norm and its gradient."""
        xp = backend.namespace(w)
        v, sigma, leads, operator, image = self._steps(xp, w, state, rounds)
        masked = xp.reshape(image * leads, (-1,))
        # The pair's gradient: σ is linear along it, whatever the other groups do.
        axis = operator.gradient(masked, xp.reshape(v, (-1,)))
        return {"v": v, "axis": self.geometry.weight(axis), "sigma": sigma}

    def _steps(
        self, xp: Any, w: Array, state: State, rounds: int
    ) -> tuple[Array, Array, Array, ConvOperator, Array]:
        kernel, sizes = self._kernel(xp, w)
        operator = ConvOperator(kernel, sizes)
        expected = (sizes.groups, operator.shape[1] // sizes.groups)
        v = checked(state, "v", expected, kernel)

        def step(v: Array) -> tuple[Array, Array, Array]:
            image, _ = unit(xp, _rows(xp, operator.matvec, v), None)
            return image, *unit(xp, _rows(xp, operator.rmatvec, image), v)

        if rounds > 1:
            v = backend.fori(xp, 0, rounds - 1, lambda _, v: step(v)[1], v)
        image, v, sigmas = step(v)
        index = backend.argmax(xp, sigmas)
        leads = xp.take(backend.constant(np.eye(sizes.groups), sigmas), index, axis=0)[0, :]
        return v, xp.max(sigmas), xp.astype(leads, v.dtype)[:, None], operator, image

    def _kernel(self, xp: Any, w: Array) -> tuple[Array, ConvSizes]:
        w = without_unread(backend.stop_gradient(backend.to_compute(xp, w)), self.geometry)
        kernel = self.geometry.kernel(w)
        sizes = self.geometry.sizes(tuple(w.shape))
        if sizes.fine is None:
            raise GeometryError(
                f"{self.geometry.describe()} has no input size, and the operator's norm "
                f"depends on it: run one forward pass first, or pass the geometry"
            )
        return kernel, sizes


def _rows(xp: Any, product: Any, x: Array) -> Array:
    """A product of the operator with (groups, n) vectors, again by groups."""
    return xp.reshape(product(xp.reshape(x, (-1,))), (x.shape[0], -1))
