"""Layers small enough to be decomposed are brought into their own ball, not that of a torus."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import specops
from specops import ClipSpectralNorm, Conv
from specops.errors import StateError
from specops.linalg.block_krylov import krylov_triplets
from specops.maps.explicit import ExplicitMap, small_explicit_map
from specops.projections.kernels import layer_cuts
from specops.training.report import measured_norm
from tests import oracle
from tests.backends import Backend, leave_to_others
from tests.core.nearest import norm, normal, slowly, squared, torus

ZEROS: list[tuple[tuple[int, ...], Conv]] = [
    ((4, 3, 3, 3), Conv((3, 3), padding=1)),
    ((2, 3, 7, 7), Conv((3, 3), padding=3)),
    ((3, 5, 3, 3), Conv((4, 4), padding=((0, 1), (2, 1)))),
    ((4, 2, 5, 5), Conv((5, 4), groups=2)),
    ((3, 2, 3, 3), Conv((7, 6), stride=2, padding=1)),
    ((2, 3, 3, 3), Conv((6, 7), dilation=2, padding=2)),
    ((3, 2, 4, 3), Conv((3, 4), transposed=True, stride=2, padding=1, layout="IO*")),
    ((3, 3, 2, 2), Conv((8, 8), layout="*IO")),
    ((2, 2, 3), Conv((5,), stride=2, boundary="circular")),
]
LARGER: list[tuple[tuple[int, ...], Conv]] = [
    ((2, 2, 3, 3), Conv((8, 8))),
    ((1, 3, 5, 5), Conv((12, 12))),
    ((2, 1, 7, 7), Conv((16, 16))),
]


def own_norm(w: np.ndarray, geometry: Conv) -> float:
    return float(oracle.spectrum(w.astype(float), geometry)[0])


def outside_of_the_torus_alone(dtype: str = "float64") -> tuple[np.ndarray, Conv, float]:
    """A kernel, its layer, and a bound between the layer's norm and that on the torus."""
    geometry = Conv((4, 4))
    w = normal((3, 2, 3, 3), 5).astype(dtype)
    own = own_norm(w, geometry)
    around = own_norm(w, torus(geometry, w.shape))
    assert around > 1.05 * own
    return w, geometry, 1.01 * own


@pytest.mark.parametrize(("shape", "geometry"), ZEROS + LARGER)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_the_layers_own_norm_is_the_bound(
    eager: Backend, shape: tuple[int, ...], geometry: Conv, dtype: str
) -> None:
    leave_to_others(eager, shape != ZEROS[0][0] or dtype == "float64")
    if not eager.doubles or "strict" in eager.name:
        pytest.skip("NumPy, torch and JAX see these")
    w = eager.array(normal(shape, 1), dtype)
    own = own_norm(eager.numpy(w), geometry)
    for share in (0.9, 0.5):
        bound = share * own
        got, info = specops.project_spectral_ball(
            w, bound, geometry, distance_tolerance=0.1, return_info=True
        )
        eager.same_kind(got, w)
        after = own_norm(eager.numpy(got), geometry)
        assert 0.97 * bound <= after <= bound * (1 + 1e-12)
        assert info.constrained == "layer"
        assert float(eager.numpy(info.norm_before)) == pytest.approx(own, rel=1e-6)
        assert float(eager.numpy(info.norm_after)) == pytest.approx(after, rel=1e-6)


def test_what_is_inside_stays_though_the_torus_around_is_outside(eager: Backend) -> None:
    leave_to_others(eager)
    w, geometry, bound = outside_of_the_torus_alone("float32")
    w = eager.array(w)
    got, info = specops.project_spectral_ball(w, bound, geometry, return_info=True)
    assert got is w
    assert float(eager.numpy(info.gap)) == info.iterations == 0
    same, rule_state, _ = ClipSpectralNorm(bound).update(w, geometry, {})
    assert same is w
    again, _, figures = ClipSpectralNorm(2.0 * bound).update(w, geometry, rule_state)
    assert again is w
    own = own_norm(eager.numpy(w), geometry)
    assert float(eager.numpy(figures["norm_before"])) == pytest.approx(own, rel=1e-3)


@pytest.mark.parametrize(
    ("shape", "geometry"),
    [
        ((2, 1, 7), Conv((3,))),
        ((4, 1, 3, 2), Conv((2, 3), groups=2)),
        ((2, 2, 4), Conv((7,), stride=2, padding=((1, 2),))),
    ],
)
@pytest.mark.parametrize("complex", [False, True])
def test_the_gap_holds_the_distance_to_the_nearest_kernel(
    shape: tuple[int, ...], geometry: Conv, complex: bool
) -> None:
    read = oracle.only_read(np.ones(shape), geometry)
    w = normal(shape, 2, complex=complex)
    bound = 0.6 * norm(w, geometry)
    truth, error = slowly(oracle.only_read(w, geometry), geometry, bound)
    truth = np.where(read, truth, w)
    for tolerance in (1e-2, 1e-8):
        got, info = specops.project_spectral_ball(
            w, bound, geometry, gap_tolerance=tolerance, return_info=True
        )
        certified = (float(info.gap) + 1e-13) * squared(w)
        assert np.sqrt(squared(got - truth)) <= np.sqrt(certified) + np.sqrt(error)
        assert float(info.gap) <= tolerance * (1 + 1e-9)
        np.testing.assert_array_equal(got[read == 0], w[read == 0])


