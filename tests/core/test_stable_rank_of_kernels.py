"""Stable rank projections of kernels: nearest in a cone, and feasible by the explicit matrix."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import assume, given

import specops
from specops import Conv
from specops.projections.kernels import cone as kernel_cone
from specops.projections.stable_rank import project_stable_rank
from tests import oracle
from tests.backends import Backend
from tests.core.stable_ranks import (
    CONVS,
    assert_nearest_in_cone,
    axis_and_gram,
    coordinates,
    least_along,
    least_rank,
    nearest_along,
    ranks,
    weight,
)
from tests.strategies import Case, convolutions


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


@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.mark.slow
def test_targets_below_every_kernel_say_what_is_feasible() -> None:
    k = weight((4, 3, 3, 3))
    for geometry in (Conv((9, 9), boundary="circular"), Conv((9, 9))):
        least = least_rank(k, geometry)
        assert least_along(k, geometry) == pytest.approx(least)
        assert least >= 9.0 - 1e-9 or geometry.boundary == "zeros"
        text = rf"target=2.0 is below {least:.3g}\d*, the least .* 3×3 kernel .* to 243"
        with pytest.raises(ValueError, match=text):
            project_stable_rank(k, geometry, target=2.0)
        lowest = project_stable_rank(k, geometry, ratio=0.01)
        assert ranks(lowest, geometry) == pytest.approx(least, rel=1e-3)
        got = project_stable_rank(k, geometry, target=least * (1 + 1e-9))
        assert ranks(got, geometry) <= least * (1 + 1e-8)


def test_one_ratio_serves_layers_whose_kernels_cannot_have_so_little() -> None:
    """A 1×1 kernel is the same matrix at every point: 36 times the stable rank of that."""
    w, geometry = weight((4, 3, 1, 1)), Conv((6, 6))
    got, info = project_stable_rank(w, geometry, ratio=0.1, return_info=True)
    assert ranks(got, geometry) == pytest.approx(36.0)
    assert info.rank_after == pytest.approx(36.0)
    matrix = project_stable_rank(w[..., 0, 0], ratio=0.1)
    np.testing.assert_allclose(got[..., 0, 0], matrix, atol=1e-12)
    again, _ = project_stable_rank(got, geometry, ratio=0.1, return_info=True, state=info.state)
    assert again is got
