"""Compiled screens of clips: what is loaded into a model in mid-run is certified."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import specops_jax
from specops import ClipSpectralNorm, Conv, Dense
from tests.oracle import spectrum

MAPS: dict[str, tuple[tuple[int, ...], Any]] = {
    "matrix": ((64, 64), Dense()),
    "stack": ((3, 32, 64), Dense(out_axes=(-1,), batch_axes=(0,))),
    "blocks": ((64, 48), Dense(splits=(32, 32))),
    "zeros": ((3, 3, 8, 8), Conv((6, 6), layout="*IO")),
    "circular": ((3, 3, 8, 8), Conv((6, 6), layout="*IO", boundary="circular")),
}


def norm(w: Any, geometry: Any) -> float:
    w = np.asarray(w, np.float64)
    if isinstance(geometry, Dense) and geometry.splits:
        return max(float(np.linalg.norm(x, 2)) for x in np.split(w, len(geometry.splits)))
    return float(spectrum(w, geometry).max())


@pytest.mark.parametrize("on_host", [True, False])
@pytest.mark.parametrize("key", MAPS)
def test_a_weight_that_was_replaced_is_certified(key: str, on_host: bool) -> None:
    """Along the old vectors it looks inside."""
    shape, geometry = MAPS[key]
    rng, rule, maps = np.random.default_rng(0), ClipSpectralNorm(1.0), {"w": geometry}

    def of_norm(size: float) -> dict[str, jax.Array]:
        w = rng.standard_normal(shape)
        return {"w": jnp.asarray(w * size / norm(w, geometry), jnp.float32)}

    @jax.jit
    def project(params: Any, state: Any) -> Any:
        return specops_jax.project_params(params, rule, state, maps, on_host=on_host)

    params = of_norm(0.5)
    state = specops_jax.init(params, rule, maps)
    for _ in range(3):
        params, state = project(params, state)
    assert np.all(state.rules["w"]["firings"] == 3)
    params, state = project(of_norm(1.15), state)
    assert norm(params["w"], geometry) <= 1 + 1e-5
    assert float(np.max(state.figures["w"]["norm_before"])) == pytest.approx(1.15, rel=0.05)
