"""The distance of a Hermitian matrix from the positive semidefinite ones, certified."""

from __future__ import annotations

import math

from specops import arrays
from specops.linalg.matrix_sign import identity_like
from specops.linalg.rounding import frobenius, product_rounding
from specops.typing import Array, Namespace


def negative_part(xp: Namespace, a: Array, shift: Array) -> Array:
    r"""An upper bound of ‖A₋‖_F for stacked Hermitian a; NaN or infinite if none was found.

    A₋ is the part of A with negative eigenvalues, whose Frobenius norm is the distance to the
    nearest positive semidefinite matrix. Any L proves

    .. math:: \|A_-\|_F \le \|A + \eta I - LL^H\|_F + \eta\sqrt n,

    so the Cholesky factor of A + ηI is only a guess, and the bound holds whatever a library leaves
    in L when the factorisation fails. The cost is that of about 4/3 products.

    Parameters
    ----------
    xp : namespace
        The arrays' namespace.
    a : array, shape (..., n, n)
        Hermitian.
    shift : array, shape (...)
        η: a few units in the last place of ‖a‖, so that rounding does not break the factor.
    """
    size = a.shape[-1]
    shifted = a + xp.astype(shift, a.dtype)[..., None, None] * identity_like(xp, a)
    factor = xp.tril(arrays.try_cholesky(xp, shifted)[0])
    square = factor @ arrays.adjoint(xp, factor)
    residual = frobenius(xp, shifted - square) + product_rounding(
        xp, factor, arrays.adjoint(xp, factor), square
    )
    return residual + math.sqrt(size) * shift
