"""Contractions of channels: into the ball of every block, and nearer than scaling."""

from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

import specops
from specops import Conv
from specops.maps.every_size import certified_symbol
from specops.projections.kernels.contraction import contracted
from specops.projections.kernels.excess import excess
from specops.projections.kernels.support import Support
from tests.core.nearest import normal, squared

MAPS = {
    "square": (Conv((8, 9), boundary="circular"), (5, 5, 3, 3)),
    "wide": (Conv((7,), boundary="circular"), (3, 6, 3)),
    "tall": (Conv((7,), boundary="circular"), (6, 3, 3)),
    "strided": (Conv((8, 8), stride=2, boundary="circular"), (4, 3, 3, 3)),
    "transposed": (Conv((8, 8), stride=2, transposed=True, boundary="circular"), (3, 4, 3, 3)),
    "groups": (Conv((6, 6), groups=2, boundary="circular"), (6, 2, 3, 3)),
    "wrapped": (Conv((2, 3), boundary="circular"), (4, 3, 3, 5)),
    "dilated": (Conv((8, 6), dilation=(2, 1), boundary="circular"), (4, 4, 3, 2)),
}


def support_of(name: str, *, real: bool = True) -> tuple[Support, Any, tuple[int, ...]]:
    geometry, shape = MAPS[name]
    return Support(certified_symbol(geometry.sizes(shape), real)[0]), geometry, shape


@given(
    name=st.sampled_from(sorted(MAPS)),
    share=st.floats(0.01, 1.1),
    seed=st.integers(0, 1000),
    dtype=st.sampled_from(["float64", "float32", "complex128", "complex64"]),
)
def test_every_block_is_inside(name: str, share: float, seed: int, dtype: str) -> None:
    support, geometry, shape = support_of(name, real=dtype.startswith("float"))
    w = normal(shape, seed, complex=dtype.startswith("complex"))
    x = support.coordinates(np, geometry.kernel(w)).astype(dtype)
    limit = share * float(specops.spectral_norm(w, geometry))
    now = excess(support, x, limit)
    assert now.powers is not None
    inside = contracted(support, x, now.powers)
    got = geometry.weight(support.kernel(np, inside)).astype(np.result_type(dtype, float))
    slack = 1e-11 if dtype in ("float64", "complex128") else 1e-5
    assert float(specops.spectral_norm(got, geometry)) <= limit * (1 + slack)
    if share > 1.0:
        assert np.array_equal(inside, x)


def test_phases_of_a_stride_are_no_channels() -> None:
    """Shrinking them would fill taps that the kernel has not."""
    geometry, shape = Conv((8, 8), stride=2, boundary="circular"), (16, 1, 3, 3)
    support = Support(certified_symbol(geometry.sizes(shape), True)[0])
    w = normal(shape, 3)
    limit = 0.5 * float(specops.spectral_norm(w, geometry))
    assert excess(support, support.coordinates(np, geometry.kernel(w)), limit).powers is None
    got, info = specops.project_spectral_ball(
        w, limit, geometry, distance_tolerance=0.1, return_info=True
    )
    assert float(specops.spectral_norm(got, geometry)) <= limit * (1 + 1e-12)
    assert squared(w - got) <= 1.21 * (squared(w - got) - float(info.gap) * squared(w)) * 1.001


def test_one_direction_of_the_channels_is_shrunk_alone() -> None:
    """Where scaling would take as much from all."""
    channels, geometry = 16, Conv((8, 8), boundary="circular")
    u, v = (np.linalg.qr(normal((channels, channels), seed))[0] for seed in (1, 2))
    sigma = np.full(channels, 0.9)
    sigma[0] = 3.0
    w = np.zeros((channels, channels, 3, 3))
    w[:, :, 1, 1] = (u * sigma) @ v.T
    support = Support(certified_symbol(geometry.sizes(w.shape), True)[0])
    x = support.coordinates(np, geometry.kernel(w))
    now = excess(support, x, 1.0)
    assert now.powers is not None
    got = geometry.weight(support.kernel(np, contracted(support, x, now.powers)))[:, :, 1, 1]
    inner = u.T @ got @ v
    # Of 64 blocks each says the same: (Σ E⁴)^(1/4) is 64^(1/4) times as much as one of them.
    inner[0, 0] -= 3.0 / np.sqrt(1.0 + 64**0.25 * 8.0)
    # Rounding enters by its fourth root.
    assert np.allclose(inner, np.diag([0.0, *sigma[1:]]), atol=2e-3)
