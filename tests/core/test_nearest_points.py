"""`project_spectral_ball` gives the nearest point: optimality is tested, never assumed."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings

import specops
from specops import Conv, Dense
from specops.geometry import Geometry
from tests import oracle
from tests.backends import BACKENDS, Backend
from tests.strategies import Case, convolutions, denses

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


def certificate(geometry: Conv, shape: tuple[int, ...]) -> float:
    """The factor that makes a grid speak for every size."""
    if geometry.grid is not None:
        return 1.0
    taps = np.array(geometry.sizes(shape).kernel)
    return float(np.prod(np.cos(np.pi * (taps - 1) / (2 * ANY_SIZE_POINTS))))


def matrices(w: np.ndarray, geometry: Geometry) -> list[np.ndarray]:
    """Every matrix, or stack of matrices, whose norm is constrained."""
    if isinstance(geometry, Conv):
        return [oracle.conv_matrix(seen(w, geometry), torus(geometry, w.shape))]
    whole = oracle.dense_matrix(w, geometry)
    ends = np.cumsum(geometry.splits or ())[:-1]
    return np.split(whole, ends, axis=-2)


def seen(w: np.ndarray, geometry: Conv) -> np.ndarray:
    """The weight without what only reads padding, which on the torus would read inputs."""
    return w if geometry.grid is None else oracle.only_read(w, geometry)


def norm(w: np.ndarray, geometry: Geometry) -> float:
    """The constrained norm: the largest of all matrices."""
    return max(float(np.linalg.norm(m, 2, axis=(-2, -1)).max()) for m in matrices(w, geometry))


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
    w: np.ndarray, geometry: Conv, bound: float, *, rounds: int = 1500, precision: float = 1e-13
) -> tuple[np.ndarray, float]:
    """(the nearest kernel, certified squared error) by ADMM on the explicit matrix."""
    conv = torus(geometry, w.shape)
    limit = bound * certificate(geometry, w.shape)
    units = np.eye(w.size).reshape(-1, *w.shape)
    maps = np.stack([oracle.conv_matrix(seen(unit, geometry), conv) for unit in units])
    a, shape = maps.reshape(w.size, -1).T, maps.shape[1:]
    gram, best, error = a.T @ a, w, np.inf
    for stiffness in (1.0, 10.0, 0.1):
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
    if bound == 0:
        return
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


@given(denses())
def test_dense_variational_inequality(case: Case) -> None:
    check_variational_inequality(case.weight(), case.geometry, 0.6)


@pytest.mark.parametrize(("shape", "geometry"), SPLIT)
@pytest.mark.parametrize("complex", [False, True])
def test_split_variational_inequality(
    shape: tuple[int, ...], geometry: Dense, complex: bool
) -> None:
    w = normal(shape, 3, complex=complex)
    check_variational_inequality(w, geometry, 0.4)
    p = specops.project_spectral_ball(w, 0.4 * norm(w, geometry), geometry)
    for got, m in zip(matrices(p, geometry), matrices(w, geometry), strict=True):
        expected = clipped(m, 0.4 * norm(w, geometry))
        np.testing.assert_allclose(got, expected, atol=1e-13 * norm(w, geometry))


@given(convolutions())
@settings(max_examples=60)
def test_conv_variational_inequality(case: Case) -> None:
    assume(small(case))
    check_variational_inequality(case.weight(), case.geometry, 0.7)


@pytest.mark.parametrize(("shape", "geometry"), LAYERS)
def test_conv_variational_inequality_of_each_kind(shape: tuple[int, ...], geometry: Conv) -> None:
    check_variational_inequality(normal(shape, 4), geometry, 0.3)
    check_variational_inequality(normal(shape, 5, complex=True), geometry, 0.9)


def check_firmly_non_expansive(a: np.ndarray, geometry: Geometry) -> None:
    """‖P(a) − P(b)‖² ≤ ⟨P(a) − P(b), a − b⟩ for near and far b."""
    rng = np.random.default_rng(1)
    bound = 0.6 * norm(a, geometry)
    assume(bound > 0)
    p, error_a = project(a, bound, geometry, gap_tolerance=1e-10)
    for step in (1e-2, 1.0):
        b = a + step * np.sqrt(squared(a) / a.size) * random_like(a, rng)
        q, error_b = project(b, bound, geometry, gap_tolerance=1e-10)
        error, far = np.sqrt(error_a) + np.sqrt(error_b), np.sqrt(squared(a - b))
        slack = error * (3.0 * far + error)
        assert squared(p - q) <= inner(p - q, a - b) + slack


@given(denses())
@settings(max_examples=20)
def test_dense_is_firmly_non_expansive(case: Case) -> None:
    check_firmly_non_expansive(case.weight(), case.geometry)


@given(convolutions())
@settings(max_examples=30)
def test_conv_is_firmly_non_expansive(case: Case) -> None:
    assume(small(case))
    check_firmly_non_expansive(case.weight(), case.geometry)


@pytest.mark.parametrize("method", ["auto", "cutting-planes", "accelerated", "dykstra"])
@pytest.mark.parametrize("complex", [False, True])
@pytest.mark.parametrize(("shape", "geometry"), LAYERS)
def test_certificate_against_a_slow_solver(
    shape: tuple[int, ...], geometry: Conv, complex: bool, method: str
) -> None:
    w = normal(shape, 6, complex=complex)
    factor = certificate(geometry, shape)
    bound = 0.5 * norm(w, geometry) / factor
    truth, error = _slowly_cached(shape, geometry, complex)
    best = squared(w - truth)
    for tolerance in (1e-2, 1e-5, 1e-10):
        got, info = specops.project_spectral_ball(
            w, bound, geometry, method=method, gap_tolerance=tolerance, return_info=True
        )
        gap = float(info.gap) * squared(w)
        assert norm(got, geometry) <= bound * factor * (1 + 1e-12)
        assert np.sqrt(squared(got - truth)) <= np.sqrt(gap + ROUNDING * squared(w)) + np.sqrt(
            error
        )
        # The dual value bounds the distance from below, so the gap holds the whole excess.
        assert squared(w - got) - gap <= best + ROUNDING * squared(w)
    # The first-order methods stop at 40 and 200 rounds.
    assert gap <= (5e-3 if method in ("accelerated", "dykstra") else 1e-9) * squared(w)


_TRUTHS: dict[Any, tuple[np.ndarray, float]] = {}


def _slowly_cached(
    shape: tuple[int, ...], geometry: Conv, complex: bool
) -> tuple[np.ndarray, float]:
    key = (shape, geometry, complex)
    if key not in _TRUTHS:
        w = normal(shape, 6, complex=complex)
        bound = 0.5 * norm(w, geometry) / certificate(geometry, shape)
        _TRUTHS[key] = slowly(w, geometry, bound)
    return _TRUTHS[key]


@pytest.mark.parametrize(("shape", "geometry"), LAYERS)
def test_alternating_is_feasible_and_farther(shape: tuple[int, ...], geometry: Conv) -> None:
    w = normal(shape, 6)
    factor = certificate(geometry, shape)
    bound = 0.5 * norm(w, geometry) / factor
    truth, _ = _slowly_cached(shape, geometry, False)
    for iterations in (None, 1, 20):
        got, info = specops.project_spectral_ball(
            w, bound, geometry, method="alternating", iterations=iterations, return_info=True
        )
        assert norm(got, geometry) <= bound * factor * (1 + 1e-12)
        assert squared(w - got) >= squared(w - truth) * (1 - 1e-12)
        assert squared(got - truth) <= float(info.gap) * squared(w)


@given(convolutions())
@settings(max_examples=15)
def test_a_slow_solver_agrees_on_any_convolution(case: Case) -> None:
    assume(small(case))
    w = case.weight()
    assume(w.size <= 60)
    bound = 0.8 * norm(w, case.geometry)
    truth, error = slowly(w, case.geometry, bound)
    got, own = project(w, bound, case.geometry, gap_tolerance=1e-10)
    assert np.sqrt(squared(got - truth)) <= np.sqrt(own) + np.sqrt(error)


@pytest.mark.parametrize(("shape", "geometry"), LAYERS)
@pytest.mark.parametrize("seed", [7, 8])
def test_gap_tolerance_is_honoured(shape: tuple[int, ...], geometry: Conv, seed: int) -> None:
    w = normal(shape, seed, complex=seed == 8)
    bound = 0.6 * norm(w, geometry)
    rounds = []
    for tolerance in (0.3, 1e-2, 1e-4, 1e-7, 1e-10):
        _, info = specops.project_spectral_ball(
            w, bound, geometry, gap_tolerance=tolerance, return_info=True
        )
        rounds.append(info.iterations)
        assert float(info.gap) <= tolerance * (1 + 1e-9) + ROUNDING
    assert rounds == sorted(rounds)
    assert rounds[-1] < 100


def test_what_wraps_to_nothing_stays() -> None:
    # Two taps of opposite sign on one slot: the operator is zero, the kernel is not.
    geometry = Conv((2,), boundary="circular")
    silent = np.array([[[1.0, 0.0, -1.0, 0.0]]])
    assert norm(silent, geometry) == 0
    loud = np.array([[[2.0, 0.5, 1.0, 0.5]]])
    bound = 0.5 * norm(loud, geometry)
    apart = specops.project_spectral_ball(loud, bound, geometry, gap_tolerance=1e-12)
    both = specops.project_spectral_ball(loud + 5 * silent, bound, geometry, gap_tolerance=1e-12)
    np.testing.assert_allclose(both, apart + 5 * silent, atol=1e-6)
    assert specops.project_spectral_ball(silent, 1e-3, geometry) is silent


IDEMPOTENT: list[tuple[tuple[int, ...], Geometry]] = [
    ((7, 5), Dense()),
    ((3, 4, 6), Dense(out_axes=(1,), batch_axes=(0,))),
    *SPLIT,
    *LAYERS[:4],
    LAYERS[8],
    LAYERS[-1],
]


def _dtypes(eager: Backend, *names: str) -> tuple[str, ...]:
    """The dtypes to test; only the first where each one is compiled anew."""
    return names[:1] if eager.name == "jax" else names


def test_twice_is_once(eager: Backend) -> None:
    for shape, geometry in IDEMPOTENT[4:5] if eager.name == "jax" else IDEMPOTENT:
        check_twice_is_once(eager, shape, geometry)


def check_twice_is_once(eager: Backend, shape: tuple[int, ...], geometry: Geometry) -> None:
    """The second call returns its argument, from a warm state as well."""
    for dtype, share in itertools.product(
        _dtypes(eager, "float32", "float64", "complex64"), (0.3, 0.9)
    ):
        values = normal(shape, 9, complex=dtype == "complex64")
        w = eager.array(values, dtype)
        bound = share * norm(values, geometry)
        once, info = specops.project_spectral_ball(w, bound, geometry, return_info=True)
        assert info.iterations >= 1
        assert specops.project_spectral_ball(once, bound, geometry) is once
        for state in (None, info.state):
            twice, again = specops.project_spectral_ball(
                once, bound, geometry, state=state, return_info=True
            )
            assert twice is once
            assert again.iterations == 0
            assert (eager.numpy(again.gap) == 0).all()
            after, before = eager.numpy(again.norm_after), eager.numpy(again.norm_before)
            np.testing.assert_array_equal(after, before)
            assert (after <= bound * (1 + 1e-6)).all()


@pytest.mark.parametrize("method", ["cutting-planes", "accelerated", "dykstra", "alternating"])
def test_twice_is_once_by_each_method(method: str) -> None:
    shape, geometry = LAYERS[0]
    w = normal(shape, 10)
    once = specops.project_spectral_ball(w, 2.0, geometry, method=method)
    for again in ("auto", method):
        assert specops.project_spectral_ball(once, 2.0, geometry, method=again) is once


def test_twice_is_once_from_a_warm_matrix() -> None:
    w = _few_above(64, 48)
    _, info = specops.project_spectral_ball(w, 1.0, return_info=True)
    once, warm = specops.project_spectral_ball(
        w + 1e-4 * normal(w.shape, 11), 1.0, state=info.state, return_info=True
    )
    for state in (None, info.state, warm.state):
        twice, again = specops.project_spectral_ball(once, 1.0, state=state, return_info=True)
        assert twice is once
        assert again.iterations == 0


def _few_above(rows: int, columns: int, above: int = 2, seed: int = 12) -> np.ndarray:
    """A matrix with a few singular values above one."""
    rng = np.random.default_rng(seed)
    u, _ = np.linalg.qr(rng.standard_normal((rows, columns)))
    v, _ = np.linalg.qr(rng.standard_normal((columns, columns)))
    s = np.concatenate([np.linspace(1.5, 2.0, above), np.linspace(0.1, 0.8, columns - above)])
    return (u * s) @ v.T


@pytest.mark.parametrize(
    ("shape", "geometry"),
    [
        ((4, 3, 3, 3), Conv((4, 4))),
        ((4, 3, 3, 3), Conv((6, 6), stride=2, groups=2, boundary="circular")),
        ((4, 3, 5), Conv((4,), boundary="circular")),
        ((3, 4, 4), Conv((8,), transposed=True, stride=2, padding=1)),
    ],
)
@pytest.mark.parametrize("complex", [False, True])
def test_warm_start_saves_rounds(shape: tuple[int, ...], geometry: Conv, complex: bool) -> None:
    w = normal(shape, 13, complex=complex)
    bound = 0.5 * norm(w, geometry)
    options: dict[str, Any] = {"gap_tolerance": 1e-6, "return_info": True}
    _, info = specops.project_spectral_ball(w, bound, geometry, **options)
    state = {key: value.copy() for key, value in info.state.items()}
    near = w + 1e-4 * normal(shape, 14, complex=complex)
    fresh, cold = specops.project_spectral_ball(near, bound, geometry, **options)
    got, warm = specops.project_spectral_ball(near, bound, geometry, state=info.state, **options)
    for key, value in state.items():
        np.testing.assert_array_equal(info.state[key], value)
    assert 1 <= warm.iterations < cold.iterations
    assert norm(got, geometry) <= bound * (1 + 1e-12)
    _check_same(got, fresh, (warm, cold), near)
    # A stale state costs rounds and nothing else.
    other = 3.0 * normal(shape, 15, complex=complex)
    fresh, cold = specops.project_spectral_ball(other, bound, geometry, **options)
    got, stale = specops.project_spectral_ball(other, bound, geometry, state=info.state, **options)
    assert norm(got, geometry) <= bound * (1 + 1e-12)
    assert float(stale.gap) <= 1e-6
    _check_same(got, fresh, (stale, cold), other)
    # Inside, the state stays for next time.
    kept, unused = specops.project_spectral_ball(
        w * 1e-3, bound, geometry, state=info.state, return_info=True
    )
    assert np.array_equal(kept, w * 1e-3)
    assert set(unused.state) == set(info.state)


def _check_same(a: np.ndarray, b: np.ndarray, infos: tuple[Any, Any], w: np.ndarray) -> None:
    errors = [np.sqrt((float(info.gap) + ROUNDING) * squared(w)) for info in infos]
    assert np.sqrt(squared(a - b)) <= sum(errors)


@pytest.mark.parametrize("transpose", [False, True])
def test_warm_start_of_a_matrix(eager: Backend, transpose: bool) -> None:
    if eager.name == "jax" and transpose:
        return  # one compilation of each step is enough
    rounding = 1e-11 if eager.doubles else 3e-6
    turn = (lambda m: m.T.copy()) if transpose else (lambda m: m)
    w = turn(_few_above(64, 48))
    _, info = specops.project_spectral_ball(eager.array(w), 1.0, return_info=True)
    assert info.state
    weights = {
        "near": w + 1e-4 * normal(w.shape, 16),
        "other": turn(_few_above(64, 48, seed=17)),
        "more above than the start holds": turn(_few_above(64, 48, above=30, seed=18)),
        "none above": 0.3 * w,
    }
    for name, weight in weights.items():
        got, warm = specops.project_spectral_ball(
            eager.array(weight), 1.0, state=info.state, return_info=True
        )
        error = np.abs(eager.numpy(got) - clipped(weight, 1.0)).max()
        assert error <= max(rounding, 2e-5), name
        gap = float(eager.numpy(warm.gap)) + (SINGLE if not eager.doubles else ROUNDING)
        assert squared(eager.numpy(got) - clipped(weight, 1.0)) <= gap * squared(weight), name
        assert np.linalg.norm(eager.numpy(got), 2) <= 1 + (1e-6 if not eager.doubles else 1e-12)


def test_a_start_that_cannot_see_the_largest_value() -> None:
    w = np.diag(np.concatenate([[2.0, 3.0], np.full(46, 0.5)]))
    for columns in ([0], [0, 5, 6], [5, 6]):
        state = {"vectors0": np.eye(48)[:, columns]}
        got = specops.project_spectral_ball(w, 1.0, state=state)
        np.testing.assert_allclose(got, np.minimum(w, 1.0), atol=1e-5)


BAD_STATES: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "unknown": lambda state: {"vectors0": np.eye(4)},
    "incomplete": lambda state: {k: v for k, v in state.items() if k != "weight"},
    "short": lambda state: {**state, "left": state["left"][:-1]},
    "narrow": lambda state: {**state, "left": state["left"][:, :-1]},
    "flat": lambda state: {**state, "right": state["right"][:, 0]},
    "beyond": lambda state: {**state, "frequency": state["frequency"] + 1000},
    "negative": lambda state: {**state, "group": state["group"] - 1},
    "NaN left": lambda state: {**state, "left": np.full_like(state["left"], np.nan)},
    "NaN weight": lambda state: {**state, "weight": np.full_like(state["weight"], np.nan)},
    "infinite": lambda state: {**state, "right": np.full_like(state["right"], np.inf)},
    "scalar": lambda state: {k: v[0] for k, v in state.items()},
    "upright": lambda state: {**state, "weight": state["weight"][:, None]},
}


@pytest.mark.parametrize("name", BAD_STATES)
def test_bad_states_are_refused(name: str) -> None:
    shape, geometry = LAYERS[0]
    w = normal(shape, 19)
    _, info = specops.project_spectral_ball(w, 1.0, geometry, return_info=True)
    state = BAD_STATES[name](info.state)
    with pytest.raises(ValueError, match="state"):
        specops.project_spectral_ball(w, 1.0, geometry, state=state)


def test_states_of_another_geometry_are_refused() -> None:
    shape, geometry = LAYERS[0]
    _, info = specops.project_spectral_ball(normal(shape, 19), 1.0, geometry, return_info=True)
    for other_shape, other in (((3, 2, 3, 3), geometry), ((2, 2, 3), Conv((4,)))):
        with pytest.raises(ValueError, match="state"):
            specops.project_spectral_ball(normal(other_shape, 20), 0.1, other, state=info.state)
    with pytest.raises(ValueError, match="state of another geometry"):
        specops.project_spectral_ball(normal((4, 4), 21), 0.1, state=info.state)


def test_wrong_states_of_a_matrix_are_refused() -> None:
    w = _few_above(64, 48)
    for vectors in (
        np.eye(64)[:, :8],
        np.eye(48)[:, 0],
        np.eye(48, 49),
        np.full((48, 8), np.nan),
        np.full((48, 8), np.inf),
    ):
        with pytest.raises(ValueError, match="state"):
            specops.project_spectral_ball(w, 1.0, state={"vectors0": vectors})
    with pytest.raises(ValueError, match="state of another geometry"):
        specops.project_spectral_ball(w, 1.0, state={"vectors1": np.eye(48)[:, :8]})


def _orthogonal(n: int, seed: int = 22) -> np.ndarray:
    return np.linalg.qr(normal((n, n), seed))[0]


def _delta(outputs: int, inputs: int, *kernel: int) -> np.ndarray:
    """The kernel of the identity."""
    w = np.zeros((outputs, inputs, *kernel))
    for channel in range(min(outputs, inputs)):
        w[(channel, channel, *(k // 2 for k in kernel))] = 1.0
    return w


STIFF = (_orthogonal(8) * np.logspace(0, -12, 8)) @ _orthogonal(8, 23)
MATRICES: dict[str, np.ndarray] = {
    "repeated": 2 * np.eye(6),
    "orthogonal": 3 * _orthogonal(6),
    "rank one": np.outer(normal((6,), 24), normal((6,), 25)),
    "zero": np.zeros((6, 6)),
    "row": normal((1, 6), 26),
    "column": normal((6, 1), 27),
    "single": np.array([[-3.0]]),
    "stiff": STIFF,
}
KERNELS: dict[str, tuple[np.ndarray, Conv]] = {
    "delta": (2 * _delta(3, 3, 3), Conv((5,), boundary="circular")),
    "wide delta": (2 * _delta(2, 3, 3), Conv((5,))),
    "orthogonal": (_orthogonal(3)[..., None] * _delta(1, 1, 3), Conv((4,))),
    "rank one": (np.einsum("o,i,a->oia", *(normal((n,), n) for n in (3, 2, 3))), Conv((6,))),
    "one output": (normal((1, 4, 3), 28), Conv((6,), boundary="circular")),
    "one input": (normal((4, 1, 3), 29), Conv((5,))),
    "single": (np.full((1, 1, 1), -3.0), Conv((1,))),
    "one tap": (normal((2, 2, 1, 1), 30), Conv((3, 2))),
    "stiff": (STIFF.reshape(8, 4, 2), Conv((4,), stride=2, boundary="circular")),
    "one of three": (normal((2, 2, 3), 31) * [1, 0, 0], Conv((4,))),
    "folded": (normal((2, 2, 5), 32), Conv((2,), boundary="circular")),
}
SCALES = {"float32": (1.0, 1e-18, 1e18), "float64": (1.0, 1e-20, 1e20, 1e-150, 1e150)}


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_extreme_matrices(eager: Backend, dtype: str) -> None:
    dtype = dtype if eager.doubles else "float32"
    for name in MATRICES:
        # One shape where each is compiled anew.
        if eager.name != "jax" or MATRICES[name].shape == (6, 6):
            check_extreme_matrix(eager, name, dtype)


def check_extreme_matrix(eager: Backend, name: str, dtype: str) -> None:
    """The clipped SVD at every scale and bound."""
    for scale in SCALES[dtype]:
        w = eager.array(MATRICES[name] * scale, dtype)
        exact = eager.numpy(w).astype(np.float64) / scale
        top = float(np.linalg.norm(exact, 2)) or 1.0
        for share in (1e-10, 1e-3, 0.4, 0.999, 1.0 + 1e-5, 1e10):
            got, info = specops.project_spectral_ball(
                w, share * top * scale, Dense(), return_info=True
            )
            result = eager.numpy(got).astype(np.float64) / scale
            eps = np.finfo(dtype).eps
            assert np.linalg.norm(result, 2) <= share * top * (1 + 2 * eps)
            np.testing.assert_allclose(result, clipped(exact, share * top), atol=40 * eps * top)
            error = squared(result - clipped(exact, share * top))
            gap = float(eager.numpy(info.gap))
            assert error <= (gap + 100 * eps**2) * squared(exact)
            assert gap <= 100 * eps
            if share > 1:
                assert got is w


def test_extreme_kernels(eager: Backend) -> None:
    # Kernels are projected on the host: the other libraries add conversions and dtypes.
    for name in KERNELS if eager.name == "numpy" else ("delta", "one of three"):
        for dtype in ("float32", "float64") if eager.doubles else ("float32",):
            check_extreme_kernel(eager, name, dtype)


def check_extreme_kernel(eager: Backend, name: str, dtype: str) -> None:
    """Feasible at every scale and bound, and as near as the slow solver's point."""
    kernel, geometry = KERNELS[name]
    eps = float(np.finfo(dtype).eps)
    rounding = SINGLE if dtype == "float32" else ROUNDING
    for scale in SCALES[dtype][:3]:
        w = eager.array(kernel * scale, dtype)
        exact = eager.numpy(w).astype(np.float64) / scale
        top = norm(exact, geometry)
        for share in (1e-6, 1e-2, 0.4, 1.0 - 1e-3, 1.0 + 1e-5):
            got, info = specops.project_spectral_ball(
                w, share * top * scale, geometry, gap_tolerance=1e-9, return_info=True
            )
            result = eager.numpy(got).astype(np.float64) / scale
            # What wraps to nothing stays, and its rounding with it.
            silent = eps * np.sqrt(squared(exact)) if name == "folded" else 0.0
            assert norm(result, geometry) <= share * top * (1 + 4 * eps) + silent
            gap = float(eager.numpy(info.gap))
            if share > 1:
                assert got is w
                continue
            if share < 1e-2:
                assert norm(result, geometry) >= 0.5 * share * top
                continue
            truth, error = _slow_extreme(name, dtype, share, exact)
            error = np.sqrt(error) + np.sqrt((gap + rounding) * squared(exact))
            assert np.sqrt(squared(result - truth)) <= error
            assert gap <= max(1.1e-9, rounding)


