"""Steps of a weight that nobody holds as a whole: products with vectors are asked for."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from typing import TypeVar

from specops.geometry import Dense
from specops.typing import Array

R = TypeVar("R")


@dataclass(frozen=True)
class Wanted:
    """Products that a step needs: who runs it sends an array like `rows` for each block.

    Of each block's matrices A, shape (*batch, m, n), those with the vectors that are rows.
    """

    geometry: Dense
    rows: tuple[Array, ...]
    """(*batch, k, n), answered by rows Ax of shape (*batch, k, m); or (*batch, k, m), by Aᴴx."""
    to_left: bool
    """Whether with A rather than its adjoint."""


Steps = Generator[Wanted, tuple[Array, ...], R]
"""A computation that yields what it wants and is sent it."""
