"""Stable rank projections as stored: twice is once, half precision, extreme scales, zero."""

from __future__ import annotations

import numpy as np
import pytest

import specops
from specops import Conv, Dense
from specops.geometry import Geometry
from specops.projections.stable_rank import project_stable_rank
from tests.backends import Backend
from tests.core.stable_ranks import (
    CONVS,
    DENSE,
    least_along,
    ranks,
    weight,
)


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
