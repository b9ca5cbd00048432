"""Layers of a single output: the last layers of many networks that tell classes apart."""

from __future__ import annotations

import numpy as np
import pytest

import specops
from specops import Conv
from tests.backends import Backend


@pytest.mark.parametrize("seed", range(4))
def test_the_norm_is_that_of_the_kernel(eager: Backend, seed: int) -> None:
    """The start of the iteration was zero for half of the kernels, and so was their norm."""
    w = np.random.default_rng(seed).standard_normal((1, 2048, 4, 9))
    layer, norm = Conv((4, 9), padding="valid"), float(np.linalg.norm(w))
    given = eager.array(w)
    assert float(specops.spectral_norm(given, layer)) == pytest.approx(norm, rel=1e-5)
    assert float(specops.stable_rank(given, layer)) == pytest.approx(1.0, rel=1e-5)
    assert float(specops.spectral_norm_bounds(given, layer).lower) >= 0.9 * norm
