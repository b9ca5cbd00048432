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
    """An operator of equal diagonal blocks that a compiler can make again from its parts.

    A is ``type(A)(A.data, A.sizes)``.
    """

    def __init__(self, data: Any, sizes: Any) -> None: ...

    @property
    def data(self) -> Any:
        """The array, or tuple of arrays, that it is made of."""

    @property
    def sizes(self) -> Hashable:
        """The rest of what it is made of."""

    @property
    def blocks(self) -> int:
        """How many equal blocks it is known to have; vectors list them one after another."""
