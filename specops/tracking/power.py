"""Steps of block iteration on stacked matrices, and the vectors that they start from."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from specops import arrays
from specops.arrays.products import coimages, images
from specops.arrays.solvers import svd
from specops.arrays.standard import SPLIT_FROM
from specops.errors import StateError
from specops.linalg.golub_kahan import largest_singular_triplet
from specops.maps.matrix import MatrixOperator
from specops.tracking import on_host
from specops.typing import Array, Namespace, State

_MATRIX_RESIDUAL = 1e-6
"""Residual, over σ₁, to which the first vectors are iterated: eight units of rounding in single
precision. Norms are known to its square."""
_UNROLLED = 4
"""Most steps that compiled code gets one by one, and not as a loop."""
STIR = 0.3
"""How much of a fixed direction is mixed into the second pair. It affects only how fast that pair
finds values that grow elsewhere. Of 0.03 to 3, a third lags little behind values that grow by a
tenth of the norm per step (by at most a quarter of the norm, for seven steps by more than 2 %), and
least behind slower ones."""
RELUCTANCE = 0.01
"""By how much the second squared length must exceed the first, relatively, to take its place;
lengths by half as much. Values are often equal (every second one on a torus). Either vector is
right then, and without this margin rounding would turn the vectors at every step."""
_NOT_ROUNDING = 1e-3
"""If the part of a unit vector orthogonal to another is shorter, it is mostly rounding."""
_LEFT = on_host.Side(True, 0.0, RELUCTANCE, _NOT_ROUNDING)
_RIGHT = on_host.Side(False, STIR, RELUCTANCE, _NOT_ROUNDING)
_SVD_BELOW = 2**13
"""Up to so many entries a matrix is decomposed, which costs less than Lanczos steps."""


def checked(state: State, key: str, shape: tuple[int, ...], like: Array) -> Array:
    """An entry of a state, in the precision and on the device of the weight it is used with."""
    found = state.get(key)
    if found is None or found.shape != shape:
        got = None if found is None else tuple(found.shape)
        raise StateError(
            f"the state must hold {key} of shape {shape}, got {got}: it belongs to another "
            f"weight or input size"
        )
    if found.dtype == like.dtype and arrays.device_of(found) == arrays.device_of(like):
        return found
    if arrays.dtype_name(found.dtype) in ("float16", "bfloat16"):
        found = arrays.to_compute(arrays.namespace(found), found)
    wanted = arrays.real_dtype(arrays.namespace(like), like.dtype)
    real = arrays.real_dtype(arrays.namespace(found), found.dtype)
    # A model may have been cast or moved after the state was made.
    if arrays.device_of(found) != arrays.device_of(like):
        return arrays.constant(arrays.to_numpy(found), like, complex=arrays.is_complex(found))
    if arrays.dtype_name(real) != arrays.dtype_name(wanted):
        xp = arrays.namespace(like)
        complex_ = arrays.is_complex(found)
        return xp.astype(found, arrays.complex_dtype(xp, wanted) if complex_ else wanted)
    return found


class Pairs(NamedTuple):
    """Two pairs of singular vectors of stacked matrices: the leading one, and one that searches.

    Power steps on one pair never leave an invariant subspace, so a value that grows outside of it
    (in a masked or pruned block, for a new class) is not found. The second pair iterates in the
    complement of the first, with a little of every direction mixed in at each step, and takes the
    first's place when its value is larger.
    """

    u: Array
    """(*batch, m)"""
    v: Array
    """(*batch, n)"""
    p: Array
    q: Array
    """The second pair, orthogonal to u and v; zeros where there is no room."""


Product = Callable[[Array, Array], tuple[Array, Array]]
"""Products of a matrix with two vectors."""


def leading_pairs(xp: Namespace, a: Array, name: str) -> tuple[Pairs, Array]:
    """(pairs, σ) to start from; the first pair is known to about 1e-6."""
    arrays.check_finite(xp, a)
    *batch, m, n = a.shape

    def generic(key: str, size: int) -> Array:
        vector = arrays.start_vector(name + key, size)
        return filled(np.broadcast_to(vector, (*batch, size)).copy(), a)

    scaled, second = a / arrays.magnitude(xp, a, axis=(-2, -1)), generic("q", n)
    # torch.func.vmap maps decompositions, but not Lanczos, which writes in place.
    mapped = arrays.is_traced(a) and not arrays.is_staged(a)
    if not batch and m * n > _SVD_BELOW and not mapped:
        v = largest_singular_triplet(
            xp, MatrixOperator(scaled), generic("", n), tolerance=_MATRIX_RESIDUAL
        )[2]
    else:
        vh = arrays.conjugate(xp, svd(xp, scaled)[2])
        v = vh[..., 0, :]
        second = vh[..., 1, :] if min(m, n) > 1 else second
    v, _ = unit(xp, v, generic("", n))
    pairs = Pairs(generic("u", m), v, generic("p", m), beside(xp, second, v, STIR))
    return advanced(xp, a, pairs, 1)


def advanced(xp: Namespace, a: Array, pairs: Pairs, rounds: int) -> tuple[Pairs, Array]:
    """(pairs, σ = ‖Aᴴu‖ = ⟨u, Av⟩) after that many steps to the left and back."""
    seen = _on_host(a, pairs)
    if seen is not None:
        found = stepped_on_host(*seen, (True, False) * rounds)
        if found is not None:
            return back(*found, a)
    scale = _scale(xp, a)
    if rounds > _UNROLLED:
        both = lambda _, p: _both(xp, a, scale, Pairs(*p))[0]  # noqa: E731
        pairs = arrays.fori(xp, 0, rounds - 1, both, pairs)
        rounds = 1
    for _ in range(rounds):
        pairs, sigma = _both(xp, a, scale, Pairs(*pairs))
    return pairs, sigma * scale


def half_step(xp: Namespace, a: Array, pairs: Pairs, *, to_left: bool) -> tuple[Pairs, Array]:
    """u ← Av/‖Av‖ with ‖Av‖, or v ← Aᴴu/‖Aᴴu‖ with ‖Aᴴu‖: each is a lower bound of ‖A‖."""
    seen = _on_host(a, pairs)
    if seen is not None:
        found = stepped_on_host(*seen, (to_left,))
        if found is not None:
            return back(*found, a)
    scale = _scale(xp, a)
    half = to_left_side if to_left else to_right_side
    pairs, sigma = half(xp, _product(xp, a, scale, to_left), pairs)
    return pairs, sigma * scale


def stepped_on_host(
    a: Array, pairs: Pairs, steps: Sequence[bool]
) -> tuple[Pairs, np.ndarray] | None:
    """(pairs, σ) of a real matrix on the CPU after the `steps`, to the left (True) or right.

    Vectors are NumPy arrays, whose calls take less time. A large matrix is multiplied by its own
    library, because the threads of two libraries slow each other down. None if numbers are so large
    or small that only the general form handles them.
    """
    return steps_on_host(_products(a), pairs, steps)


def steps_on_host(
    products: on_host.Products, pairs: Pairs, steps: Sequence[bool]
) -> tuple[Pairs, np.ndarray] | None:
    """The same for a matrix that is known by its products; only vectors of one side are needed."""
    given = pairs[1::2] if steps[0] else pairs[0::2]
    dtype, near = given[0].dtype, np.concatenate(given, dtype=np.float64).reshape(2, -1)
    try:
        # BLAS may raise these flags for lanes that it does not use, as `NumPy.matmul` says; unusual
        # numbers are found below.
        with np.errstate(invalid="ignore", over="ignore"):
            for to_left in steps:
                side = _LEFT if to_left else _RIGHT
                far, near, sigma = on_host.step(products, dtype, near, side)
    except on_host.Unusual:
        return None
    left, right = (near, far) if steps[-1] else (far, near)
    (u, p), (v, q) = left.astype(dtype), right.astype(dtype)
    return Pairs(u, v, p, q), np.asarray(sigma, dtype)


def _products(a: Array) -> on_host.Products:
    if math.prod(a.shape) < SPLIT_FROM:
        seen = arrays.host_view(a)
        return (lambda x: x.dot(seen.T)), (lambda x: x.dot(seen))
    xp = arrays.namespace(a)
    return (
        lambda x: arrays.host_view(images(a, xp.asarray(x))),
        lambda x: arrays.host_view(coimages(a, xp.asarray(x))),
    )


def _on_host(a: Array, pairs: Pairs) -> tuple[Array, Pairs] | None:
    """A single real matrix on the CPU, and its pairs as NumPy arrays; None for others."""
    if a.ndim != 2 or not arrays.is_constant_on_host(a) or arrays.is_complex(a):
        return None
    return a, Pairs(*map(arrays.host_view, pairs))


def half_step_by(
    xp: Namespace, images: Array, pairs: Pairs, *, to_left: bool
) -> tuple[Pairs, Array]:
    """`half_step` from the products of the matrix, (*batch, 2, ·), with both vectors of a side."""
    seen = _on_host(images, pairs)
    if seen is not None:
        known = seen[0]
        products = (lambda _: arrays.host_view(known),) * 2
        found = steps_on_host(products, seen[1], (to_left,))
        if found is not None:
            return back(*found, images)
    half = to_left_side if to_left else to_right_side
    return half(xp, lambda *_: (images[..., 0, :], images[..., 1, :]), pairs)


def back(pairs: Pairs, sigma: Any, like: Array) -> tuple[Pairs, Array]:
    """The pairs and norm that steps on the host found, in the library of `like`."""
    return Pairs(*(arrays.from_host(x, like) for x in pairs)), arrays.from_host(sigma, like)


def to_left_side(xp: Namespace, product: Product, pairs: Pairs) -> tuple[Pairs, Array]:
    """(u, p) from (v, q) by products with A, and ‖Av‖."""
    u, v, _, q = pairs
    v, q, image, other = _turned(xp, v, q, *product(v, q))
    u, sigma = unit(xp, image, u)
    return Pairs(u, v, beside(xp, other, u), q), sigma


def to_right_side(xp: Namespace, product: Product, pairs: Pairs) -> tuple[Pairs, Array]:
    """(v, q) from (u, p) by products with Aᴴ, and ‖Aᴴu‖."""
    u, v, p, _ = pairs
    u, p, image, other = _turned(xp, u, p, *product(u, p))
    v, sigma = unit(xp, image, v)
    return Pairs(u, v, p, beside(xp, other, v, STIR)), sigma


def _scale(xp: Namespace, a: Array) -> Array:
    """Powers of two near the entries, (*batch,), which keep products in the dtype's range."""
    return arrays.magnitude(xp, a, axis=(-2, -1))[..., 0, 0]


