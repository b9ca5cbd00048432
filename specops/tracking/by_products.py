"""Steps on a sharded weight, which no device holds as a whole: they ask for products with it."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from typing import TypeVar

from specops.geometry import Dense
from specops.typing import Array

R = TypeVar("R")


@dataclass(frozen=True)
class Wanted:
    """Products that a step asks for: of each block's matrices A with the vectors in `rows`.

    The matrices have the shape (*batch, m, n). The caller sends an array of rows for each block.
    """

    geometry: Dense
    rows: tuple[Array, ...]
    """(*batch, k, n), answered by rows Ax of shape (*batch, k, m); or (*batch, k, m), by Aᴴx."""
    to_left: bool
    """Whether the products are with A (rather than with its adjoint)."""


Steps = Generator[Wanted, tuple[Array, ...], R]
"""A generator that yields the products it wants, and is sent them."""
