"""Kernels whose convolution has stable rank at most r along one pair of singular vectors.

For unit vectors u, v the functional ⟨X, E⟩ = Re uᴴA(X)v of a kernel X is at most ‖A(X)‖, so
‖A(X)‖_F² ≤ r⟨X, E⟩² with ⟨X, E⟩ ≥ 0 implies the bound: a convex cone. ‖A(X)‖_F² is a weighted
sum of squares over taps (a tap that reads padding counts less; taps that wrap onto each other
count by their sum), and the nearest point of the cone has one unknown, a Lagrange multiplier.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from specops import arrays
from specops.geometry import Conv
from specops.maps.prepare import Prepared
from specops.projections.feasible_rank import Candidates
from specops.projections.kernels.taps import Taps, taps_of
from specops.typing import Array, Namespace

_BISECTIONS = 60
"""Bisections of [0, 1]: down to less than the spacing of numbers in double precision, 2^-53."""


class _Weighted:
    """Kernels in coordinates by tap: the norm of the operator, and the rank along E."""

    def __init__(self, xp: Namespace, taps: Taps, kernel: Array, direction: Array) -> None:
        self.xp = xp
        self.z, self.e = taps.coordinates(xp, kernel), taps.coordinates(xp, direction)
        seen = arrays.constant(taps.weights, self.z)
        self.used = seen > 0
        self.weights = xp.where(self.used, seen, xp.ones_like(seen))

    def inner(self, x: Array, y: Array) -> Array:
        """Re⟨x, y⟩ tap by tap, over the taps that reach the grid."""
        xp = self.xp
        product = arrays.real_part(xp, x * arrays.conjugate(xp, y))
        per_tap = xp.sum(xp.sum(product, axis=-1), axis=-1)
        return xp.where(self.used, per_tap, xp.zeros_like(per_tap))

    def squared(self, x: Array) -> Array:
        """‖A(X)‖_F²."""
        return self.xp.sum(self.weights * self.inner(x, x))

    def rank(self, x: Array) -> Array:
        """‖A(X)‖_F²/⟨X, E⟩²; 0 for ⟨X, E⟩ = 0, infinite where it is negative."""
        xp = self.xp
        along = xp.sum(self.inner(x, self.e))
        ratio = self.squared(x) / arrays.nonzero(xp, along) ** 2
        worst = xp.full_like(ratio, math.inf)
        return xp.where(along > 0, ratio, xp.where(along < 0, worst, 0.0 * ratio))


def kernel_candidates(
    given: Prepared, geometry: Conv, direction: Array, limit: Array
) -> tuple[Candidates, Array, Array]:
    """(candidates, the weight's stable rank along `direction`, the least in the cone).

    The candidate that is wanted is the nearest point of the cone.
    """
    xp, kernel = given.xp, geometry.kernel(given.w)
    taps = taps_of(geometry.sizes(tuple(given.w.shape)))
    space = _Weighted(xp, taps, kernel, direction)
    z, e, inner, weights = space.z, space.e, space.inner, space.weights
    dual = arrays.nonzero(xp, xp.sum(inner(e, e) / weights))
    ray = z
    if len(set(taps.weights[taps.weights > 0])) > 1:
        of_z, of_e = _combination(xp, weights, inner(z, z), inner(z, e), inner(e, e), limit)
        ray = arrays.along_first(of_z, z) * z + arrays.along_first(of_e, z) * e
    along = xp.sum(inner(ray, e))
    # The part along the direction, to which the rest is orthogonal in the weighted product.
    fixed = arrays.along_first(along / (weights * dual), e) * e
    rest = ray - fixed
    energy = arrays.nonzero(xp, space.squared(rest))
    with_fixed, with_rest = xp.sum(inner(z, fixed)), xp.sum(inner(z, rest))
    squares = [xp.sum(inner(x, y)) for x, y in ((fixed, fixed), (fixed, rest), (rest, rest))]

    def weight(g: Array) -> Array:
        # The foot of the perpendicular from the weight on the ray of this g.
        length = squares[0] + 2.0 * g * squares[1] + g**2 * squares[2]
        along_ray = (with_fixed + g * with_rest) / arrays.nonzero(xp, length)
        along_ray = xp.where(along_ray > 0, along_ray, xp.zeros_like(along_ray))
        x = along_ray * (fixed + g * rest)
        if taps.folds:
            new = kernel + taps.kernel(xp, x - z, kernel)
        else:
            new = taps.kernel(xp, xp.where(arrays.along_first(space.used, z), x, z), kernel)
        return geometry.weight(new) * given.scale

    def stored_rank(stored: Array) -> Array:
        return space.rank(taps.coordinates(xp, geometry.kernel(stored / given.scale)))

    reduced = limit * (1.0 - 4.0 * arrays.epsilon(z.dtype))
    least = 1.0 / dual
    room = xp.where(reduced > least, reduced - least, xp.zeros_like(least))
    wanted = xp.sqrt(room / energy) * along
    growth = energy / arrays.nonzero(xp, along) ** 2
    return Candidates(weight, stored_rank, wanted, growth), space.rank(z), least


def _combination(
    xp: Namespace, weights: Array, zz: Array, ze: Array, ee: Array, limit: Array
) -> tuple[Array, Array]:
    """Factors of z and e per tap whose sum points to the nearest point of the weighted cone.

    The minimiser of ‖x − z‖² with Σ d‖x_c‖² ≤ r⟨x, e⟩² satisfies (1 + λd)x = z + λr⟨x, e⟩e, so that
    only λ = τ/(1 − τ) and the length of x are unknown. τ is the root in [0, 1] of a function
    without poles. It lies below the pole of ⟨x, e⟩ if ⟨x, e⟩ > 0 there, else above.
    """
    given, given_xp = (weights, zz, ze, ee, limit), xp
    weights, zz, ze, ee, limit = (arrays.stop_gradient(x) for x in given)
    like = zz
    if not arrays.is_traced(zz):
        weights, zz, ze, ee, limit = (
            arrays.to_numpy(x).astype(np.float64) for x in (weights, zz, ze, ee, limit)
        )
        xp = np
    largest = xp.max(weights)
    d, r = weights / largest, limit / largest

    def at(tau: Array) -> tuple[Array, Array, Array, Array]:
        return _ray(xp, tau, d, r, ze, ee)

    def bisect(first: Array, second: Array, belongs: Any) -> Array:
        """The end of the points next to `first` that `belongs` accepts, by bisection."""

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
    if not arrays.is_concrete(given[1]):
        if xp is np:
            tau, sign = (arrays.constant(np.asarray(x), like) for x in (tau, sign))
        return _differentiable(given_xp, tau, sign, *given)
    pole, _, of_z, of_e = at(tau)
    factors = sign * of_z / pole, sign * of_e / pole
    if xp is np:
        return arrays.constant(factors[0], like), arrays.constant(factors[1], like)
    return factors


def _ray(
    xp: Namespace, tau: Array, d: Array, r: Array, ze: Array, ee: Array
) -> tuple[Array, Array, Array, Array]:
    """((1 + λd)/(1 + λ), ⟨x, e⟩, the factors of z and e without this divisor) at a multiplier."""
    pole = 1.0 - tau + tau * d
    along = xp.sum(ze / pole)
    return pole, along, 1.0 - r * tau * xp.sum(ee / pole), r * tau * along


def _differentiable(
    xp: Namespace,
    tau: Array,
    sign: Array,
    weights: Array,
    zz: Array,
    ze: Array,
    ee: Array,
    limit: Array,
) -> tuple[Array, Array]:
    """The factors at the multiplier τ, with its derivative by the implicit function theorem."""
    largest = xp.max(weights)
    d, r = weights / largest, limit / largest

    pole, along, of_z, of_e = _ray(xp, tau, d, r, ze, ee)
    energies = d * (of_z**2 * zz + 2.0 * of_z * of_e * ze + of_e**2 * ee) / pole**2
    excess = xp.sum(energies) - r * along**2
    # The derivatives of the quantities above by the multiplier.
    pole_ = d - 1.0
    along_ = -xp.sum(ze * pole_ / pole**2)
    of_z_ = -r * xp.sum(ee / pole) + r * tau * xp.sum(ee * pole_ / pole**2)
    of_e_ = r * along + r * tau * along_
    mixed = of_z_ * of_e + of_z * of_e_
    changes = d * 2.0 * (of_z * of_z_ * zz + mixed * ze + of_e * of_e_ * ee) / pole**2
    slope = xp.sum(changes - 2.0 * energies * pole_ / pole) - 2.0 * r * along * along_
    step = excess / arrays.nonzero(xp, arrays.stop_gradient(slope))
    tau = tau - (step - arrays.stop_gradient(step))
    pole, _, of_z, of_e = _ray(xp, tau, d, r, ze, ee)
    return sign * of_z / pole, sign * of_e / pole
