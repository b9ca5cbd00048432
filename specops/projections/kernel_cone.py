"""Kernels whose convolution has stable rank at most r along one pair of singular vectors.

For unit vectors u, v the functional ⟨X, E⟩ = Re uᴴA(X)v of a kernel X is at most ‖A(X)‖, so
‖A(X)‖_F² ≤ r⟨X, E⟩² with ⟨X, E⟩ ≥ 0 implies the bound: a convex cone. ‖A(X)‖_F² is a weighted
sum of squares over taps (a tap that reads padding counts less; taps that wrap onto each other
count by their sum), and the nearest point of the cone has one unknown, a Lagrange multiplier.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from specops import arrays
from specops.geometry import Conv, ConvSizes
from specops.maps.prepare import Prepared
from specops.projections.shrink import Family, nonzero
from specops.typing import Array

_BISECTIONS = 60


@dataclass(frozen=True)
class Taps:
    """Orthonormal coordinates in which ‖A(K)‖_F² is diagonal: one for each tap that differs."""

    fold: np.ndarray
    """(taps, coordinates), orthonormal columns."""
    weights: np.ndarray
    """(coordinates,): ‖A(K)‖_F² = Σ_c weights[c]·‖z_c‖²; 0 for taps that read only padding."""

    @property
    def folds(self) -> bool:
        return len(self.fold) != len(self.weights)

    def coordinates(self, xp: Any, kernel: Array) -> Array:
        """A kernel (groups, rows, columns, *taps) as (coordinates, groups·rows, columns)."""
        groups, rows, columns = kernel.shape[:3]
        z = xp.reshape(kernel, (groups * rows, columns, self.fold.shape[0]))
        if self.folds:
            fold = arrays.constant(self.fold, z, complex=arrays.is_complex(z))
            z = arrays.matmul(z, fold)
        # Contiguous taps, or single precision sums over the channels lose digits.
        return xp.reshape(xp.permute_dims(z, (2, 0, 1)), (self.fold.shape[1], *z.shape[:2]))

    def kernel(self, xp: Any, z: Array, like: Array) -> Array:
        """The kernel of these coordinates that has nothing that cancels in folding."""
        z = xp.permute_dims(z, (1, 2, 0))
        if self.folds:
            unfold = arrays.constant(self.fold.T, z, complex=arrays.is_complex(z))
            z = arrays.matmul(z, unfold)
        return xp.reshape(z, like.shape)


@lru_cache(maxsize=256)
def taps_of(sizes: ConvSizes) -> Taps:
    assert sizes.fine is not None
    assert sizes.coarse is not None
    assert sizes.lower is not None
    fold: np.ndarray = np.ones((1, 1))
    outputs: np.ndarray = np.ones(1)
    for n, m, s, d, k, lower in zip(
        sizes.fine,
        sizes.coarse,
        sizes.stride,
        sizes.dilation,
        sizes.kernel,
        sizes.lower,
        strict=True,
    ):
        if sizes.circular:
            landings, landing = np.unique(d * np.arange(k) % n, return_inverse=True)
            fold = np.kron(fold, np.eye(len(landings))[landing])
            outputs = np.kron(outputs, np.full(len(landings), float(m)))
        else:
            reads = s * np.arange(m)[:, None] + d * np.arange(k) - lower
            fold = np.kron(fold, np.eye(k))
            outputs = np.kron(outputs, ((reads >= 0) & (reads < n)).sum(axis=0).astype(float))
    sharing = fold.sum(axis=0)
    return Taps(fold / np.sqrt(sharing), outputs * sharing)


def kernel_family(
    given: Prepared, geometry: Conv, axis: Array, limit: Array
) -> tuple[Family, Array, Array]:
    """(candidates, the weight's stable rank along `axis`, the least in the cone).

    The candidate of the family's own share is the nearest point of the cone.
    """
    xp, kernel = given.xp, geometry.kernel(given.w)
    taps = taps_of(geometry.sizes(tuple(given.w.shape)))
    z, e = taps.coordinates(xp, kernel), taps.coordinates(xp, axis)
    seen = arrays.constant(taps.weights, z)
    used = seen > 0
    weights = xp.where(used, seen, xp.ones_like(seen))

    def inner(x: Array, y: Array) -> Array:
        """Re⟨x, y⟩ tap by tap, over the taps that reach the grid."""
        product = x * arrays.conjugate(xp, y)
        product = xp.real(product) if arrays.is_complex(product) else product
        per_tap = xp.sum(xp.sum(product, axis=-1), axis=-1)
        return xp.where(used, per_tap, xp.zeros_like(per_tap))

    def rank(x: Array) -> Array:
        along = xp.sum(inner(x, e))
        ratio = xp.sum(weights * inner(x, x)) / nonzero(xp, along) ** 2
        worst = xp.full_like(ratio, math.inf)
        return xp.where(along > 0, ratio, xp.where(along < 0, worst, 0.0 * ratio))

    e_squares = inner(e, e)
    dual = nonzero(xp, xp.sum(e_squares / weights))
    direction = z
    if len(set(taps.weights[taps.weights > 0])) > 1:
        stats = (weights, inner(z, z), inner(z, e), e_squares)
        of_z, of_e = _combination(xp, *stats, limit)
        direction = _by_tap(of_z, z) * z + _by_tap(of_e, z) * e
    along = xp.sum(inner(direction, e))
    # The part along the cone's axis, to which the rest is orthogonal in the weighted product.
    fixed = _by_tap(along / (weights * dual), e) * e
    rest = direction - fixed
    energy = nonzero(xp, xp.sum(weights * inner(rest, rest)))
    with_fixed, with_rest = xp.sum(inner(z, fixed)), xp.sum(inner(z, rest))
    squares = [xp.sum(inner(x, y)) for x, y in ((fixed, fixed), (fixed, rest), (rest, rest))]

    def place(share: Array) -> Array:
        # The foot of the perpendicular from the weight on the ray of this share.
        length = squares[0] + 2.0 * share * squares[1] + share**2 * squares[2]
        along_ray = (with_fixed + share * with_rest) / nonzero(xp, length)
        along_ray = xp.where(along_ray > 0, along_ray, xp.zeros_like(along_ray))
        x = along_ray * (fixed + share * rest)
        if taps.folds:
            new = kernel + taps.kernel(xp, x - z, kernel)
        else:
            new = taps.kernel(xp, xp.where(_by_tap(used, z), x, z), kernel)
        return geometry.weight(new) * given.scale

    def measure(stored: Array) -> Array:
        return rank(taps.coordinates(xp, geometry.kernel(stored / given.scale)))

    reduced = limit * (1.0 - 4.0 * arrays.epsilon(z.dtype))
    least = 1.0 / dual
    room = xp.where(reduced > least, reduced - least, xp.zeros_like(least))
    share = xp.sqrt(room / energy) * along
    slope = energy / nonzero(xp, along) ** 2
    return Family(place, measure, share, slope), rank(z), least


def _combination(
    xp: Any, weights: Array, zz: Array, ze: Array, ee: Array, limit: Array
) -> tuple[Array, Array]:
    """Factors of z and e per tap whose sum points to the nearest point of the weighted cone.

    min ‖x − z‖² with Σ d‖x_c‖² ≤ r⟨x, e⟩² makes (1 + λd)x = z + λr⟨x, e⟩e, so x is known but
    for λ = τ/(1 − τ) and its length. The multiplier is a root in [0, 1] of a function without
    poles: below the pole of ⟨x, e⟩ if ⟨x, e⟩ > 0 there, else above.
    """
    like = zz
    if not arrays.is_traced(zz):
        weights, zz, ze, ee, limit = (
            arrays.to_numpy(x).astype(np.float64) for x in (weights, zz, ze, ee, limit)
        )
        xp = np
    largest = xp.max(weights)
    d, r = weights / largest, limit / largest

    def at(tau: Array) -> tuple[Array, Array, Array, Array]:
        pole = 1.0 - tau + tau * d
        along = xp.sum(ze / pole)
        of_z = 1.0 - r * tau * xp.sum(ee / pole)
        return pole, along, of_z, r * tau * along

    def bisect(first: Array, second: Array, belongs: Any) -> Array:
        """The end of what `belongs` with `first`."""

        def step(_: Any, ends: tuple[Array, Array]) -> tuple[Array, Array]:
            middle = 0.5 * (ends[0] + ends[1])
            good = belongs(middle)
            return xp.where(good, middle, ends[0]), xp.where(good, ends[1], middle)

        result: Array = arrays.fori(xp, 0, _BISECTIONS, step, (first, second))[0]
        return result

    zero, one = xp.zeros_like(largest), xp.ones_like(largest)
    summit = bisect(zero, one, lambda tau: at(tau)[2] > 0)
    sign = xp.where(at(summit)[1] >= 0, one, -one)

    def inside(tau: Array) -> Array:
        pole, along, of_z, of_e = at(tau)
        energy = xp.sum(d * (of_z**2 * zz + 2.0 * of_z * of_e * ze + of_e**2 * ee) / pole**2)
        return (sign * along > 0) & (energy <= r * along**2)

    tau = bisect(summit, xp.where(sign > 0, zero, one), inside)
    pole, _, of_z, of_e = at(tau)
    factors = sign * of_z / pole, sign * of_e / pole
    if xp is np:
        return arrays.constant(factors[0], like), arrays.constant(factors[1], like)
    return factors


def _by_tap(factor: Array, like: Array) -> Array:
    return factor[(..., *([None] * (like.ndim - factor.ndim)))]
