"""What a nearest point is tested against: explicit matrices, and a slow solver of its own."""

from __future__ import annotations

from typing import Any

import numpy as np

import specops
from specops import Conv, Dense
from specops.geometry import Geometry
from tests import oracle
from tests.backends import Backend
from tests.strategies import Case

ROUNDING = 1e-14
"""Of ‖W‖²: what a difference of squares in double precision may hide in a gap."""

SINGLE = 32 * 2.0**-23
"""Of ‖W‖², the same in single precision: the hair between the limit and its target included."""

LARGEST = 220
"""Rows or columns of an explicit matrix that a test may decompose."""

ANY_SIZE_POINTS = 32

LAYERS: list[tuple[tuple[int, ...], Conv]] = [
    ((2, 2, 3, 3), Conv((4, 4), boundary="circular")),
    ((2, 1, 3, 3), Conv((3, 3))),
    ((4, 1, 3, 3), Conv((4, 4), stride=2, groups=2, boundary="circular")),
    ((2, 2, 3), Conv((4,), transposed=True, stride=2, padding=1)),
    ((2, 1, 2, 3), Conv((2, 3), transposed=True, stride=(2, 1), boundary="circular")),
    ((3, 2, 2), Conv((4,), transposed=True, layout="IO*", dilation=3)),
    ((2, 2, 3), Conv((5,), dilation=2)),
    ((2, 2, 4), Conv((6,))),
    ((2, 2, 5), Conv((3,), boundary="circular")),
    ((1, 2, 4, 3), Conv((3, 2), boundary="circular")),
    ((2, 2, 5), Conv((6,), stride=2, dilation=3, boundary="circular")),
    ((1, 2, 2, 2, 2), Conv((2, 2, 3), boundary="circular")),
    ((2, 2, 3), Conv((5,), stride=2, boundary="circular")),
    ((5, 2, 3), Conv((3,), stride=3, boundary="circular", layout="*IO")),
    ((1, 2, 3), Conv(None)),
]

SPLIT: list[tuple[tuple[int, ...], Dense]] = [
    ((9, 4), Dense(splits=(2, 3, 4))),
    ((3, 4, 5, 2), Dense(out_axes=(-3,), batch_axes=(0,), splits=(1, 3))),
]


