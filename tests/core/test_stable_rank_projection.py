"""Stable rank projections: nearest, feasible as stored, and untouched inside."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given

import specops
from specops import Conv, Dense, errors
from specops.geometry import Geometry
from specops.maps.prepare import prepare
from specops.maps.unread import with_unread
from specops.projections.kernels import cone as kernel_cone
from specops.projections.kernels import leading_direction as kernel_direction
from specops.projections.kernels.leading_direction import leading_direction
from specops.projections.matrices import cone as matrix_cone
from specops.projections.stable_rank import project_stable_rank
from tests import oracle
from tests.backends import Backend
from tests.strategies import Case, convolutions, denses

DENSE: list[tuple[tuple[int, ...], Geometry]] = [
    ((6, 4), Dense()),
    ((4, 9), Dense()),
    ((2, 5, 4), Dense(out_axes=(1,), batch_axes=(0,))),
    ((5, 3, 4), Dense(out_axes=(-1,), batch_axes=(1,))),
]
CONVS: list[tuple[tuple[int, ...], Geometry]] = [
    ((4, 3, 3, 3), Conv((6, 6), boundary="circular")),
    ((4, 3, 3, 3), Conv((5, 5))),
    ((4, 2, 3, 3), Conv((6, 6), stride=2, groups=2, padding=1)),
    ((3, 4, 4, 4), Conv((4, 4), transposed=True, stride=2, padding=1, layout="IO*")),
    ((5, 2, 3), Conv((3,), boundary="circular", layout="*IO")),
    ((4, 3, 5), Conv((4,), boundary="circular")),
    ((4, 3, 3), Conv((5,), boundary="circular", stride=2)),
    ((3, 2, 3, 3), Conv((2, 2))),
]


def ranks(w: np.ndarray, geometry: Geometry) -> np.ndarray:
    """Stable ranks by the explicit matrix, in double precision."""
    s = oracle.spectrum(w.astype(np.result_type(w, np.float64)), geometry)
    s = s / np.where(s[..., :1] > 0, s[..., :1], 1.0)
    return (s**2).sum(axis=-1)


def weight(shape: tuple[int, ...], dtype: str = "float64", seed: int = 5) -> np.ndarray:
    rng = np.random.default_rng(seed)
    w = rng.standard_normal(shape)
    return w + 1j * rng.standard_normal(shape) if dtype.startswith("complex") else w


def achieved(w: np.ndarray, share: float, geometry: Geometry) -> float:
    """A target between 1 and the smallest stable rank."""
    return 1.0 + share * (float(ranks(w, geometry).min()) - 1.0)


@pytest.mark.parametrize(
    ("preserve", "target", "expected"),
    [
        (0, 2.0, [1.20710678, 0.85355339, 0.85355339]),
        (1, 2.0, [1.0, 0.70710678, 0.70710678]),
        (2, 2.0, [1.0, 1.0, 0.0]),
        (3, 2.5, [1.0, 1.0, 0.70710678]),
        (0, 1.0, [1.0, 0.0, 0.0]),
        (2, 1.0, [1.0, 0.0, 0.0]),
        (0, 3.0, [1.0, 1.0, 1.0]),
    ],
)
def test_the_identity(backend: Backend, preserve: int, target: float, expected: Any) -> None:
    given = backend.array(np.eye(3), "float32")
    got = backend.call(lambda x: project_stable_rank(x, target=target, preserve=preserve), given)
    backend.same_kind(got, given)
    values = np.linalg.svd(backend.numpy(got), compute_uv=False)
    np.testing.assert_allclose(values, expected, atol=1e-5)


@pytest.mark.parametrize("shape", [(3, 3), (2, 4), (4, 3)])
@pytest.mark.parametrize("target", [1.0, 1.2, 1.6])
def test_no_feasible_matrix_is_nearer(shape: tuple[int, int], target: float) -> None:
    """Random descent within the feasible matrices, which knows nothing of the formula."""
    rng = np.random.default_rng(1)
    u, _, vh = np.linalg.svd(rng.standard_normal(shape), full_matrices=False)
    w = (u * np.array([1.0, 0.9, 0.7])[: min(shape)]) @ vh
    got = project_stable_rank(w, target=target)
    distance = np.linalg.norm(w - got)

    def feasible(x: np.ndarray) -> np.ndarray:
        u, s, vh = np.linalg.svd(x, full_matrices=False)
        rest = np.linalg.norm(s[:, 1:], axis=1)
        allowed = np.sqrt(target - 1.0) * s[:, 0]
        s[:, 1:] *= np.minimum(1.0, allowed / np.maximum(rest, 1e-300))[:, None]
        return (u * s[:, None, :]) @ vh

    x = feasible(w + rng.standard_normal((400, *shape)))
    best = np.linalg.norm(x - w, axis=(1, 2))
    for step in range(600):
        size = 0.5 * 0.98**step + 1e-4
        tried = feasible(x + size * rng.standard_normal(x.shape))
        length = np.linalg.norm(tried - w, axis=(1, 2))
        x[length < best] = tried[length < best]
        best = np.minimum(best, length)
    assert best.min() >= distance * (1 - 1e-12)
    assert best.min() <= distance * 1.02


@pytest.mark.parametrize("preserve", [1, 2, 3])
def test_nearest_of_those_that_keep_the_leading_triplets(preserve: int) -> None:
    u, _, vh = np.linalg.svd(weight((5, 4)), full_matrices=False)
    s = np.array([1.0, 0.8, 0.7, 0.6])
    w = (u * s) @ vh
    target = float((s[:preserve] ** 2).sum() / s[0] ** 2) + 0.1
    got, info = project_stable_rank(w, target=target, preserve=preserve, return_info=True)
    assert int(info.preserved) == preserve
    # The leading triplets are kept exactly ...
    after = np.linalg.svd(got, compute_uv=False)
    np.testing.assert_allclose(after[:preserve], s[:preserve], rtol=1e-12)
    np.testing.assert_allclose(got @ vh[:preserve].T, (u * s)[:, :preserve], atol=1e-12)
    # ... and no other rest of the norm that is left is nearer.
    budget = np.sqrt(target * s[0] ** 2 - (s[:preserve] ** 2).sum())
    rest = np.random.default_rng(0).standard_normal((2000, 5, 4))
    rest = rest - u[:, :preserve] @ (u[:, :preserve].T @ rest)
    rest = rest - rest @ vh[:preserve].T @ vh[:preserve]
    ours = got - (u[:, :preserve] * s[:preserve]) @ vh[:preserve]
    assert np.linalg.norm(ours) == pytest.approx(budget)
    rest = np.concatenate([rest, ours + 0.1 * rest])
    rest *= budget / np.linalg.norm(rest, axis=(1, 2), keepdims=True)
    others = np.linalg.norm(w - (got - ours) - rest, axis=(1, 2))
    assert others.min() >= np.linalg.norm(w - got) * (1 - 1e-12)


def test_keeps_as_many_triplets_as_fit() -> None:
    w = np.diag([1.0, 0.9, 0.8, 0.7, 0.6])
    for target, fits in [(1.0, 1), (1.8, 1), (1.82, 2), (2.4, 2), (2.46, 3)]:
        for preserve in range(1, 6):
            got, info = project_stable_rank(w, target=target, preserve=preserve, return_info=True)
            kept = min(fits, preserve)
            assert int(info.preserved) == kept
            np.testing.assert_allclose(np.diag(got)[:kept], np.diag(w)[:kept])
            assert ranks(got, Dense()) == pytest.approx(target)


@given(denses())
def test_dense_follows_the_theorem(case: Case) -> None:
    w = case.weight()
    matrices = oracle.dense_matrix(w, case.geometry)
    u, s, vh = np.linalg.svd(matrices, full_matrices=False)
    target = 1.3
    inside = ranks(w, case.geometry) <= target
    for preserve in (0, 1):
        got, info = project_stable_rank(
            w, case.geometry, target=target, preserve=preserve, return_info=True
        )
        rest = np.sqrt((s[..., 1:] ** 2).sum(axis=-1))
        safe = np.where(inside, 1.0, rest)
        if preserve:
            first, other = np.ones_like(rest), np.sqrt(target - 1) * s[..., 0] / safe
        else:
            gamma = np.sqrt(target - 1.0) * s[..., 0] / safe
            other = (gamma + target - 1.0) / target
            first = other / gamma
        factors = np.concatenate([first[..., None], np.repeat(other[..., None], 9, -1)], axis=-1)
        expected = (u * (s * factors[..., : s.shape[-1]])[..., None, :]) @ vh
        expected = np.where(inside[..., None, None], matrices, expected)
        result = oracle.dense_matrix(got, case.geometry)
        np.testing.assert_allclose(result, expected, atol=1e-11)
        np.testing.assert_array_equal(result[inside], matrices[inside])
        changed = np.linalg.norm(result - matrices, axis=(-2, -1))
        np.testing.assert_allclose(info.distance, changed, atol=1e-12)
        np.testing.assert_allclose(info.rank_before, ranks(w, case.geometry), rtol=1e-10)
        np.testing.assert_allclose(info.rank_after, ranks(got, case.geometry), rtol=1e-10)


@pytest.mark.parametrize(("shape", "geometry"), DENSE)
@pytest.mark.parametrize("dtype", ["float32", "float64", "complex64"])
def test_feasible_by_the_explicit_matrix(
    backend: Backend, shape: tuple[int, ...], geometry: Geometry, dtype: str
) -> None:
    if backend.traced and dtype != "float32":
        pytest.skip("compiled in float32 alone")
    w = weight(shape, dtype)
    given = backend.array(w, dtype)
    for share in (0.2, 0.7, 0.999):
        target = achieved(w, share, geometry)
        for preserve in (0, 2):
            got = backend.call(
                lambda x, r=target, k=preserve: project_stable_rank(
                    x, geometry, target=r, preserve=k
                ),
                given,
            )
            backend.same_kind(got, given)
            assert got.shape == given.shape
            after = ranks(backend.numpy(got), geometry)
            assert (after <= target * (1 + 2e-6)).all()
            assert (after >= target * (1 - 1e-5)).all()


@pytest.mark.parametrize(("shape", "geometry"), CONVS)
def test_kernels_are_feasible_by_the_explicit_matrix(
    backend: Backend, shape: tuple[int, ...], geometry: Conv
) -> None:
    few = "jax" in backend.name  # each case compiles for seconds
    for dtype in ("float32",) if few else ("float32", "float64", "complex64"):
        w = weight(shape, dtype)
        given = backend.array(w, dtype)
        least = max(1.0, least_along(w, geometry))
        for share in (0.3,) if few else (0.3, 0.999):
            target = least + share * (float(ranks(w, geometry)) - least)
            got = backend.call(
                lambda x, r=target: project_stable_rank(x, geometry, target=r), given
            )
            backend.same_kind(got, given)
            assert got.shape == given.shape
            after = ranks(backend.numpy(got), geometry)
            assert after <= target * (1 + 2e-6)
            assert backend.traced or after >= target * (1 - 0.03)


def least_rank(w: np.ndarray, geometry: Conv) -> float:
    """Of the cone along the leading axis, by the operator that the oracle builds."""
    e, gram = axis_and_gram(w, geometry)
    return 1.0 / float(e @ np.linalg.pinv(gram, rcond=1e-10) @ e)


def axis_and_gram(w: np.ndarray, geometry: Conv) -> tuple[np.ndarray, np.ndarray]:
    """E of the explicit leading pair and the Gram matrix of K ↦ A(K), real coordinates of K."""
    units = np.eye(w.size).reshape(-1, *w.shape)
    if np.iscomplexobj(w):
        units = np.concatenate([units, 1j * units])
    images = np.stack([oracle.conv_matrix(unit, geometry) for unit in units])
    u, _, vh = np.linalg.svd(oracle.conv_matrix(w, geometry))
    e = np.einsum("kij,i,j->k", images, u[:, 0].conj(), vh[0].conj()).real
    flat = images.reshape(len(units), -1)
    return e, (flat.conj() @ flat.T).real


def coordinates(w: np.ndarray) -> np.ndarray:
    flat = w.ravel()
    return np.concatenate([flat.real, flat.imag]) if np.iscomplexobj(w) else flat


def assert_nearest_in_cone(
    w: np.ndarray, x: np.ndarray, e: np.ndarray, gram: np.ndarray, target: float
) -> None:
    """Moreau: x is in the cone, orthogonal to w − x, and no member of the cone has a positive
    product with w − x (the largest product is known in closed form).
    """
    size = np.linalg.norm(w) ** 2
    assert x @ gram @ x <= target * (x @ e) ** 2 * (1 + 1e-9)
    assert x @ e >= 0
    away = w - x
    assert abs(away @ x) <= 1e-9 * size
    inverse = np.linalg.pinv(gram, rcond=1e-10)
    unseen = away - gram @ (inverse @ away)
    assert np.linalg.norm(unseen) <= 1e-9 * np.sqrt(size)
    dual = e @ inverse @ e
    across = away @ inverse @ away - (away @ inverse @ e) ** 2 / dual
    largest = (away @ inverse @ e) / dual + np.sqrt(max(target - 1 / dual, 0) * max(across, 0))
    assert largest <= 1e-7 * np.sqrt(size) / np.sqrt(np.linalg.norm(gram))


def nearest_along(
    w: np.ndarray, geometry: Conv, target: float
) -> tuple[np.ndarray, np.ndarray, float]:
    """(nearest kernel of the cone along w's leading axis, that axis, least stable rank)."""
    given = prepare(w, geometry)
    direction, _ = leading_direction(np, geometry.kernel(given.w), geometry.sizes(w.shape))
    found, _, least = kernel_cone.kernel_candidates(given, geometry, direction, np.asarray(target))
    nearest = with_unread(found.weight(found.wanted), w, geometry)
    return nearest, geometry.weight(direction), float(least)


def least_along(w: np.ndarray, geometry: Conv) -> float:
    return nearest_along(w, geometry, 1e9)[2]


@given(convolutions())
def test_the_axis_is_the_operators_and_the_result_nearest_in_its_cone(case: Case) -> None:
    w, geometry = case.weight(), case.geometry
    assume(w.size <= 60)
    s = oracle.spectrum(w, geometry)
    assume(s[0] > 1e-6 and (len(s) < 2 or s[1] < s[0] * (1 - 1e-3) or geometry.boundary != "zeros"))
    full = float(ranks(w, geometry))
    _, axis, least = nearest_along(w, geometry, full)
    e, (_, gram) = coordinates(axis), axis_and_gram(w, geometry)
    assert coordinates(w) @ e == pytest.approx(s[0])
    rng = np.random.default_rng(case.seed)
    for _ in range(5):
        other = rng.standard_normal(w.shape)
        assert abs(coordinates(other.astype(w.dtype)) @ e) <= oracle.spectrum(other, geometry)[
            0
        ] * (1 + 1e-9)
    for share in (1e-3, 0.1, 0.6):
        target = least + share * (full - least)
        assume(target < full * (1 - 1e-9))
        x, _, _ = nearest_along(w, geometry, target)
        assert_nearest_in_cone(coordinates(w), coordinates(x), e, gram, target)


def test_weighted_cones_of_every_kind_are_solved() -> None:
    """Also where the weight points away from the cone's axis, and where the apex is nearest."""
    rng = np.random.default_rng(0)
    met = set()
    for _ in range(400):
        n = int(rng.integers(2, 6))
        d = 10.0 ** rng.uniform(-2, 1, n)
        e, z = rng.standard_normal(n), rng.standard_normal(n)
        z *= np.sign(z @ e)
        dual = float(np.sum(e**2 / d))
        r = (1.0 + 10.0 ** rng.uniform(-3, 1)) / dual
        if z @ (d * z) <= r * (z @ e) ** 2:
            continue
        of_z, of_e = kernel_cone._combination(np, d, z * z, z * e, e * e, np.asarray(r))
        x = of_z * z + of_e * e
        x *= max(0.0, z @ x) / (x @ x)
        met.add("apex" if not x.any() else "front" if z @ (e / d) > 0 else "behind")
        assert_nearest_in_cone(z, x, e, np.diag(d), r * (1 + 1e-9))
    assert met == {"apex", "front", "behind"}


@given(convolutions())
def test_every_convolution_is_constrained(case: Case) -> None:
    w, geometry = case.weight(), case.geometry
    assume(oracle.spectrum(w, geometry)[0] > 1e-6)
    full = float(ranks(w, geometry))
    _, _, least = nearest_along(w, geometry, full)
    target = max(1.0, least + 0.3 * (full - least))
    got, info = project_stable_rank(w, geometry, target=target, return_info=True)
    after = float(ranks(got, geometry))
    assert after <= target * (1 + 1e-12)
    assert after <= info.rank_after * (1 + 1e-12)
    assert info.rank_before == pytest.approx(full)
    assert got.shape == w.shape
    assert info.distance == pytest.approx(np.linalg.norm(got - w), abs=1e-12)
    if info.iterations == 0:
        assert got is w
    elif info.iterations < 10:
        assert after >= target * (1 - 1e-2)


def test_each_axis_brings_the_kernel_nearer() -> None:
    geometry = Conv((4, 4))
    w = weight((8, 8, 3, 3))
    target = 0.5 * float(specops.stable_rank(w, geometry))
    got, info = project_stable_rank(w, geometry, target=target, return_info=True)
    along_first, _, _ = nearest_along(w, geometry, target)
    assert info.iterations > 1
    assert info.distance < 0.8 * np.linalg.norm(along_first - w)
    assert ranks(got, geometry) == pytest.approx(target, rel=2e-3)


def test_taps_on_padding_alone_stay() -> None:
    w = weight((3, 3, 5))
    geometry = Conv((2,))
    got = project_stable_rank(w, geometry, target=2.0)
    np.testing.assert_array_equal(got[..., [0, 4]], w[..., [0, 4]])
    assert ranks(got, geometry) <= 2.0 + 1e-12


@pytest.mark.parametrize(("shape", "geometry"), DENSE + CONVS)
def test_twice_is_once(eager: Backend, shape: tuple[int, ...], geometry: Geometry) -> None:
    values = weight(shape)
    w = eager.array(values, "float32")
    least = least_along(values, geometry) if isinstance(geometry, Conv) else 1.0
    target = least + 0.4 * (float(ranks(values, geometry).min()) - least)
    once, first = project_stable_rank(w, geometry, target=target, return_info=True)
    assert once is not w
    assert first.iterations > 0
    twice, info = project_stable_rank(once, geometry, target=target, return_info=True)
    assert twice is once
    assert info.iterations == 0
    assert (eager.numpy(info.distance) == 0).all()


@pytest.mark.parametrize("target", [1.0, 1.0 + 1e-6, 1.05, 3.0])
@pytest.mark.parametrize("preserve", [0, 1, 3])
@pytest.mark.parametrize("name", ["float16", "bfloat16"])
def test_half_precision_holds_as_stored(name: str, preserve: int, target: float) -> None:
    torch = pytest.importorskip("torch")
    w = torch.randn((64, 48), generator=torch.Generator().manual_seed(0)).to(getattr(torch, name))
    got, info = project_stable_rank(w, target=target, preserve=preserve, return_info=True)
    assert got.dtype == w.dtype
    stored = float(ranks(got.double().numpy(), Dense()))
    eps = {"float16": 2.0**-10, "bfloat16": 2.0**-7}[name]
    assert stored <= target * (1 + 1e-6 + eps**2)
    assert stored >= target * (1 - 2 * eps)
    assert float(info.rank_after) == pytest.approx(stored, rel=1e-5)
    assert project_stable_rank(got, target=target, preserve=preserve) is got
    if target >= 1.05:
        # Rounding to 2^-8 adds more than this to the squared rest if nothing answers it.
        assert stored <= target * (1 + 1e-6)


def test_half_precision_does_not_overflow() -> None:
    torch = pytest.importorskip("torch")
    w = torch.asarray(60000 * np.sign(weight((2, 8, 8)))).half()
    geometry = DENSE[2][1]
    got = project_stable_rank(w, geometry, target=1.5)
    assert torch.isfinite(got).all()
    assert (ranks(got.double().numpy(), geometry) <= 1.5 * (1 + 2e-6)).all()
    k = torch.asarray(60000 * np.sign(weight((4, 3, 3)))).half()
    got = project_stable_rank(k, Conv((3,)), target=2.0)
    assert torch.isfinite(got).all()
    assert ranks(got.double().numpy(), Conv((3,))) <= 2.0 * (1 + 2e-6)


@pytest.mark.parametrize("name", ["float16", "bfloat16"])
def test_half_precision_kernels_hold_as_stored(name: str) -> None:
    torch = pytest.importorskip("torch")
    w = torch.randn((8, 6, 3, 3), generator=torch.Generator().manual_seed(0))
    w = w.to(getattr(torch, name))
    for geometry in (Conv((6, 6)), Conv((6, 6), boundary="circular")):
        target = 0.6 * float(specops.stable_rank(w, geometry))
        got = project_stable_rank(w, geometry, target=target)
        assert got.dtype == w.dtype
        assert ranks(got.double().numpy(), geometry) <= target * (1 + 2e-6)


@pytest.mark.parametrize("scale", [1e-20, 1e20])
@pytest.mark.parametrize(("shape", "geometry"), DENSE + CONVS)
def test_extreme_scales(
    eager: Backend, shape: tuple[int, ...], geometry: Geometry, scale: float
) -> None:
    values = weight(shape)
    least = least_along(values, geometry) if isinstance(geometry, Conv) else 1.0
    target = least + 0.5 * (float(ranks(values, geometry).min()) - least)
    plain = project_stable_rank(eager.array(values, "float32"), geometry, target=target)
    scaled = project_stable_rank(eager.array(values * scale, "float32"), geometry, target=target)
    assert np.isfinite(eager.numpy(scaled)).all()
    np.testing.assert_allclose(
        eager.numpy(scaled).astype(np.float64) / scale, eager.numpy(plain), atol=2e-4
    )


@pytest.mark.parametrize(("shape", "geometry"), DENSE + CONVS)
def test_zero_stays_zero(backend: Backend, shape: tuple[int, ...], geometry: Geometry) -> None:
    zero = backend.array(np.zeros(shape, dtype=np.float32))
    got = backend.call(lambda x: project_stable_rank(x, geometry, ratio=0.5), zero)
    assert (backend.numpy(got) == 0).all()


@pytest.mark.parametrize(
    "matrix",
    [
        np.ones((5, 1)),
        np.ones((1, 5)),
        np.outer([1.0, 2.0], [3.0, 4.0, 5.0]),
        np.diag([1.0, 1e-9, 1e-18]),
        np.array([[0.0, 0.0], [0.0, 7.0]]),
    ],
)
def test_near_rank_one_is_left_alone(eager: Backend, matrix: np.ndarray) -> None:
    w = eager.array(matrix, "float32")
    for preserve in (0, 1, 4):
        assert project_stable_rank(w, target=1.0, preserve=preserve) is w


def test_repeated_and_tiny_values() -> None:
    rng = np.random.default_rng(0)
    q = np.linalg.qr(rng.standard_normal((6, 6)))[0]
    for s in ([1, 1, 1, 1, 0, 0], [1, 1, 1e-8, 1e-8, 1e-16, 0], [1, 0.999999999, 0.5, 0.5, 0, 0]):
        w = (q * np.array(s, dtype=float)) @ q.T
        for target in (1.0, 1.5, 1.9):
            for preserve in (0, 1, 2):
                got = project_stable_rank(w, target=target, preserve=preserve)
                assert ranks(got, Dense()) == pytest.approx(target, rel=1e-12)


def test_ratio_is_of_the_smaller_side_and_never_below_one() -> None:
    w = weight((12, 6))
    np.testing.assert_array_equal(
        project_stable_rank(w, ratio=0.25), project_stable_rank(w, target=1.5)
    )
    np.testing.assert_array_equal(
        project_stable_rank(w, ratio=0.01), project_stable_rank(w, target=1.0)
    )
    assert project_stable_rank(w, ratio=1.0) is w
    assert project_stable_rank(np.eye(7), ratio=1.0).shape == (7, 7)
    geometry = Conv((4, 4), groups=2)
    k = weight((4, 3, 3, 3))
    side = min(oracle.conv_matrix(k, geometry).shape)
    np.testing.assert_array_equal(
        project_stable_rank(k, geometry, ratio=0.1),
        project_stable_rank(k, geometry, target=0.1 * side),
    )


def test_splits_and_stacks_are_separate() -> None:
    w = np.concatenate([np.eye(4), np.diag([1.0, 0.1, 0.1, 0.1])])
    got, info = project_stable_rank(w, Dense(splits=(4, 4)), target=2.0, return_info=True)
    np.testing.assert_array_equal(got[4:], w[4:])
    np.testing.assert_allclose(got[:4], project_stable_rank(np.eye(4), target=2.0))
    np.testing.assert_allclose(info.rank_before, [4.0, 1.03])
    np.testing.assert_allclose(info.rank_after, [2.0, 1.03])
    assert info.distance[1] == 0
    stack = weight((3, 5, 4))
    for preserve in (0, 2):
        together, info = project_stable_rank(
            stack, DENSE[2][1], target=1.4, preserve=preserve, return_info=True
        )
        assert info.rank_after.shape == (3,)
        for one, matrix in zip(together, stack, strict=True):
            alone = project_stable_rank(matrix, target=1.4, preserve=preserve)
            np.testing.assert_allclose(one, alone, atol=1e-13)


def test_bad_matrices_of_a_stack_are_left_alone() -> None:
    w = np.stack([np.eye(3), np.eye(3), np.eye(3)])
    w[1, 0, 0] = np.nan
    given = w.copy()
    with pytest.warns(errors.NonFiniteWarning, match="batch index 1 "):
        got, info = project_stable_rank(w, DENSE[2][1], target=2.0, return_info=True)
    np.testing.assert_array_equal(w, given)
    np.testing.assert_array_equal(got[1], w[1])
    np.testing.assert_array_equal(np.isnan(info.rank_after), [False, True, False])
    np.testing.assert_allclose(info.rank_after[[0, 2]], 2.0)


def test_non_finite_raises_or_is_left_when_traced() -> None:
    for shape, geometry in (DENSE[0], CONVS[0]):
        w = weight(shape)
        w.flat[0] = np.inf
        with pytest.raises(errors.NonFiniteError):
            project_stable_rank(w, geometry, target=2.0)
    jax = pytest.importorskip("jax")
    for shape, geometry in (DENSE[0], DENSE[2], CONVS[0], CONVS[1]):
        w = weight(shape)
        w.flat[0] = np.nan
        got = jax.jit(lambda x, g=geometry: project_stable_rank(x, g, target=2.0))(w)
        bad = np.isnan(w).any(axis=(1, 2)) if w.ndim == 3 else slice(None)
        np.testing.assert_array_equal(np.asarray(got)[bad], w[bad])


@pytest.mark.parametrize("bad", [0.5, 0.0, -1.0, float("nan"), float("inf"), "2", True])
def test_bad_targets(bad: Any) -> None:
    with pytest.raises(ValueError, match=r"target must be .* at least 1, .*\[1, min\(rows, col"):
        project_stable_rank(np.eye(2), target=bad)


@pytest.mark.parametrize("bad", [0.0, -0.1, 1.1, float("nan"), "1", False])
def test_bad_ratios(bad: Any) -> None:
    with pytest.raises(ValueError, match=r"ratio must be in \(0, 1\].*\[1, min\(rows, columns\)"):
        project_stable_rank(np.eye(2), ratio=bad)


def test_other_bad_arguments() -> None:
    for both in ({}, {"ratio": 0.5, "target": 2.0}):
        with pytest.raises(ValueError, match="exactly one of ratio and target"):
            project_stable_rank(np.eye(2), **both)
    for preserve in (-1, 1.5, True):
        with pytest.raises(ValueError, match="preserve must be"):
            project_stable_rank(np.eye(2), target=1.0, preserve=preserve)
    k = weight((4, 4, 3, 3))
    with pytest.raises(errors.UnsupportedGeometryError, match="preserve must be 0 for a Conv"):
        project_stable_rank(k, Conv((8, 8)), target=10.0, preserve=1)
    with pytest.raises(errors.UnsupportedGeometryError, match="input_shape"):
        project_stable_rank(k, Conv(None), target=10.0)


def test_targets_below_every_kernel_say_what_is_feasible() -> None:
    k = weight((4, 3, 3, 3))
    for geometry in (Conv((9, 9), boundary="circular"), Conv((9, 9))):
        least = least_rank(k, geometry)
        assert least_along(k, geometry) == pytest.approx(least)
        assert least >= 9.0 - 1e-9 or geometry.boundary == "zeros"
        text = rf"target=2.0 is below {least:.3g}\d*, the least .* 3×3 kernel .* to 243"
        with pytest.raises(ValueError, match=text):
            project_stable_rank(k, geometry, target=2.0)
        with pytest.raises(ValueError, match=r"ratio=0.01, stable rank 2.43, is below"):
            project_stable_rank(k, geometry, ratio=0.01)
        got = project_stable_rank(k, geometry, target=least * (1 + 1e-9))
        assert ranks(got, geometry) <= least * (1 + 1e-8)


@pytest.fixture
def always_iterated(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small matrices on the path of large ones."""
    monkeypatch.setattr(matrix_cone, "_ITERATE_ABOVE", 0)


@pytest.mark.usefixtures("always_iterated")
@pytest.mark.parametrize("dtype", ["float32", "complex64"])
@pytest.mark.parametrize("preserve", [0, 1, 3])
def test_warm_starts_give_the_same(backend: Backend, preserve: int, dtype: str) -> None:
    if backend.name.startswith("jax") and dtype != "float32":
        pytest.skip("compiled in float32 alone")
    values = weight((2, 24, 16), dtype)
    w = backend.array(values, dtype)
    nearby = backend.array(values + 0.01 * weight((2, 24, 16), dtype, seed=1), dtype)
    geometry = DENSE[2][1]

    def project(x: Any, v: Any = None) -> Any:
        got, info = project_stable_rank(
            x,
            geometry,
            target=2.5,
            preserve=preserve,
            state=None if v is None else {"v": v},
            return_info=True,
        )
        return got, info.state["v"], info.preserved

    first, v, count = backend.call(project, w)
    assert v.shape == (2, 16, 5 if preserve == 3 else 1)
    if preserve:
        squares = np.linalg.svd(values, compute_uv=False)[:, :preserve] ** 2
        fits = (np.cumsum(squares, axis=1) <= 2.5 * squares[:, :1]).sum(axis=1)
        np.testing.assert_array_equal(backend.numpy(count), fits)
    warm, again, _ = backend.call(project, nearby, v)
    assert again.shape == v.shape
    cold = specops_reference(backend.numpy(nearby), 2.5, preserve)
    np.testing.assert_allclose(
        backend.numpy(first), specops_reference(backend.numpy(w), 2.5, preserve), atol=2e-4
    )
    np.testing.assert_allclose(backend.numpy(warm), cold, atol=2e-2 if backend.traced else 2e-4)
    assert (ranks(backend.numpy(warm), geometry) <= 2.5 * (1 + 2e-6)).all()
    # A start that has nothing to do with the weight costs nearness, never feasibility.
    for bad in (0.0, np.nan):
        other = backend.array(np.full(v.shape, bad), dtype)
        got, _, _ = backend.call(project, nearby, other)
        assert (ranks(backend.numpy(got), geometry) <= 2.5 * (1 + 2e-6)).all()


def specops_reference(w: np.ndarray, target: float, preserve: int) -> np.ndarray:
    """Theorem 1 in double precision for a stack of matrices."""
    u, s, vh = np.linalg.svd(w.astype(np.result_type(w, np.float64)), full_matrices=False)
    out = []
    for values in s:
        squares = values**2
        kept = 1
        while kept < preserve and squares[: kept + 1].sum() <= target * squares[0]:
            kept += 1
        rest = np.sqrt(squares[kept:].sum())
        if preserve:
            first, other = 1.0, np.sqrt(target * squares[0] - squares[:kept].sum()) / rest
        else:
            gamma = np.sqrt(target - 1) * values[0] / rest
            other = (gamma + target - 1) / target
            first = other / gamma
        out.append(values * np.where(np.arange(len(values)) < kept, first, other))
    return (u * np.stack(out)[:, None, :]) @ vh


@pytest.mark.usefixtures("always_iterated")
def test_a_start_that_no_longer_leads_is_left() -> None:
    w = np.diag([1.0, 0.9, 0.8, 0.7])
    _, info = project_stable_rank(w, target=1.5, return_info=True)
    turned = np.diag([0.7, 0.8, 0.9, 1.0])
    got = project_stable_rank(turned, target=1.5, state=info.state)
    np.testing.assert_allclose(got, project_stable_rank(turned, target=1.5), atol=1e-9)
    assert got[3, 3] > 1.0


def test_states_of_another_shape_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    w = weight((6, 4))
    with pytest.raises(ValueError, match="state does not fit"):
        project_stable_rank(w, target=1.5, state={"v": np.ones((4, 1))})
    with pytest.raises(ValueError, match="state does not belong"):
        project_stable_rank(w, target=1.5, state={"other": np.ones((4, 1))})
    with pytest.raises(ValueError, match="takes no state"):
        project_stable_rank(weight((2, 2, 3)), Conv((4,)), target=3.0, state={"v": np.ones(8)})
    project_stable_rank(w, target=1.5, state={})
    monkeypatch.setattr(matrix_cone, "_ITERATE_ABOVE", 0)
    for bad in (np.ones((5, 1)), np.ones(4), 3.0):
        with pytest.raises(ValueError, match=r"take v of shape \(4, 1\): got"):
            project_stable_rank(w, target=1.5, state={"v": bad})


def test_zero_padded_kernels_start_warm() -> None:
    w = weight((6, 5, 3, 3)).astype(np.float32)
    geometry = Conv((12, 12))
    target = 0.7 * float(specops.stable_rank(w, geometry))
    _, info = project_stable_rank(w, geometry, target=target, return_info=True)
    assert info.state["v"].shape == (5 * 144,)
    nearby = w + np.float32(0.01) * weight(w.shape, seed=3).astype(np.float32)
    cold = project_stable_rank(nearby, geometry, target=target)
    warm = project_stable_rank(nearby, geometry, target=target, state=info.state)
    np.testing.assert_allclose(warm, cold, atol=1e-3)
    with pytest.raises(ValueError, match=r"takes a state v of shape \(720,\)"):
        project_stable_rank(w, geometry, target=target, state={"v": np.ones(3)})


def test_a_group_that_takes_the_lead_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel_direction, "SMALL_OPERATOR", 0)
    w = weight((6, 3, 3))
    geometry = Conv((6,), groups=2)
    w[:3] *= 3.0
    turned = w[[3, 4, 5, 0, 1, 2]]
    target = 0.8 * float(specops.stable_rank(w, geometry))
    got, info = project_stable_rank(w, geometry, target=target, return_info=True)
    warm = project_stable_rank(turned, geometry, target=target, state=info.state)
    np.testing.assert_allclose(warm[[3, 4, 5, 0, 1, 2]], got, atol=1e-6)
    bad = project_stable_rank(w, geometry, target=target, state={"v": np.full(36, np.nan)})
    np.testing.assert_allclose(bad, got, atol=1e-6)


def test_large_matrices_are_iterated_and_warm_starts_are_cheaper() -> None:
    rng = np.random.default_rng(0)
    w = rng.standard_normal((700, 500)).astype(np.float32)
    nearby = w + np.float32(0.003) * rng.standard_normal(w.shape).astype(np.float32)

    def timed(**options: Any) -> tuple[float, Any, Any]:
        best = float("inf")
        for _ in range(3):
            began = time.perf_counter()
            got, info = project_stable_rank(nearby, target=10.0, return_info=True, **options)
            best = min(best, time.perf_counter() - began)
        return best, got, info

    state = project_stable_rank(w, target=10.0, return_info=True)[1].state
    _, cold, _ = timed()
    _, warm, info = timed(state=state)
    np.testing.assert_allclose(warm, cold, atol=1e-3)
    assert float(info.rank_after) <= 10.0 * (1 + 1e-6)
    began = time.perf_counter()
    np.linalg.svd(nearby)
    assert timed(state=state)[0] < 0.5 * (time.perf_counter() - began)


def test_a_traced_target() -> None:
    jax = pytest.importorskip("jax")
    w = weight((6, 5))
    got = jax.jit(lambda x, r: project_stable_rank(x, target=r))(w, 1.5)
    np.testing.assert_allclose(got, project_stable_rank(w, target=1.5), atol=1e-12)
    k = weight((3, 3, 3))
    geometry = Conv((5,), boundary="circular")
    target = 0.9 * float(specops.stable_rank(k, geometry))
    got = jax.jit(lambda x, r: project_stable_rank(x, geometry, target=r))(k, target)
    assert ranks(np.asarray(got), geometry) <= target * (1 + 1e-12)


def test_traced_targets_below_every_kernel_give_the_least() -> None:
    jax = pytest.importorskip("jax")
    k = weight((4, 3, 3))
    for geometry in (Conv((9,), boundary="circular"), Conv((6,))):
        least = least_along(k, geometry)
        got = jax.jit(lambda x, g=geometry: project_stable_rank(x, g, target=1.0))(k)
        assert 1.0 < ranks(np.asarray(got), geometry) <= least * (1 + 1e-9)
        assert np.linalg.norm(got) > 0.1


def test_torch_vmap() -> None:
    torch = pytest.importorskip("torch")
    w = torch.asarray(weight((3, 6, 5)))
    got = torch.func.vmap(lambda x: project_stable_rank(x, target=1.5))(w)
    expected = project_stable_rank(w, Dense(out_axes=(1,), batch_axes=(0,)), target=1.5)
    np.testing.assert_allclose(got.numpy(), expected.numpy(), atol=1e-12)
