"""What a parameter of a layer is for."""

from __future__ import annotations

from dataclasses import dataclass

from specops.geometry import Geometry


@dataclass(frozen=True)
class Role:
    """What a parameter is: a map, a map that only a plan that names it constrains, or not."""

    geometry: Geometry | None = None
    obstacle: str = ""
    opt_in: str = ""
    remark: str = ""
    """What is to be known of the geometry: that it takes several maps for one."""