def _slow_extreme(
    name: str, dtype: str, share: float, exact: np.ndarray
) -> tuple[np.ndarray, float]:
    key = (name, dtype, share)
    if key not in _TRUTHS:
        geometry = KERNELS[name][1]
        _TRUTHS[key] = slowly(exact, geometry, share * norm(exact, geometry))
    return _TRUTHS[key]


def test_zero_kernels_stay(eager: Backend) -> None:
    for shape, geometry in LAYERS[:3]:
        zero = eager.array(np.zeros(shape), "float32")
        got, info = specops.project_spectral_ball(zero, 1e-30, geometry, return_info=True)
        assert got is zero
        assert (info.iterations, float(eager.numpy(info.gap))) == (0, 0.0)
        assert float(eager.numpy(info.norm_before)) == 0


@pytest.mark.parametrize("seed", range(3))
def test_delta_kernels_shrink_to_their_bound(seed: int) -> None:
    # Every block is the same orthogonal matrix: the nearest kernel is a multiple of it.
    w = _orthogonal(3, seed)[:, :, None, None] * _delta(1, 1, 3, 3)
    for geometry in (Conv((5, 4), boundary="circular"), Conv((4, 4)), Conv(None)):
        got = specops.project_spectral_ball(w, 0.5, geometry, gap_tolerance=1e-12)
        factor = certificate(geometry, w.shape)
        np.testing.assert_allclose(got, 0.5 * factor * w, atol=1e-6)