def _both(xp: Namespace, a: Array, scale: Array, pairs: Pairs) -> tuple[Pairs, Array]:
    pairs, _ = to_left_side(xp, _product(xp, a, scale, True), pairs)
    return to_right_side(xp, _product(xp, a, scale, False), pairs)


def _product(xp: Namespace, a: Array, scale: Array, to_left: bool) -> Product:
    """Ax and Ay, or Aᴴx and Aᴴy, divided by the scale, without a transposed copy."""

    def product(x: Array, y: Array) -> tuple[Array, Array]:
        rows = xp.stack([x, y], axis=-2) / xp.astype(scale, a.dtype)[..., None, None]
        if to_left:
            rows = arrays.matmul(rows, xp.matrix_transpose(a))
        else:
            rows = arrays.conjugate(xp, arrays.matmul(arrays.conjugate(xp, rows), a))
        return rows[..., 0, :], rows[..., 1, :]

    return product


def _turned(
    xp: Namespace, first: Array, second: Array, image: Array, other: Array
) -> tuple[Array, Array, Array, Array]:
    """Two orthonormal vectors turned within their plane until the first's image is longest.

    That is Rayleigh–Ritz in closed form. If both images are about equally long, the vectors are
    not exchanged, for rounding would decide.
    """
    largest = xp.maximum(xp.max(xp.abs(image), axis=-1), xp.max(xp.abs(other), axis=-1))
    scale = xp.astype(1.0 / arrays.power_below(xp, largest), image.dtype)[..., None]
    near, far = image * scale, other * scale
    mixed = xp.sum(arrays.conjugate(xp, near) * far, axis=-1)
    longer, shorter = (xp.sum(xp.abs(x) ** 2, axis=-1) for x in (near, far))
    apart = longer - shorter + RELUCTANCE * (longer + shorter)
    size = xp.abs(mixed)
    angle = 0.5 * xp.atan2(2.0 * size, apart)
    fine = xp.isfinite(angle)
    angle = xp.where(fine, angle, xp.zeros_like(angle))
    cos = xp.astype(xp.cos(angle), image.dtype)[..., None]
    sin = xp.astype(xp.sin(angle), image.dtype)[..., None]
    # The factor that gives the second image the phase (sign) of the first.
    usable = fine & (size > 0)
    phase = arrays.conjugate(xp, mixed) / xp.astype(
        xp.where(usable, size, xp.ones_like(size)), mixed.dtype
    )
    phase = xp.where(usable, phase, xp.ones_like(phase))[..., None]
    second, other = second * phase, other * phase
    return (
        cos * first + sin * second,
        cos * second - sin * first,
        cos * image + sin * other,
        cos * other - sin * image,
    )


