r"""Clipping singular values with matrix products alone, and a proof of the result.

Accelerators are fast at products. With A = WᴴW/c² (on the smaller side; n × n) the nearest matrix
of norm at most c is

.. math:: P(W) = W B_*^{-1/2},\quad B_* = \max(I, A) = I + \tfrac12(T + |T|),\quad T = A - I.

1. S ≈ sign(T/ν) by composed minimax quintics, ν ≥ ‖T‖;
2. H = Hermitian part of TS, which is |T| if S is the sign; B = I + ½(T + H);
3. G ≈ B^(−1/2) by the coupled iteration; X = WG.

The number of products of n³ multiplications, for square matrices. The proof takes 5 of them and two
Cholesky factors; S takes 3 per quintic, and G 4 per quintic less 3:

==================  ==========  ===========
products in all     σ₁ ≤ 2c     σ₁ ≤ 5c
==================  ==========  ===========
float32             47          57
float64             99          102
==================  ==========  ===========

**The bound.** Everything it needs is measured on the computed S, H, B, G, which are only
assumed to be Hermitian (exact, by construction), not to commute. Let Q be the unitary sign
of S. Then |T| = |(TQ)ᴴ|, and as Hermitian moduli are √2-Lipschitz in the Frobenius norm
(Araki & Yamagami 1981), with H₋ the negative part of H,

.. math:: \|H - |T|\|_F \le \sqrt2\,\|TQ - H\|_F + 2\|H_-\|_F,\quad
          \|TQ - H\|_F \le \tfrac12\|TS - (TS)^H\|_F + \|T(I - S^2)\|_F,

because T(Q − S) = T(I − S²)·Q(I + |S|)^(−1). A wrong sign in S makes no residual but makes H
indefinite: `negative_part` sees it. So β = ½‖H − |T|‖_F bounds ‖B − B_*‖_F, and with B_* ⪰ I,
‖WB_*^(−1/2)‖ ≤ c,

.. math:: \|W(B^{-1/2} - B_*^{-1/2})\|_F \le c\,e_1,\quad
          e_1 = \beta/\bigl((1 + \sqrt{1-\beta})\sqrt{1-\beta}\bigr).

If G is positive definite and E = I − GBG, then F = B^(1/2)G − I solves
N^(1/2)F + FB^(1/2) = −B^(1/2)E, N = B^(1/2)(I − E)B^(1/2), from which, by continuity in E,

.. math:: \|W(G - B^{-1/2})\|_F \le c(1 + e_1)f,\quad
          f = 2\|E\|_F/\bigl(1 + \sqrt{1 - 2k\|E\|_F}\bigr),\quad
          k^2 = \|B\|_F/(1-\beta),\quad 2k\|E\|_F < 1.

To first order this is c(½β + ‖E‖_F) with ½β ≈ ¼√2‖T(I − S²)‖_F. In exact arithmetic it is a
theorem whatever S, G and the claimed norms. The rounding of the products that are measured is
the model of `product_rounding`: the one part that is not proven.

References
----------
Amsel, Persson, Musco & Gower 2025, "The Polar Express". Higham 2008, "Functions of Matrices",
chapters 5, 6 and 8.
"""

from __future__ import annotations

import math

import numpy as np

from specops import arrays
from specops.linalg.definite import negative_part
from specops.linalg.matrix_sign import (
    hermitian_part,
    identity_like,
    inverse_root,
    polar_iteration,
)
from specops.linalg.polar_express import EPSILONS, sign_quintics
from specops.linalg.rounding import frobenius, product_rounding
from specops.typing import Array, Namespace

NEAR, FAR = 2.0, 5.0
"""Ratios σ₁/limit to which the quintics are fitted; beyond, the clip is done in stages. At ratio 5
it takes 57 products, instead of two stages of 47 each."""
MOST_STAGES = 8
"""Most stages, of ratio 5 each: up to σ₁ = 4e5·c, as much as single precision resolves."""
SLACK = 1e-4
"""Relative excess over the given norms that rounding and an earlier stage may cause: a thousand
units of rounding in single precision."""
SIGN_RESOLUTION = 300.0
"""Least |T| whose sign is resolved at σ₁ = 2c, in units of ε·‖T‖; X then errs by 1/8 of it."""
# Fitted at import: compilers cannot look into the fit.
_SIGN = {
    (eps, reach): sign_quintics(SIGN_RESOLUTION * eps / (reach**2 - 1.0), 8.0 * eps)
    for eps in EPSILONS
    for reach in (NEAR, FAR)
}
_ROOT = {
    (eps, reach): sign_quintics(1.0 / ((1.0 + SLACK) * reach), eps)
    for eps in EPSILONS
    for reach in (NEAR, FAR)
}