HALF = [("torch", "float16"), ("torch", "bfloat16"), ("jax", "bfloat16")]


def _half(library: str, dtype: str, values: np.ndarray) -> tuple[Any, np.ndarray]:
    """(an array in half precision, what it stores in double)."""
    if library == "torch":
        torch = pytest.importorskip("torch")
        w = torch.asarray(values).to(getattr(torch, dtype))
        return w, w.double().numpy()
    jnp = pytest.importorskip("jax.numpy")
    w = jnp.asarray(values).astype(dtype)
    return w, np.asarray(w).astype(np.float64)


def _double(x: Any) -> np.ndarray:
    return x.double().numpy() if hasattr(x, "double") else np.asarray(x).astype(np.float64)


@pytest.mark.parametrize(("library", "dtype"), HALF)
@pytest.mark.parametrize(
    ("shape", "geometry"),
    [((12, 9), Dense()), ((2, 4, 5), Dense((1,), batch_axes=(0,))), LAYERS[0], LAYERS[3]],
)
def test_half_precision_is_nearest_as_stored(
    library: str, dtype: str, shape: tuple[int, ...], geometry: Geometry
) -> None:
    if library == "jax" and shape == (2, 4, 5):
        return  # the stack is compiled no differently
    eps = 2.0**-10 if dtype == "float16" else 2.0**-7
    for scale in (2.0**-8, 2.0**8) if dtype == "float16" else (2.0**-60, 2.0**60):
        w, exact = _half(library, dtype, normal(shape, 33) * scale)
        bound = 0.5 * norm(exact, geometry)
        got, info = specops.project_spectral_ball(
            w, bound, geometry, gap_tolerance=1e-6, return_info=True
        )
        assert got.dtype == w.dtype
        result = _double(got)
        assert norm(result, geometry) <= bound * (1 + 1e-6)
        if isinstance(geometry, Conv):
            truth, error = slowly(exact / scale, geometry, bound / scale)
            truth, error = truth * scale, error * scale**2
        else:
            truth, error = clipped(oracle.dense_matrix(exact, geometry), bound), 0.0
            result, exact = (oracle.dense_matrix(x, geometry) for x in (result, exact))
        gap = float(np.max(_double(info.gap)))
        assert gap <= 2 * eps
        distance = np.sqrt(squared(result - truth))
        assert distance <= np.sqrt((gap + SINGLE) * squared(exact)) + np.sqrt(error)
        # Rounding, and the shrinking that undoes its excess, are all that was lost.
        assert distance <= 2.5 * eps * np.sqrt(squared(exact))
        again, info = specops.project_spectral_ball(got, bound, geometry, return_info=True)
        assert again is got
        assert info.iterations == 0