def test_other_methods_stay_on_the_torus_and_say_so() -> None:
    w, geometry, bound = outside_of_the_torus_alone()
    around = torus(geometry, w.shape)
    for method in ("accelerated", "dykstra", "alternating"):
        got, info = specops.project_spectral_ball(
            w, bound, geometry, method=method, return_info=True
        )
        assert info.constrained == "torus"
        assert own_norm(got, around) == pytest.approx(bound, rel=1e-2)
        assert squared(got - w) > 0
    _, info = specops.project_spectral_ball(w, bound, around, return_info=True)
    assert info.constrained == "layer"


@pytest.mark.slow
def test_large_layers_stay_on_the_torus() -> None:
    w, geometry = normal((16, 16, 3, 3), 3).astype("float32"), Conv((16, 16))
    assert small_explicit_map(geometry.sizes(w.shape)) is None
    got, info = specops.project_spectral_ball(w, 15.0, geometry, return_info=True)
    assert info.constrained == "torus"
    assert measured_norm(got, geometry)["norm_is"] == "upper bound"
    assert measured_norm(got[:2, :2], geometry)["norm_is"] == "exact"


@pytest.mark.parametrize(("shape", "geometry"), ZEROS)
def test_explicit_maps_are_the_operator(shape: tuple[int, ...], geometry: Conv) -> None:
    w, sizes = normal(shape, 4), geometry.sizes(shape)
    layer = ExplicitMap(sizes)
    kernel = geometry.kernel(w)
    matrices = layer.matrices(kernel)
    values = np.sort(np.linalg.svd(matrices, compute_uv=False).reshape(-1))[::-1]
    np.testing.assert_allclose(values, oracle.spectrum(w, geometry)[: len(values)], atol=1e-12)
    z = normal(matrices.shape, 5)
    assert np.vdot(z, matrices) == pytest.approx(np.vdot(layer.gather(z), kernel))
    np.testing.assert_allclose(layer.gather(matrices), kernel * layer.uses, atol=1e-12)
    u, v = normal((1, layer.shape[0]), 6), normal((1, layer.shape[1]), 7)
    first = layer.gather(
        np.concatenate([u.T * v, 0 * matrices[:-1].reshape(-1, v.size)]).reshape(matrices.shape)
    )[0]
    np.testing.assert_allclose(layer.normals(u, v)[0], first.reshape(-1), atol=1e-12)


def test_a_warm_start_takes_a_round() -> None:
    w, geometry = normal((8, 8, 3, 3), 8), Conv((4, 4))
    bound = 0.7 * own_norm(w, geometry)
    options: dict[str, Any] = {"distance_tolerance": 0.1, "return_info": True}
    _, cold = specops.project_spectral_ball(w, bound, geometry, **options)
    _, warm = specops.project_spectral_ball(w * 1.01, bound, geometry, state=cold.state, **options)
    assert warm.iterations < cold.iterations
    assert warm.iterations <= 2


@pytest.mark.parametrize(
    "damage",
    [
        {"left": np.full((2, 48), np.nan)},
        {"group": np.array([0, 1])},
        {"right": np.ones((2, 31))},
        {"left": np.ones((2, 48)) * 1j},
        {"frequency": np.zeros(2)},
        {"weight": np.ones((2, 1))},
    ],
)
def test_bad_states_are_refused(damage: dict[str, np.ndarray]) -> None:
    w, geometry, bound = outside_of_the_torus_alone()
    good = {
        "group": np.zeros(2),
        "left": np.ones((2, 48)),
        "right": np.ones((2, 32)),
        "weight": np.ones(2),
    }
    specops.project_spectral_ball(w, bound, geometry, state=good)
    with pytest.raises(StateError):
        specops.project_spectral_ball(w, bound, geometry, state=good | damage)


@pytest.mark.parametrize("share", [0.9, 0.4])
def test_larger_matrices_are_looked_through_for_leading_values_only(
    monkeypatch: pytest.MonkeyPatch, share: float
) -> None:
    monkeypatch.setattr(layer_cuts, "KRYLOV_FROM", 30)
    monkeypatch.setattr(layer_cuts, "_WIDTH", 4)
    monkeypatch.setattr(layer_cuts, "_DEPTH", 4)
    w, geometry = normal((8, 8, 3, 3), 9), Conv((3, 3))
    bound = share * own_norm(w, geometry)
    got, info = specops.project_spectral_ball(
        w, bound, geometry, distance_tolerance=0.1, return_info=True
    )
    assert 0.97 * bound <= own_norm(got, geometry) <= bound * (1 + 1e-12)
    moved = squared(got - w)
    assert moved <= 1.21 * (moved - float(info.gap) * squared(w)) * (1 + 1e-9)


