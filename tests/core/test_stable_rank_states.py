"""States of stable rank projections: warm starts, and which states are refused."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import pytest

import specops
from specops import Conv
from specops.projections.kernels import leading_direction as kernel_direction
from specops.projections.matrices import cone as matrix_cone
from specops.projections.stable_rank import project_stable_rank
from tests.backends import Backend, leave_to_others
from tests.core.stable_ranks import (
    DENSE,
    ranks,
    weight,
)


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
    leave_to_others(backend, preserve < 3)
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
    cold = by_the_theorem(backend.numpy(nearby), 2.5, preserve)
    np.testing.assert_allclose(
        backend.numpy(first), by_the_theorem(backend.numpy(w), 2.5, preserve), atol=2e-4
    )
    np.testing.assert_allclose(backend.numpy(warm), cold, atol=2e-2 if backend.traced else 2e-4)
    assert (ranks(backend.numpy(warm), geometry) <= 2.5 * (1 + 2e-6)).all()
    # A start that has nothing to do with the weight costs nearness, never feasibility.
    for bad in (0.0, np.nan):
        other = backend.array(np.full(v.shape, bad), dtype)
        got, _, _ = backend.call(project, nearby, other)
        assert (ranks(backend.numpy(got), geometry) <= 2.5 * (1 + 2e-6)).all()


def by_the_theorem(w: np.ndarray, target: float, preserve: int) -> np.ndarray:
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
            began = time.process_time()
            got, info = project_stable_rank(nearby, target=10.0, return_info=True, **options)
            best = min(best, time.process_time() - began)
        return best, got, info

    state = project_stable_rank(w, target=10.0, return_info=True)[1].state
    _, cold, _ = timed()
    _, warm, info = timed(state=state)
    np.testing.assert_allclose(warm, cold, atol=1e-3)
    assert float(info.rank_after) <= 10.0 * (1 + 1e-6)
    began = time.process_time()
    np.linalg.svd(nearby)
    assert timed(state=state)[0] < 0.5 * (time.process_time() - began)
