"""`Role`: what an adapter finds out about a parameter from the layer that holds it."""

from __future__ import annotations

from dataclasses import dataclass

from specops.geometry import Geometry


@dataclass(frozen=True)
class Role:
    """What a parameter is in its layer: a linear map, or something else, and why."""

    geometry: Geometry | None = None
    """The map that it stands for, if it stands for one."""
    obstacle: str = ""
    """Why it has no map that could be constrained."""
    opt_in: str = ""
    """Why only a pattern that names it constrains it (an embedding)."""
    remark: str = ""
    """What the user should know about the geometry: that it treats several maps as one."""
    skipped: str = ""
    """Why no rule acts on it, even if a pattern names it (a bias)."""
    shape: tuple[int, ...] = ()
    """The shape of the array, where the adapter needs it."""
