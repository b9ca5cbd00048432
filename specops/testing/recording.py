"""`Recorder`: a rule that records the arguments that an adapter calls it with."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal

from specops.geometry import Conv, Geometry


@dataclass(frozen=True, eq=False)
class Recorder:
    """A third-party rule, as small as the protocol allows: it changes nothing.

    Attributes
    ----------
    seen : list of (weight, geometry)
        One entry for each firing.
    """

    seen: list[tuple[Any, Geometry]] = field(default_factory=list, repr=False)
    stage: ClassVar[Literal["weights"]] = "weights"

    def init(self, weight: Any, geometry: Geometry, name: str) -> dict[str, Any]:
        """No state."""
        return {}

    def update(
        self,
        weight: Any,
        geometry: Geometry,
        state: dict[str, Any],
        *,
        step: int = 1,
        name: str = "",
    ) -> tuple[Any, dict[str, Any], dict[str, Any]]:
        """Record the arguments."""
        self.seen.append((weight, geometry))
        return weight, state, {}


def with_grid(geometry: Geometry, shape: tuple[int, ...], input_shape: tuple[int, ...]) -> Geometry:
    """The geometry at the input size of one sample, if it is a convolution of any size.

    The channels are the first or the last axis of `input_shape`: first where the kernel's
    spatial axes come last (as in torch), last where they come first (as in flax and keras),
    if as many channels as the kernel has stand there.
    """
    if not isinstance(geometry, Conv) or geometry.grid is not None:
        return geometry
    # In these layouts the input axis counts the channels of a single group.
    grouped = geometry.layout in ("OI*", "*IO")
    channels = shape[geometry.channel_axes[1]] * (geometry.groups if grouped else 1)
    first, last = input_shape[1:], input_shape[:-1]
    spatial_last = geometry.layout in ("OI*", "IO*")
    preferred, other = (first, last) if spatial_last else (last, first)
    fits = math.prod(input_shape) == channels * math.prod(preferred)
    return replace(geometry, input_shape=preferred if fits else other)
