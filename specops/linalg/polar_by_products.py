"""The polar factor of stacked matrices with matrix products alone."""

from __future__ import annotations

from specops import arrays
from specops.linalg.gram_iteration import gram_iteration
from specops.linalg.matrix_sign import identity_like, polar_iteration
from specops.linalg.polar_express import EPSILONS, sign_quintics
from specops.linalg.rounding import frobenius, product_rounding
from specops.typing import Array, Namespace

POLAR_RESOLUTION = 100.0
"""The smallest singular values that are mapped to 1, in units of ε·σ₁."""
_POLAR = {eps: sign_quintics(POLAR_RESOLUTION * eps, 8.0 * eps) for eps in EPSILONS}


def polar_by_products(xp: Namespace, a: Array) -> tuple[Array, Array]:
    r"""U Vᴴ for stacked a = U Σ Vᴴ, and how far from orthonormal it is.

    This is Polar Express on `a` divided by a certified bound of its norm. It takes 3 products per
    quintic (30 in single and 78 in double precision for square matrices), 6 for the bound and 1
    for the check.

    Parameters
    ----------
    xp : namespace
        The arrays' namespace.
    a : array, shape (..., m, n)
        float32, float64 or their complex counterparts, scaled so that squares neither
        overflow nor underflow.

    Returns
    -------
    factor : array, shape (..., m, n)
        Singular values below 100·ε·σ₁ (zero among them) stay below 1.
    error : array, shape (...)
        At least ‖I − XᴴX‖_F on the smaller side, and so at least the distance of X to the
        nearest matrix with orthonormal columns (rows). It says nothing about which one: that
        it is the polar factor of `a` is up to rounding times σ₁/σ_min.

    References
    ----------
    Amsel, Persson, Musco & Gower 2025, "The Polar Express".
    """
    largest = gram_iteration(xp, a)
    safe = xp.astype(arrays.nonzero(xp, largest), a.dtype)
    eps = arrays.epsilon(a.dtype)
    x = polar_iteration(xp, a / safe[..., None, None], _POLAR[eps])
    xh = arrays.adjoint(xp, x)
    left, right = (x, xh) if a.shape[-2] < a.shape[-1] else (xh, x)
    gram = left @ right
    residual = frobenius(xp, identity_like(xp, gram) - gram)
    return x, residual + product_rounding(xp, left, right, gram)
