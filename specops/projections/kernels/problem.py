"""`KernelProblem`: a kernel to bring into the operator ball, its support, bound and scale."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from specops import arrays
from specops.geometry import Conv
from specops.maps.every_size import certified_symbol
from specops.maps.prepare import Prepared
from specops.projections.info import ProjectionInfo
from specops.projections.kernels.support import Support
from specops.typing import Array, State


@dataclass(frozen=True)
class KernelProblem:
    """Project one kernel: in coordinates of its support, in units of its scale.

    Attributes
    ----------
    given : Prepared
        The weight and its Conv.
    geometry : Conv
    w : array
        The weight as given.
    max_norm : float or array
        The bound.
    support : Support
        Coordinates and blocks.
    certificate : float
        What the bound on the grid of the support is multiplied by.
    """

    given: Prepared
    geometry: Conv
    w: Array
    max_norm: Any
    support: Support
    certificate: float

    @classmethod
    def of(cls, given: Prepared, w: Array, max_norm: Any) -> KernelProblem:
        """The problem of a prepared weight, with the support and grid of its geometry."""
        assert isinstance(given.geometry, Conv)
        sizes = given.geometry.sizes(tuple(w.shape))
        symbol, certificate = certified_symbol(sizes, not arrays.is_complex(given.w))
        return cls(given, given.geometry, w, max_norm, Support(symbol), certificate)

    @property
    def unit(self) -> float:
        """The scale of the prepared weight as a number; only for concrete weights, as `bound`."""
        return arrays.number(self.given.scale)

    @property
    def bound(self) -> float:
        """`max_norm` as a number."""
        return arrays.number(self.max_norm)

    def info(
        self, before: float, after: float, gap: float, rounds: int, state: State
    ) -> ProjectionInfo:
        """The figures of a solver on the host; its norms are those of the weight as given."""
        norm_before, norm_after, relative = (
            arrays.constant(np.asarray(x), self.given.w) for x in (before, after, gap)
        )
        return ProjectionInfo(norm_before, norm_after, relative, rounds, state)

    @property
    def margin(self) -> float:
        """A factor slightly below 1 for the limit, so that rounding does not lead outside of it."""
        return 1.0 - 4.0 * arrays.epsilon(self.given.w.dtype)
