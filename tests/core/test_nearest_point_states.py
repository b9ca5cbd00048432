"""States of nearest points: what a warm start saves, and which states are refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import specops
from specops import Conv
from tests.backends import Backend
from tests.core.nearest import (
    LAYERS,
    ROUNDING,
    SINGLE,
    clipped,
    few_above,
    norm,
    normal,
    squared,
)


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
        pytest.skip("one compilation of each step is enough")
    rounding = 1e-11 if eager.doubles else 3e-6
    turn = (lambda m: m.T.copy()) if transpose else (lambda m: m)
    w = turn(few_above(64, 48))
    _, info = specops.project_spectral_ball(eager.array(w), 1.0, return_info=True)
    assert info.state
    weights = {
        "near": w + 1e-4 * normal(w.shape, 16),
        "other": turn(few_above(64, 48, seed=17)),
        "more above than the start holds": turn(few_above(64, 48, above=30, seed=18)),
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
    w = few_above(64, 48)
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


@pytest.mark.parametrize("project", ["project_spectral_ball", "project_stable_rank"])
@pytest.mark.parametrize(
    "wrong", ["info", 5, [np.eye(3)], np.eye(3)], ids=lambda x: type(x).__name__
)
def test_a_state_is_a_dict(project: str, wrong: Any) -> None:
    bound = {"max_norm": 0.5} if project == "project_spectral_ball" else {"ratio": 0.5}
    w = np.diag([3.0, 2.0, 1.0])
    act = getattr(specops, project)
    given = act(w, **bound, return_info=True)[1] if isinstance(wrong, str) else wrong
    message = rf"state must be None or a dict, .*info\.state.*, got {type(given).__name__}"
    with pytest.raises(specops.errors.StateError, match=message):
        act(w, **bound, state=given)
