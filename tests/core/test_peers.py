"""Defects that were found in other libraries' formulas: each of these would fail there."""

from __future__ import annotations

import numpy as np
import pytest

import specops
from specops import Conv, Dense, errors
from tests import oracle


def reshaped_norm(w: np.ndarray) -> float:
    return float(np.linalg.norm(w.reshape(len(w), -1), 2))


def test_groups_are_not_multiplied() -> None:
    w = np.random.default_rng(0).standard_normal((4, 2, 3, 3))
    geometry = Conv((8, 8), groups=2, boundary="circular")
    halves = [
        float(specops.spectral_norm(half, Conv((8, 8), boundary="circular")))
        for half in (w[:2], w[2:])
    ]
    truth = oracle.spectrum(w, geometry)[0]
    assert float(specops.spectral_norm(w, geometry)) == pytest.approx(truth)
    assert max(halves) == pytest.approx(truth)
    assert np.prod(halves) > 2 * truth


def test_reflection_is_refused_and_zero_padding_is_what_is_certified() -> None:
    with pytest.raises(errors.GeometryError, match="no convolution on a torus"):
        Conv((16,), boundary="reflect")
    # Averaging with reflection has norm above 1; with zeros it has not.
    w = np.array([[[0.25, 0.5, 0.25]]])
    n = 16
    reflected = np.zeros((n, n))
    for i in range(n):
        for a in (-1, 0, 1):
            j = abs(i + a)
            reflected[i, 2 * n - 2 - j if j >= n else j] += w[0, 0, a + 1]
    assert np.linalg.norm(reflected, 2) > 1.0
    assert float(specops.spectral_norm_bounds(w, Conv((n,))).upper) <= 1.0 + 1e-9


def test_the_norm_at_the_kernels_own_size_is_no_bound() -> None:
    violated = 0
    for seed in range(20):
        w = np.random.default_rng(seed).standard_normal((3, 3, 3, 3))
        small = float(specops.spectral_norm(w, Conv((3, 3), boundary="circular")))
        large = float(specops.spectral_norm(w, Conv((32, 32), boundary="circular")))
        violated += small < large * (1 - 1e-6)
        assert large <= float(specops.spectral_norm_bounds(w, Conv(None)).upper)
    assert violated > 10


def test_one_clip_and_crop_round_is_not_feasible_and_ours_is() -> None:
    w = np.random.default_rng(0).standard_normal((4, 4, 3, 3))
    geometry = Conv((16, 16), boundary="circular")
    c = 0.5 * float(specops.spectral_norm(w, geometry))
    transforms = np.fft.fft2(w, (16, 16), axes=(2, 3)).transpose(2, 3, 0, 1)
    u, s, vh = np.linalg.svd(transforms, full_matrices=False)
    clipped = (u * np.minimum(s, c)[..., None, :]) @ vh
    cropped = np.fft.ifft2(clipped.transpose(2, 3, 0, 1), axes=(2, 3)).real[:, :, :3, :3]
    assert float(specops.spectral_norm(cropped, geometry)) > 1.05 * c
    ours = specops.project_spectral_ball(w, c, geometry)
    assert oracle.spectrum(ours, Conv((6, 6), boundary="circular")).size
    assert float(specops.spectral_norm(ours, geometry)) <= c


def test_clipping_does_not_overshoot() -> None:
    rng = np.random.default_rng(0)
    for shape in ((30, 30), (20, 50)):
        for scale in (1.01, 2.0, 50.0):
            w = rng.standard_normal(shape)
            w *= scale / np.linalg.norm(w, 2)
            got = specops.project_spectral_ball(w.astype(np.float32), 1.0)
            assert np.linalg.norm(got.astype(float), 2) <= 1.0 + 1e-6


def test_reshaped_norm_one_is_not_a_contraction() -> None:
    w = np.ones((1, 1, 7, 7))
    w /= reshaped_norm(w)
    assert float(specops.spectral_norm(w, Dense())) == pytest.approx(1.0)
    assert float(specops.spectral_norm(w, Conv((32, 32), boundary="circular"))) > 5.0


def test_kernels_that_wrap_are_not_truncated() -> None:
    w = np.random.default_rng(0).standard_normal((2, 2, 5, 5))
    geometry = Conv((3, 3), boundary="circular")
    truth = oracle.spectrum(w, geometry)[0]
    truncated = np.linalg.svd(np.fft.fft2(w, (3, 3), axes=(2, 3)).transpose(2, 3, 0, 1))[1].max()
    assert float(specops.spectral_norm(w, geometry)) == pytest.approx(truth)
    assert abs(truncated - truth) > 0.05 * truth


def test_measuring_and_projecting_change_no_argument() -> None:
    torch = pytest.importorskip("torch")
    w = torch.randn(4, 4, 3, 3)
    before = w.clone()
    for geometry in (Dense(), Conv((6, 6)), Conv((6, 6), boundary="circular")):
        specops.singular_values(w, geometry)
        specops.spectral_norm(w, geometry)
        specops.stable_rank(w, geometry)
        specops.project_spectral_ball(w, 0.1, geometry)
        assert torch.equal(w, before)
