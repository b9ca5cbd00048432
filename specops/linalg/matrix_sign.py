"""Sign, polar factor and inverse square root of stacked matrices from products alone."""

from __future__ import annotations

from typing import Any

import array_api_compat as compat
import numpy as np

from specops import arrays
from specops.linalg.polar_express import Quintic
from specops.typing import Array, Namespace


def polar_iteration(xp: Namespace, x: Array, quintics: tuple[Quintic, ...]) -> Array:
    r"""U p(Σ) Vᴴ for stacked x = U Σ Vᴴ, p being the composition of the quintics.

    With singular values in [0, 1] and the quintics of `sign_quintics` it is the polar factor, and
    for a Hermitian matrix its sign. Each quintic takes three products on the smaller side:

    .. math:: X \leftarrow X\,(aI + bY + cY^2),\quad Y = X^H X.

    References
    ----------
    Amsel, Persson, Musco & Gower 2025, "The Polar Express", algorithm 1.
    """
    wide = x.shape[-2] < x.shape[-1]
    if wide:
        x = arrays.adjoint(xp, x)
    identity = identity_like(xp, x)

    def step(j: Any, x: Array) -> Array:
        a, b, c = _coefficients(quintics, j, x)
        y = arrays.adjoint(xp, x) @ x
        return x @ (a * identity + b * y + c * (y @ y))

    x = arrays.fori(xp, 0, len(quintics), step, x)
    return arrays.adjoint(xp, x) if wide else x


def inverse_root(xp: Namespace, b: Array, largest: Array, quintics: tuple[Quintic, ...]) -> Array:
    r"""B^(−1/2) of stacked Hermitian b with eigenvalues in [lower²·largest, largest].

    The sign of [[0, B], [I, 0]] is [[0, B^(1/2)], [B^(−1/2), 0]], and an odd polynomial keeps
    the zero blocks: from Y = B/largest and Z = I,

    .. math:: Q = aI + bM + cM^2,\quad M = ZY,\quad Y \leftarrow YQ,\quad Z \leftarrow QZ.

    With q quintics fitted to [lower, 1] that is 4q − 3 products.

    References
    ----------
    Higham 2008, "Functions of Matrices", theorem 5.2 and section 6.7.
    """
    unit = largest[..., None, None]
    y = b / xp.astype(unit, b.dtype)
    identity = identity_like(xp, b)
    z = None
    for step, (first, third, fifth) in enumerate(quintics):
        m = y if z is None else z @ y
        q = first * identity + third * m + fifth * (m @ m)
        z = q if z is None else q @ z
        if step + 1 < len(quintics):
            y = y @ q
    return hermitian_part(xp, z) / xp.astype(xp.sqrt(unit), b.dtype)


def hermitian_part(xp: Namespace, a: Array) -> Array:
    """(A + Aᴴ)/2, Hermitian to the last bit."""
    return 0.5 * (a + arrays.adjoint(xp, a))


def _coefficients(quintics: tuple[Quintic, ...], j: Any, like: Array) -> Any:
    if isinstance(j, int):
        return quintics[j]
    row = arrays.constant(np.asarray(quintics), like)[j]  # a compiler's loop
    return row[0], row[1], row[2]


def identity_like(xp: Namespace, a: Array) -> Array:
    """The identity of the size of the last axis of `a`."""
    return xp.eye(a.shape[-1], dtype=a.dtype, device=compat.device(a))