def test_where_many_cuts_are_active_admm_goes_on() -> None:
    w, geometry = normal((6, 6, 7, 7), 10), Conv((3, 3))
    bound = 0.4 * own_norm(w, geometry)
    _, planes = specops.project_spectral_ball(
        w, bound, geometry, method="cutting-planes", iterations=30, return_info=True
    )
    got, info = specops.project_spectral_ball(w, bound, geometry, iterations=30, return_info=True)
    assert float(info.gap) < 0.5 * float(planes.gap)
    assert own_norm(got, geometry) == pytest.approx(bound, rel=1e-6)


def test_a_state_outlives_a_weight_that_diverges() -> None:
    geometry, w = Conv((4, 4)), normal((3, 3, 3, 3), 2)
    bound = 0.8 * norm(w, geometry)
    state = specops.project_spectral_ball(w, bound, geometry, return_info=True)[1].state
    assert state
    far, info = specops.project_spectral_ball(
        1e9 * w, bound, geometry, state=state, return_info=True
    )
    assert info.constrained == "torus"
    assert norm(far, geometry) <= bound * (1 + 1e-12)
    near = specops.project_spectral_ball(w, bound, geometry, state=info.state)
    assert norm(near, geometry) <= bound * (1 + 1e-12)


@pytest.mark.parametrize("size", [1e-300, 1e-30, 1e30, 1e300])
def test_any_size(size: float) -> None:
    w, geometry, bound = outside_of_the_torus_alone()
    got = specops.project_spectral_ball(w, 0.5 * bound, geometry, gap_tolerance=1e-8)
    scaled = specops.project_spectral_ball(
        w * size, 0.5 * bound * size, geometry, gap_tolerance=1e-8
    )
    np.testing.assert_allclose(scaled / size, got, rtol=1e-6)
    assert specops.project_spectral_ball(w * size, 1e308, geometry) is not None
    far = specops.project_spectral_ball(w * size, 1e-9 * size, geometry)
    assert 0 < own_norm(far / size, geometry) <= 1e-9 * (1 + 1e-12)


def test_leading_triplets_of_a_block_krylov_space() -> None:
    a = normal((40, 30), 11)
    u, s, v = krylov_triplets(a, normal((30, 3), 12), 7)
    expected = np.linalg.svd(a, compute_uv=False)
    assert (s <= expected[: len(s)] * (1 + 1e-12)).all()
    np.testing.assert_allclose(s[:2], expected[:2], rtol=1e-4)
    np.testing.assert_allclose(a @ v, u * s, atol=1e-12)
    np.testing.assert_allclose(v.T @ v, np.eye(len(s)), atol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize(("shape", "geometry"), [((36, 36, 3, 3), Conv((4, 4)))])
def test_where_no_distance_is_tolerated_layers_of_middle_size_are_constrained_themselves(
    shape: tuple[int, ...], geometry: Conv
) -> None:
    w = normal(shape, 9)
    own = own_norm(w, geometry)
    got, info = specops.project_spectral_ball(w, 0.95 * own, geometry, return_info=True)
    assert info.constrained == "layer"
    assert own_norm(got, geometry) == pytest.approx(0.95 * own, rel=1e-9)
    assert float(info.gap) <= 1e-4
    hurried, info = specops.project_spectral_ball(
        w, 0.95 * own, geometry, distance_tolerance=0.1, return_info=True
    )
    assert info.constrained == "torus"
    assert squared(got - w) < 0.25 * squared(hurried - w)
    assert specops.project_spectral_ball(w, 1.01 * own, geometry) is w


def test_a_report_does_not_lift_a_layer_of_middle_size_above_its_bound() -> None:
    w, geometry = normal((36, 36, 3, 3), 13), Conv((4, 4))
    own = float(specops.spectral_norm(w, geometry))
    assert measured_norm(w, geometry) == {"norm": pytest.approx(own), "norm_is": "exact"}


def test_states_outlive_a_change_of_the_tolerance() -> None:
    """It decides whether this layer is constrained itself, or a torus around it."""
    geometry, w = Conv((2, 3)), normal((90, 90, 3, 3), 1)
    bound = 0.95 * own_norm(w, geometry)
    state = None
    for tolerance, constrained in ((0.1, "torus"), (0.0, "layer"), (0.1, "torus")):
        near, info = specops.project_spectral_ball(
            w, bound, geometry, distance_tolerance=tolerance, state=state, return_info=True
        )
        assert info.constrained == constrained
        assert own_norm(near, geometry) <= bound * (1 + 1e-9)
        state = info.state
        assert state