PRODUCTS: list[tuple[tuple[int, ...], Dense]] = [
    ((20, 20), Dense()),
    ((9, 24), Dense()),
    ((24, 9), Dense()),
    ((3, 8, 6), Dense((1,), batch_axes=(0,))),
]


@pytest.mark.parametrize("method", ["svd", "eigh", "products"])
def test_dense_methods_agree(eager: Backend, method: str) -> None:
    for shape, geometry in PRODUCTS[:1] if eager.name == "jax" else PRODUCTS:
        for dtype in _dtypes(eager, "float32", "float64", "complex128"):
            check_dense_method(eager, shape, geometry, dtype, method)


def check_dense_method(
    eager: Backend, shape: tuple[int, ...], geometry: Dense, dtype: str, method: str
) -> None:
    """By the explicit matrices: feasible, nearest, and what was inside is untouched."""
    values = normal(shape, 34, complex=dtype == "complex128")
    w = eager.array(values, dtype)
    single = dtype == "float32" or not eager.doubles
    eps = 2.0 ** (-23 if single else -52)
    exact = oracle.dense_matrix(eager.numpy(w).astype(values.dtype), geometry)
    norms = np.linalg.norm(exact, 2, axis=(-2, -1))
    # Between the norms of a stack as well: then some are inside already.
    for bound in (0.95 * float(norms.min()), 0.2 * float(norms.min()), float(norms.mean()) * 0.99):
        got, info = specops.project_spectral_ball(
            w, bound, geometry, method=method, return_info=True
        )
        result = oracle.dense_matrix(eager.numpy(got).astype(values.dtype), geometry)
        truth = clipped(exact, bound)
        assert np.linalg.norm(result, 2, axis=(-2, -1)).max() <= bound * (1 + 2 * eps)
        np.testing.assert_allclose(result, truth, atol=100 * eps * norms.max())
        error = np.sum(np.abs(result - truth) ** 2, axis=(-2, -1))
        whole = np.sum(np.abs(exact) ** 2, axis=(-2, -1))
        assert (error <= (eager.numpy(info.gap) + 64 * eps**2 * shape[-1]) * whole).all()
        assert (eager.numpy(info.gap) <= 100 * eps).all()
        np.testing.assert_allclose(eager.numpy(info.norm_before), norms, rtol=100 * eps)
        inside = norms <= bound * (1 - 1e-4)
        np.testing.assert_array_equal(result[inside], exact[inside])


COMPILED = [b for b in BACKENDS if b.traced]


@pytest.mark.parametrize("compiler", COMPILED, ids=repr)
@pytest.mark.parametrize(("shape", "geometry"), [LAYERS[1], LAYERS[8], ((5, 4), Dense())])
def test_compiled_points_are_nearest(
    compiler: Backend, shape: tuple[int, ...], geometry: Geometry
) -> None:
    w = normal(shape, 6)
    bound = 0.5 * norm(w, geometry)

    def both(x: Any) -> tuple[Any, Any]:
        point, info = specops.project_spectral_ball(
            x, bound, geometry, iterations=60, return_info=True
        )
        return point, info.gap

    point, gap = compiler.call(both, compiler.array(w))
    got, gap = compiler.numpy(point), float(compiler.numpy(gap))
    assert norm(got, geometry) <= bound * (1 + 1e-12)
    if isinstance(geometry, Conv):
        truth, error = slowly(w, geometry, bound)
    else:
        truth, error = clipped(w, bound), 0.0
    assert gap <= 1e-8
    error = np.sqrt(error) + np.sqrt((gap + ROUNDING) * squared(w))
    assert np.sqrt(squared(got - truth)) <= error
