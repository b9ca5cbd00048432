"""The protocols of derivatives that measures take."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from specops.maps.protocol import Operator
from specops.typing import Array


@runtime_checkable
class SymmetricOperator(Protocol):
    """A symmetric or Hermitian matrix, as products with vectors, such as the Hessian of a loss.

    Attributes
    ----------
    shape : (int, int)
        The shape of the matrix.
    like : array
        Vectors have its namespace, device and dtype, or float32 if it has half precision.
    """

    shape: tuple[int, int]
    like: Array

    def matvec(self, x: Array) -> Array:
        """A x, for x of shape (columns,)."""


@runtime_checkable
class JacobianOperator(SymmetricOperator, Operator, Protocol):
    """Any matrix by its products from both sides: the Jacobian of a function at a point."""

    def rmatvec(self, y: Array) -> Array:
        """Aᵀ y, of a complex matrix Aᴴ y, for y of shape (rows,)."""
