"""What an operator is: a linear map known by its products with vectors."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any, Protocol, runtime_checkable

from specops.typing import Array


@runtime_checkable
class Operator(Protocol):
    """A linear map A by its products from both sides; leading axes are independent vectors."""

    @property
    def shape(self) -> tuple[int, int]:
        """(outputs, inputs)."""

    def matvec(self, x: Array) -> Array:
        """A x: (..., inputs) to (..., outputs)."""

    def rmatvec(self, y: Array) -> Array:
        """Aᴴ y: (..., outputs) to (..., inputs)."""


class BlockOperator(Operator, Protocol):
    """An operator of diagonal blocks of equal size, which a compiler can rebuild from its parts.

    A equals ``type(A)(A.data, A.sizes)``.
    """

    def __init__(self, data: Any, sizes: Any) -> None: ...

    @property
    def data(self) -> Any:
        """The array, or tuple of arrays, that it is made of."""

    @property
    def sizes(self) -> Hashable:
        """The other, static part that it is made of."""

    @property
    def blocks(self) -> int:
        """How many blocks it is known to have; vectors list their entries block by block."""
