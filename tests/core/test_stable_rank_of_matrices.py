"""Stable rank projections of matrices: nearest, and feasible by the explicit matrix."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given

from specops import Dense, errors
from specops.geometry import Geometry
from specops.projections.stable_rank import project_stable_rank
from tests import oracle
from tests.backends import Backend, leave_to_others
from tests.core.stable_ranks import (
    DENSE,
    achieved,
    ranks,
    weight,
)
from tests.strategies import Case, denses


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

    x = feasible(w + rng.standard_normal((100, *shape)))
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
    leave_to_others(backend, geometry not in (DENSE[0][1], DENSE[3][1]) or dtype == "complex64")
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
