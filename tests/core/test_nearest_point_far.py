"""Nearest points far outside the ball, by two half-spaces a round: certificates and states."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import specops
from specops import Conv
from specops.maps.symbol import Symbol
from specops.projections.kernels import stabilised_planes
from specops.projections.kernels.excess import excess
from specops.projections.kernels.support import Support
from tests.core.nearest import normal, squared

FAR = Conv((16, 16), boundary="circular")
SHAPE = (8, 8, 3, 3)
"""2048 singular values at c → 0, in 130 blocks."""


def norm(w: np.ndarray) -> float:
    return float(specops.spectral_norm(w, FAR))


@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.complex64])
@pytest.mark.parametrize("share", [0.7, 0.5, 0.25, 0.05])
def test_far_weights_take_few_rounds(dtype: Any, share: float) -> None:
    w = normal(SHAPE, 3, complex=np.dtype(dtype).kind == "c").astype(dtype)
    size = norm(w.astype(np.result_type(dtype, float)))
    got, info = specops.project_spectral_ball(
        w, share * size, FAR, distance_tolerance=0.1, return_info=True
    )
    got = got.astype(np.result_type(dtype, float))
    assert info.iterations <= 9
    assert norm(got) <= share * size * (1 + 1e-12)
    assert float(info.norm_before) == pytest.approx(size, rel=1e-5)
    assert float(info.norm_after) == pytest.approx(norm(got), rel=1e-5)
    moved = squared(w - got)
    nearest = moved - float(info.gap) * squared(w.astype(got.dtype))
    assert moved <= 1.21 * nearest * (1 + 2e-3)


@pytest.mark.parametrize(
    ("geometry", "shape"),
    [
        (FAR, SHAPE),
        (Conv((33,), boundary="circular"), (6, 5, 3)),
        (Conv((32, 24), stride=2, boundary="circular"), (4, 3, 3, 3)),
        (Conv((40, 12), dilation=(4, 1), boundary="circular"), (4, 4, 5, 2)),
        (Conv((17, 17), groups=2, boundary="circular"), (4, 3, 3, 3)),
    ],
)
def test_half_spaces_of_a_sample_hold_for_all(geometry: Conv, shape: tuple[int, ...]) -> None:
    w = normal(shape, 3)
    sizes = geometry.sizes(shape)
    assert geometry.grid is not None
    support = Support(Symbol(sizes, geometry.grid, True))
    sample = support.sample
    assert 0 < len(sample) <= 0.6 * len(support.symbol.frequencies)
    x = support.coordinates(np, geometry.kernel(w))
    limit = 0.5 * float(specops.spectral_norm(w, geometry))
    part, whole = excess(support, x, limit, sample), excess(support, x, limit)
    assert part.near is None
    assert part.top <= whole.top * (1 + 1e-12)
    (direction, nuclear), alone = whole.planes
    assert part.planes[0][1] == pytest.approx(nuclear, rel=0.25)
    apart = np.linalg.norm(part.planes[0][0] - direction)
    assert apart <= 0.35 * np.linalg.norm(direction)
    # The block that is farthest out: a whole of its own, and part of that of all.
    assert 0 < alone[1] < nuclear
    assert 0 < np.sum(alone[0] * direction) < np.sum(direction**2)
    for seed in range(20):
        inside = normal(shape, 10 + seed) if seed else w
        inside = inside * (limit / float(specops.spectral_norm(inside, geometry)))
        inside = support.coordinates(np, geometry.kernel(inside))
        for direction, nuclear in (*part.planes, *whole.planes):
            assert np.sum(inside * direction) <= limit * nuclear * (1 + 1e-12)


def test_warm_starts_from_the_sum_of_half_spaces(monkeypatch: pytest.MonkeyPatch) -> None:
    w = normal(SHAPE, 3)
    bound = 0.5 * norm(w)
    looked: list[Any] = []

    def counted(*arguments: Any) -> Any:
        looked.append(arguments)
        return excess(*arguments)

    monkeypatch.setattr(stabilised_planes, "excess", counted)
    options: dict[str, Any] = {"distance_tolerance": 0.1, "return_info": True}
    far, cold = specops.project_spectral_ball(w, bound, FAR, **options)
    looked_cold, looked[:] = len(looked), []
    assert set(cold.state) == {"direction", "nuclear", "taps"}
    near = w + 1e-2 * normal(SHAPE, 4)
    got, warm = specops.project_spectral_ball(near, bound, FAR, state=cold.state, **options)
    assert warm.iterations <= 2
    assert 0 < len(looked) < looked_cold
    assert norm(got) <= bound * (1 + 1e-12)
    # A state of no use does no harm: another kernel, one just outside, one inside.
    other = -normal(SHAPE, 5)
    for weight in (other, far * 1.01):
        got, info = specops.project_spectral_ball(weight, bound, FAR, state=cold.state, **options)
        fresh, _ = specops.project_spectral_ball(weight, bound, FAR, **options)
        gap = float(info.gap) * squared(weight)
        assert norm(got) <= bound * (1 + 1e-12)
        assert squared(weight - got) - gap <= squared(weight - fresh) * (1 + 1e-12)
    kept, info = specops.project_spectral_ball(0.1 * w, bound, FAR, state=cold.state, **options)
    assert np.array_equal(kept, 0.1 * w)
    assert set(info.state) == set(cold.state)


BAD_STATES: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "incomplete": lambda state: {k: v for k, v in state.items() if k != "nuclear"},
    "another grid": lambda state: {**state, "taps": state["taps"] + 1},
    "short": lambda state: {**state, "direction": state["direction"][:-1]},
    "complex": lambda state: {**state, "direction": 1j * state["direction"]},
    "NaN": lambda state: {**state, "direction": np.nan * state["direction"]},
    "infinite": lambda state: {**state, "nuclear": np.asarray(np.inf)},
    "upright": lambda state: {**state, "nuclear": state["nuclear"][None]},
    "not arrays": lambda state: {**state, "nuclear": "1"},
}


@pytest.mark.parametrize("name", BAD_STATES)
def test_bad_states_are_refused(name: str) -> None:
    w = normal(SHAPE, 3)
    bound = 0.3 * norm(w)
    options: dict[str, Any] = {"distance_tolerance": 0.1, "return_info": True}
    _, info = specops.project_spectral_ball(w, bound, FAR, **options)
    with pytest.raises(ValueError, match="state"):
        specops.project_spectral_ball(w, bound, FAR, state=BAD_STATES[name](info.state), **options)


def test_a_state_of_another_dilation_is_refused() -> None:
    w = normal(SHAPE, 3)
    bound = 0.3 * norm(w)
    options: dict[str, Any] = {"distance_tolerance": 0.1, "return_info": True}
    _, info = specops.project_spectral_ball(w, bound, FAR, **options)
    wide = Conv((16, 16), dilation=2, boundary="circular")
    with pytest.raises(ValueError, match="another kernel or grid"):
        specops.project_spectral_ball(w, bound, wide, state=info.state, **options)


@pytest.mark.slow
def test_compiled_rounds_end_where_the_distance_is_certified() -> None:
    jax = pytest.importorskip("jax")
    w = normal(SHAPE, 3).astype(np.float32)
    top = norm(w.astype(float))

    def project(w: Any, share: float, **options: Any) -> Any:
        options = {"distance_tolerance": 0.1, **options}
        new, info = specops.project_spectral_ball(w, share * top, FAR, return_info=True, **options)
        return new, info.gap, info.iterations

    static = ("iterations", "distance_tolerance")
    compiled = jax.jit(project, static_argnums=1, static_argnames=static)
    for share, most in ((1e-6, 1), (0.25, 4), (0.5, 6), (0.9, 9)):
        new, gap, rounds = compiled(w, share)
        assert norm(np.asarray(new, float)) == pytest.approx(share * top, rel=1e-6)
        moved = squared(w - np.asarray(new))
        assert 0 < int(rounds) <= most
        assert moved <= 1.21 * (moved - float(gap) * squared(w)) * (1 + 1e-3)
    assert int(compiled(w, 1.001)[2]) == 0
    assert int(compiled(w, 0.25, iterations=8)[2]) == 8
    assert int(compiled(w, 0.25, distance_tolerance=0.0)[2]) == 20
    # A loop that ends early can still be differentiated, along any direction.
    with jax.enable_x64(True):
        x, direction = normal(SHAPE, 3), normal(SHAPE, 5)
        value = jax.jit(lambda x: jax.numpy.vdot(direction, project(x, 0.5)[0]))
        slope = float(np.vdot(np.asarray(jax.grad(value)(x)), x))
        step = 1e-5
        expected = (float(value(x * (1 + step))) - float(value(x * (1 - step)))) / (2 * step)
    assert slope == pytest.approx(expected, rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("excess_of_norm", [1e-4, 1e-3])
def test_compiled_rounds_just_outside_go_on_until_they_are_near(excess_of_norm: float) -> None:
    """In single precision, where what moves is near the rounding of what does not."""
    jax = pytest.importorskip("jax")
    w = normal((16, 16, 3, 3), 2).astype(np.float32)
    bound = norm(w.astype(float)) * (1 - excess_of_norm)
    best = specops.project_spectral_ball(w.astype(float), bound, FAR, gap_tolerance=1e-14)

    def project(w: Any) -> Any:
        new, info = specops.project_spectral_ball(
            w, bound, FAR, distance_tolerance=0.1, return_info=True
        )
        return new, info.gap

    new, gap = jax.jit(project)(w)
    nearest = squared(w.astype(float) - best)
    assert squared(np.asarray(new, float) - w) <= 1.21 * nearest
    assert squared(np.asarray(new, float) - best) <= float(gap) * squared(w) * 1.01 + 1e-9