def beside(xp: Namespace, x: Array, leading: Array, stir: float = 0.0) -> Array:
    """A unit vector along x's part orthogonal to `leading`, stirred; zeros if there is none."""
    x, _ = unit(xp, x, xp.zeros_like(x))
    if stir:
        noise = filled(arrays.start_vector("look-out", x.shape[-1]), x)
        # The sign of a vector is arbitrary, and must not matter to the mixture.
        overlap = xp.sum(arrays.conjugate(xp, x) * noise, axis=-1)
        size = xp.abs(overlap)
        usable = size > 0
        phase = overlap / xp.astype(xp.where(usable, size, xp.ones_like(size)), overlap.dtype)
        x = x * xp.where(usable, phase, xp.ones_like(phase))[..., None] + stir * noise
    for _ in range(2):
        x = x - leading * xp.sum(arrays.conjugate(xp, leading) * x, axis=-1)[..., None]
    x, left = unit(xp, x, xp.zeros_like(x))
    return xp.where((left > _NOT_ROUNDING)[..., None], x, xp.zeros_like(x))


def along(xp: Namespace, a: Array, u: Array, v: Array) -> Array:
    """Re⟨u, Av⟩."""
    return arrays.real_part(xp, xp.sum(arrays.conjugate(xp, u) * _image(a, v), axis=-1))


