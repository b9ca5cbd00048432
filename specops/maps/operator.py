"""`linear_operator`: the map that a weight stands for, as products with vectors."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, overload

from specops import arrays
from specops.errors import UnsupportedArrayError, UnsupportedGeometryError
from specops.geometry import Conv, Dense, Geometry
from specops.maps.convolution import ConvOperator
from specops.maps.prepare import prepare
from specops.typing import Array, Namespace


class Products(NamedTuple):
    """A map on rows (..., n) of vectors, and on columns (..., n, k)."""

    rows: Callable[[Array], Array]
    columns: Callable[[Array], Array]


class LinearOperator:
    """The linear map A that a weight and a geometry stand for.

    ``scipy.sparse.linalg.aslinearoperator`` takes it as it is, where the weight is NumPy's.

    Attributes
    ----------
    shape : tuple of int
        (outputs, inputs): for a Conv (channels · grid) flattened, channels first; for a stack
        of matrices the shape of each.
    like : array
        Vectors have its namespace and device, and its dtype: that in which products are computed.
    dtype : dtype
        Of `like`.
    """

    def __init__(
        self,
        shape: tuple[int, int],
        like: Array,
        forward: Products,
        backward: Products,
        matrix: Callable[[], Array],
    ) -> None:
        self.shape, self.like, self.dtype = shape, like, like.dtype
        self._forward, self._backward, self._matrix = forward, backward, matrix

    def __repr__(self) -> str:
        return f"<LinearOperator {self.shape[0]}×{self.shape[1]}>"

    def matvec(self, x: Array) -> Array:
        """A x for x of shape (..., inputs), or for columns (..., inputs, 1).

        Columns give columns (..., outputs, 1). Where there is a single input, the last axis is
        that of the inputs.
        """
        return self._vectors(self._forward, x, self.shape[1])

    def rmatvec(self, y: Array) -> Array:
        """Aᴴ y for y of shape (..., outputs), or for columns (..., outputs, 1), as `matvec`."""
        return self._vectors(self._backward, y, self.shape[0])

    def matmat(self, x: Array) -> Array:
        """A X for X of shape (..., inputs, k): (..., outputs, k)."""
        return self._matrices(self._forward, x, self.shape[1])

    def rmatmat(self, y: Array) -> Array:
        """Aᴴ Y for Y of shape (..., outputs, k): (..., inputs, k)."""
        return self._matrices(self._backward, y, self.shape[0])

    def __matmul__(self, x: Array) -> Array:
        """``A @ x`` as for the explicit matrix: a vector (inputs,), or X of `matmat`."""
        if not hasattr(x, "ndim"):
            return NotImplemented
        return self.matvec(x) if x.ndim == 1 else self.matmat(x)

    @property
    def H(self) -> LinearOperator:
        """The adjoint Aᴴ as an operator."""

        def matrix() -> Array:
            a = self.to_matrix()
            return arrays.adjoint(arrays.namespace(a), a)

        return LinearOperator(self.shape[::-1], self.like, self._backward, self._forward, matrix)

    def to_matrix(self) -> Array:
        """The explicit matrix, (outputs, inputs): memory is the product of the two."""
        return self._matrix()

    def _check_kind(self, x: Array) -> None:
        xp = arrays.namespace(x)
        if not arrays.compute_together(x, self.like):
            given, own = (
                f"{space.__name__.removeprefix('array_api_compat.')} on {arrays.device_of(a)}"
                for space, a in ((xp, x), (arrays.namespace(self.like), self.like))
            )
            raise UnsupportedArrayError(
                f"the products of {self!r} take arrays like its attribute `like`, of {own}, got "
                f"one of {given}: convert them first"
            )

    def _vectors(self, products: Products, x: Array, length: int) -> Array:
        self._check_kind(x)
        shape = tuple(x.shape)
        if length != 1 and shape[-2:] == (length, 1):
            return self._applied(products.rows, x[..., 0])[..., None]
        if shape[-1:] != (length,):
            raise ValueError(
                f"expected vectors of shape (..., {length}) or columns (..., {length}, 1) for "
                f"{self!r}, got {shape}"
            )
        return self._applied(products.rows, x)

    def _matrices(self, products: Products, x: Array, length: int) -> Array:
        self._check_kind(x)
        shape = tuple(x.shape)
        if shape[-2:-1] != (length,):
            raise ValueError(
                f"expected a matrix of shape (..., {length}, k) for {self!r}, got {shape}"
            )
        return self._applied(products.columns, x)

    def _applied(self, product: Callable[[Array], Array], x: Array) -> Array:
        xp = arrays.namespace(x)
        x = arrays.to_compute(xp, x)
        is_complex = arrays.dtype_name(self.dtype).startswith("complex")
        if is_complex and not arrays.is_complex(x):
            x = xp.astype(x, arrays.complex_dtype(xp, x.dtype))
        elif arrays.is_complex(x) and not is_complex:
            # Not every library multiplies real by complex arrays.
            return arrays.complex_of(xp, product(xp.real(x)), product(xp.imag(x)))
        return product(x)


@overload
def linear_operator(w: Array, geometry: Conv | None = None) -> LinearOperator: ...


@overload
def linear_operator(
    w: Array, geometry: Geometry | None
) -> LinearOperator | tuple[LinearOperator, ...]: ...


def linear_operator(
    w: Array, geometry: Geometry | None = None
) -> LinearOperator | tuple[LinearOperator, ...]:
    """The linear map that `w` stands for, as products with vectors.

    Parameters
    ----------
    w : array
        Real or complex; half precision computes in float32.
    geometry : Dense or Conv, optional
        The map; None is ``Dense()`` for a two-dimensional array.

    Returns
    -------
    LinearOperator, or a tuple of them with ``Dense(splits=...)``
        With ``matvec``, ``rmatvec`` (the adjoint), ``matmat``, ``rmatmat``, ``@``, ``H``,
        ``shape``, ``dtype`` and ``to_matrix``. For ``batch_axes`` the leading axes of a vector
        are those of the batch.

    Raises
    ------
    GeometryError, UnsupportedArrayError
        As in `singular_values`.
    UnsupportedGeometryError
        A Conv without input size.

    Examples
    --------
    >>> import numpy as np
    >>> blur = linear_operator(np.ones((1, 1, 3)), Conv((4,)))
    >>> blur @ np.array([1.0, 0.0, 0.0, 1.0])
    array([1., 1., 1., 1.])
    >>> blur.H.shape
    (4, 4)
    """
    given = prepare(w, geometry, scaled=False)
    xp = given.xp
    if isinstance(given.geometry, Dense):
        operators = tuple(_of_matrix(xp, m) for m in given.geometry.blocks(given.w))
        return operators if given.geometry.splits is not None else operators[0]
    operator = _conv_operator(given.w, given.geometry)
    forward, backward = (_by_rows(xp, f) for f in (operator.matvec, operator.rmatvec))
    if not given.geometry.transposed:
        return LinearOperator(operator.shape, given.w, forward, backward, operator.to_matrix)
    # A transposed convolution acts by the transpose of the convolution, not by its adjoint.
    plain = _conv_operator(arrays.conjugate(xp, given.w), given.geometry)
    return LinearOperator(
        operator.shape[::-1],
        given.w,
        _by_rows(xp, plain.rmatvec),
        _by_rows(xp, plain.matvec),
        lambda: xp.matrix_transpose(operator.to_matrix()),
    )


def _by_rows(xp: Namespace, product: Callable[[Array], Array]) -> Products:
    """Products of a map that takes vectors as rows."""
    return Products(product, lambda x: xp.matrix_transpose(product(xp.matrix_transpose(x))))


def _of_matrix(xp: Namespace, matrix: Array) -> LinearOperator:
    def products(a: Array) -> Products:
        def rows(x: Array) -> Array:
            if matrix.ndim == 2:
                return arrays.matmul(x, xp.matrix_transpose(a))
            return arrays.matmul(a, x[..., None])[..., 0]

        return Products(rows, lambda x: arrays.matmul(a, x))

    outputs, inputs = (int(n) for n in matrix.shape[-2:])
    backward = products(arrays.adjoint(xp, matrix))
    return LinearOperator((outputs, inputs), matrix, products(matrix), backward, lambda: matrix)


def _conv_operator(w: Array, geometry: Conv) -> ConvOperator:
    sizes = geometry.sizes(tuple(w.shape))
    if sizes.fine is None:
        raise UnsupportedGeometryError(
            "Conv(input_shape=None) stands for every size at once: name the input_shape"
        )
    return ConvOperator(geometry.kernel(w), sizes)