def torus(geometry: Conv, shape: tuple[int, ...]) -> Conv:
    """The circular convolution that is constrained in place of this one."""
    sizes = geometry.sizes(shape)
    stride, dilation, fine = sizes.stride, sizes.dilation, None
    if geometry.grid is None:
        assert set(stride) | set(dilation) == {1}
        fine = (ANY_SIZE_POINTS,) * len(stride)
    else:
        fine = sizes.enclosing_torus()
        stride = tuple(1 if n % s else s for n, s in zip(fine, stride, strict=True))
    coarse = tuple(n // s for n, s in zip(fine, stride, strict=True))
    return Conv(
        coarse if geometry.transposed else fine,
        stride=stride,
        dilation=dilation,
        groups=geometry.groups,
        transposed=geometry.transposed,
        layout=geometry.layout,
        boundary="circular",
    )


def constrained(geometry: Conv, shape: tuple[int, ...], method: str = "auto") -> Conv:
    """The layer whose norm a method bounds: a small one itself, or a torus in its place."""
    if geometry.grid is None or method not in ("auto", "cutting-planes"):
        return torus(geometry, shape)
    sizes = geometry.sizes(shape)
    wraps = any(span > n for span, n in zip(sizes.spans, sizes.fine, strict=True))
    return torus(geometry, shape) if sizes.circular and wraps else geometry


def certificate(geometry: Conv, shape: tuple[int, ...]) -> float:
    """The factor that makes a grid speak for every size."""
    if geometry.grid is not None:
        return 1.0
    taps = np.array(geometry.sizes(shape).kernel)
    return float(np.prod(np.cos(np.pi * (taps - 1) / (2 * ANY_SIZE_POINTS))))


def matrices(w: np.ndarray, geometry: Geometry, method: str = "auto") -> list[np.ndarray]:
    """Every matrix, or stack of matrices, whose norm is constrained."""
    if isinstance(geometry, Conv):
        return [oracle.conv_matrix(seen(w, geometry), constrained(geometry, w.shape, method))]
    whole = oracle.dense_matrix(w, geometry)
    ends = np.cumsum(geometry.splits or ())[:-1]
    return np.split(whole, ends, axis=-2)


def seen(w: np.ndarray, geometry: Conv) -> np.ndarray:
    """The weight without what only reads padding, which on the torus would read inputs."""
    return w if geometry.grid is None else oracle.only_read(w, geometry)


def norm(w: np.ndarray, geometry: Geometry, method: str = "auto") -> float:
    """The constrained norm: the largest of all matrices."""
    found = matrices(w, geometry, method)
    return max(float(np.linalg.norm(m, 2, axis=(-2, -1)).max()) for m in found)


def small(case: Case) -> bool:
    """Whether the explicit matrix on the torus is worth decomposing."""
    if isinstance(case.geometry, Dense):
        return True
    conv = torus(case.geometry, case.shape)
    sizes = conv.sizes(case.shape)
    return max(sizes.matrix_shape()) <= LARGEST


def inner(a: np.ndarray, b: np.ndarray) -> float:
    """Re⟨a, b⟩."""
    return float(np.vdot(a, b).real)


def squared(a: np.ndarray) -> float:
    """‖a‖²."""
    return inner(a, a)


def clipped(m: np.ndarray, limit: Any) -> np.ndarray:
    """U min(Σ, limit) Vᴴ by the SVD in double precision."""
    u, s, vh = np.linalg.svd(m, full_matrices=False)
    return (u * np.minimum(s, np.asarray(limit)[..., None])[..., None, :]) @ vh


def random_like(w: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Normal entries of the same shape and kind."""
    y = rng.standard_normal(w.shape)
    return y + 1j * rng.standard_normal(w.shape) if w.dtype.kind == "c" else y


def project(w: np.ndarray, bound: float, geometry: Geometry, **options: Any) -> tuple[Any, float]:
    """(the point, certified squared distance to the nearest), in double precision."""
    point, info = specops.project_spectral_ball(w, bound, geometry, return_info=True, **options)
    certified = float(np.max(info.gap)) + ROUNDING
    if isinstance(geometry, Dense):
        certified = max(certified, 1e-22)
    return point, certified * squared(w)


def slowly(
    w: np.ndarray,
    geometry: Conv,
    bound: float,
    *,
    rounds: int = 1500,
    precision: float = 1e-13,
    method: str = "auto",
) -> tuple[np.ndarray, float]:
    """(the nearest kernel, certified squared error) by ADMM on the explicit matrix."""
    conv = constrained(geometry, w.shape, method)
    limit = bound * certificate(geometry, w.shape)
    units = np.eye(w.size).reshape(-1, *w.shape)
    maps = np.stack([oracle.conv_matrix(seen(unit, geometry), conv) for unit in units])
    a, shape = maps.reshape(w.size, -1).T, maps.shape[1:]
    gram, best, error = a.T @ a, w, np.inf
    for stiffness in (1.0, 10.0, 0.1, 100.0):
        rho = stiffness / np.linalg.eigvalsh(gram)[-1]
        found, gap = _admm(w, a, shape, limit, rho, rounds, precision)
        if gap < error:
            best, error = found, gap
        if error <= precision * squared(w):
            break
    assert error <= 1e-11 * squared(w), "the slow solver has not converged"
    return best, max(error, 0.0) + ROUNDING * squared(w)


def _admm(
    w: np.ndarray,
    a: np.ndarray,
    shape: tuple[int, ...],
    limit: float,
    rho: float,
    rounds: int,
    precision: float,
) -> tuple[np.ndarray, float]:
    """Rounds on ½‖k − w‖² and ‖A k‖ ≤ limit, the best point and its gap by duality."""
    start = w.reshape(-1)
    solve = np.linalg.inv(np.eye(w.size) + rho * (a.T @ a))
    y = dual = np.zeros(shape)
    best, error = w, np.inf
    for round_ in range(1, rounds + 1):
        k = solve @ (start + rho * (a.T @ (y - dual).reshape(-1)))
        m = (a @ k).reshape(shape)
        ahead = 1.6 * m - 0.6 * y
        y = clipped(ahead + dual, limit)
        dual = dual + ahead - y
        if round_ % 25:
            continue
        z = rho * dual
        inside = k * min(1.0, limit / np.linalg.norm(m, 2))
        nuclear = float(np.linalg.svd(z, compute_uv=False).sum())
        below = inner(z.reshape(-1), a @ start) - 0.5 * squared(a.T @ z.reshape(-1))
        gap = squared(start - inside) - 2.0 * (below - limit * nuclear)
        if gap < error:
            best, error = inside.reshape(w.shape), gap
        if error <= precision * squared(w):
            break
    return best, error


def normal(shape: tuple[int, ...], seed: int, *, complex: bool = False) -> np.ndarray:
    """Normal entries."""
    rng = np.random.default_rng(seed)
    return random_like(np.zeros(shape, np.complex128 if complex else np.float64), rng)


def check_variational_inequality(w: np.ndarray, geometry: Geometry, share: float) -> None:
    """⟨W − P, Y − P⟩ ≤ 0 for feasible Y, near P and far from it, up to what is certified."""
    rng = np.random.default_rng(0)
    factor = certificate(geometry, w.shape) if isinstance(geometry, Conv) else 1.0
    bound = share * norm(w, geometry) / factor
    assert bound > 0, "nothing to project"
    p, error = project(w, bound, geometry, gap_tolerance=1e-10)
    assert norm(p, geometry) <= bound * factor * (1 + 1e-12)
    others = [
        random_like(w, rng),
        w,
        p,
        *(p + t * (w - p) for t in (1.0, 0.1, 1e-3)),
        *(p + t * np.sqrt(squared(w) / w.size) * random_like(w, rng) for t in (0.1, 1e-3)),
    ]
    for other in others:
        size = norm(other, geometry)
        y = other * (bound * factor / size) if size > 0 else other
        slack = error + np.sqrt(error) * (np.sqrt(squared(y - p)) + np.sqrt(error))
        assert inner(w - p, y - p) <= slack


def dtypes_of(eager: Backend, *names: str) -> tuple[str, ...]:
    """The dtypes to test; only the first where each one is compiled anew."""
    return names[:1] if eager.name == "jax" else names


def few_above(rows: int, columns: int, above: int = 2, seed: int = 12) -> np.ndarray:
    """A matrix with a few singular values above one."""
    rng = np.random.default_rng(seed)
    u, _ = np.linalg.qr(rng.standard_normal((rows, columns)))
    v, _ = np.linalg.qr(rng.standard_normal((columns, columns)))
    s = np.concatenate([np.linspace(1.5, 2.0, above), np.linspace(0.1, 0.8, columns - above)])
    return (u * s) @ v.T


def orthogonal(n: int, seed: int = 22) -> np.ndarray:
    return np.linalg.qr(normal((n, n), seed))[0]
