"""The protocols of derivatives that measures take."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from specops.maps.protocol import Operator
from specops.typing import Array


@runtime_checkable
class SymmetricOperator(Protocol):
    """A symmetric matrix by its products: the Hessian of a loss.

    Attributes
    ----------
    shape : (int, int)
        Of the matrix.
    like : array
        Vectors have its namespace and device, and its dtype; of half precision, float32.
    """

    shape: tuple[int, int]
    like: Array

    def matvec(self, x: Array) -> Array:
        """A x, for x of shape (columns,)."""


@runtime_checkable
class JacobianOperator(SymmetricOperator, Operator, Protocol):
    """Any real matrix by its products from both sides: the Jacobian of a function at a point."""

    def rmatvec(self, y: Array) -> Array:
        """Aᵀ y, for y of shape (rows,)."""