def clip_by_products(xp: Namespace, a: Array, limit: Array, norms: Array) -> tuple[Array, Array]:
    r"""``U min(Σ, limit) Vᴴ`` for stacked matrices, and a bound of its error.

    The module's docstring describes the method and what the bound means. Where σ₁ > 5·limit the
    clip is done in stages of equal ratio, as P_c(P_c'(W)) = P_c(W) for c ≤ c'. Their number is
    read once from `norms` on the host, and is 1 while a compiler traces. Errors of the stages add
    up, those of early stages in units of the larger limits.

    Parameters
    ----------
    xp : namespace
        The arrays' namespace.
    a : array, shape (..., m, n)
        float32, float64 or their complex counterparts, scaled so that squares neither
        overflow nor underflow.
    limit : array, shape (...)
        Positive.
    norms : array, shape (...)
        Largest singular values or upper bounds of them. Matrices for which they are at most
        `limit` are returned as they were, with error 0. For the others a bound that does not hold
        makes `error` large, never wrong.

    Returns
    -------
    clipped : array, shape (..., m, n)
    error : array, shape (...)
        An upper bound of ‖clipped − P(a)‖_F; infinite where nothing could be proven.
    """
    finite = arrays.all_finite(xp, a, axis=(-2, -1)) & xp.isfinite(norms)
    outside = finite & (norms > limit)
    given = a
    a = xp.where(outside[..., None, None], a, xp.zeros_like(a))
    ratio = xp.where(outside, norms / limit, xp.ones_like(norms))
    largest = FAR if arrays.is_traced(ratio) else float(np.max(arrays.to_numpy(ratio)))
    stages = min(max(math.ceil(math.log(largest, FAR) - 1e-9), 1), MOST_STAGES)
    step = ratio ** (1.0 / stages)
    reach = NEAR if largest ** (1.0 / stages) <= NEAR else FAR
    error = xp.zeros_like(norms)
    with arrays.ieee_products(xp):
        for left in reversed(range(stages)):
            within = limit * step ** float(left)
            a, more = arrays.compiled(_clip_once, (xp, reach), a, within, step)
            error = error + more
    unproven = xp.full_like(error, math.inf)
    error = xp.where(outside & ~xp.isnan(error), error, unproven)
    error = xp.where(finite & ~outside, xp.zeros_like(error), error)
    return xp.where(outside[..., None, None], a, given), error


def _clip_once(
    xp: Namespace, reach: float, w: Array, limit: Array, ratio: Array
) -> tuple[Array, Array]:
    """(X, error) for stacked matrices of norm at most limit·ratio, ratio ≤ reach."""
    wide = w.shape[-2] < w.shape[-1]
    if wide:
        w = arrays.adjoint(xp, w)
    eps = arrays.epsilon(w.dtype)
    scaled = w / xp.astype(limit, w.dtype)[..., None, None]
    scaled_h = arrays.adjoint(xp, scaled)
    gram = scaled_h @ scaled
    identity = identity_like(xp, gram)
    t = hermitian_part(xp, gram) - identity
    kappa = ratio**2
    nu = (1.0 + SLACK) * xp.where(kappa > 2.0, kappa - 1.0, xp.ones_like(kappa))
    s = polar_iteration(xp, t / xp.astype(nu, w.dtype)[..., None, None], _SIGN[eps, reach])
    s = hermitian_part(xp, s)
    ts = t @ s
    h = hermitian_part(xp, ts)
    b = identity + 0.5 * (t + h)
    g = inverse_root(xp, b, kappa * (1.0 + SLACK), _ROOT[eps, reach])
    x = w @ g
    beta = (
        _sign_error(xp, t, s, ts, h, nu)
        + product_rounding(xp, scaled_h, scaled, gram)
        + eps * frobenius(xp, b)
    )
    error = limit * _root_error(xp, b, g, beta) + product_rounding(xp, w, g, x)
    return (arrays.adjoint(xp, x) if wide else x), error


def _sign_error(xp: Namespace, t: Array, s: Array, ts: Array, h: Array, nu: Array) -> Array:
    """A bound of ½‖H − |T|‖_F."""
    tss = ts @ s
    rounding = product_rounding(xp, t, s, ts)
    residual = (
        frobenius(xp, ts - h)
        + frobenius(xp, t - tss)
        + 2.0 * rounding
        + product_rounding(xp, ts, s, tss)
    )
    # By how much rounding may have moved eigenvalues of H that are zero below zero.
    shift = rounding / math.sqrt(t.shape[-1]) + 3.0 * arrays.epsilon(t.dtype) * nu
    return math.sqrt(0.5) * residual + negative_part(xp, h, shift)


def _root_error(xp: Namespace, b: Array, g: Array, beta: Array) -> Array:
    """e₁ + (1 + e₁)f in units of the limit, infinite unless β ≤ ½, E ≤ ¼ and G is definite."""
    gb = g @ b
    gbg = gb @ g
    # ‖G‖ ≤ 2 follows from β ≤ ½ and E ≤ ¼.
    e = (
        frobenius(xp, identity_like(xp, b) - gbg)
        + 2.0 * product_rounding(xp, g, b, gb)
        + product_rounding(xp, gb, g, gbg)
    )
    size = frobenius(xp, b)
    k = xp.sqrt(2.0 * size)
    # |λ(G)|² ≥ (1 − E)/‖B‖: if no eigenvalue is below minus its root, all are positive.
    indefinite = negative_part(xp, g, xp.zeros_like(size))
    proven = (beta <= 0.5) & (e <= 0.25) & (k * e <= 0.25) & (indefinite**2 * size < 0.75)
    zero = xp.zeros_like(e)
    beta, e = xp.where(proven, beta, zero), xp.where(proven, e, zero)
    root = xp.sqrt(1.0 - beta)
    first = beta / ((1.0 + root) * root)
    f = 2.0 * e / (1.0 + xp.sqrt(1.0 - 2.0 * k * e))
    return xp.where(proven, first + (1.0 + first) * f, xp.full_like(e, math.inf))
