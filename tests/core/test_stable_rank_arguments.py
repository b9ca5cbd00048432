"""Arguments of stable rank projections: ratios, targets, traced ones, and what is refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import specops
from specops import Conv, Dense, errors
from specops.projections.stable_rank import project_stable_rank
from tests import oracle
from tests.core.stable_ranks import (
    CONVS,
    DENSE,
    least_along,
    ranks,
    weight,
)


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