def _image(a: Array, v: Array) -> Array:
    """Av of stacked matrices and vectors."""
    return arrays.matmul(a, v[..., None])[..., 0] if a.ndim > 2 else arrays.matmul(a, v)


def unit(xp: Namespace, x: Array, fallback: Array | None) -> tuple[Array, Array]:
    """(x/‖x‖ along the last axis, ‖x‖); `fallback`, or x itself, where x is zero or not finite."""
    real = arrays.real_dtype(xp, x.dtype)
    double = arrays.double_dtype(xp, x)
    if double is None or double == x.dtype:
        # Scaled to 1, so that squares neither overflow nor vanish.
        scale = xp.max(xp.abs(x), axis=-1, keepdims=True)
        scale = xp.where((scale > 0) & xp.isfinite(scale), scale, xp.ones_like(scale))
        norm = scale * xp.linalg.vector_norm(x / xp.astype(scale, x.dtype), axis=-1, keepdims=True)
    else:
        wide = xp.linalg.vector_norm(xp.astype(x, double), axis=-1, keepdims=True)
        norm = xp.astype(wide, real)
    usable = (norm > 0) & (norm < math.inf)
    result = x / xp.astype(xp.where(usable, norm, xp.ones_like(norm)), x.dtype)
    if fallback is not None:
        result = xp.where(usable, result, fallback)
    return result, norm[..., 0]


def inner(xp: Namespace, w: Array, other: Array) -> Array:
    """Re⟨other, w⟩ of two arrays of one shape."""
    return arrays.real_part(xp, xp.sum(w * arrays.conjugate(xp, other)))


def filled(values: np.ndarray, like: Array) -> Array:
    return arrays.constant(values, like, complex=arrays.is_complex(like))
