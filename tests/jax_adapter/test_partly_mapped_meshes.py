"""`shard_map` over some axes of a mesh, weights sharded along others: layouts are of one device."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

jax = pytest.importorskip("jax")
pytest.importorskip("optax")

from jax.sharding import AxisType, NamedSharding  # noqa: E402
from jax.sharding import PartitionSpec as P  # noqa: E402

import specops  # noqa: E402
import specops_jax  # noqa: E402

MAPS = {"w": specops.Dense(out_axes=(-1,))}
RULES = {
    "forward": specops.SpectralNormalization(norm="operator"),
    "weights": specops.NormalizeIfAbove(1.0, norm="operator"),
}


@pytest.mark.parametrize("stage", RULES)
def test_explicit_axes_that_are_not_mapped(stage: str) -> None:
    rule = RULES[stage]
    mesh = jax.make_mesh((1, 1), ("data", "model"), axis_types=(AxisType.Explicit,) * 2)
    weight = np.random.default_rng(0).normal(size=(6, 8)).astype(np.float32)
    params = {"w": jax.device_put(weight, NamedSharding(mesh, P(None, "model")))}
    state = specops_jax.init(params, rule, MAPS)

    def step(params: Any, state: Any) -> Any:
        params, state = specops_jax.project_params(params, rule, state, MAPS)
        return specops_jax.normalize_params(params, rule, state, MAPS)

    options: dict[str, Any] = {"axis_names": {"data"}, "check_vma": False}
    mapped = jax.shard_map(step, mesh=mesh, in_specs=P(), out_specs=P(), **options)
    used = jax.jit(mapped)(params, state)["w"]
    assert used.sharding.spec == P(None, "model")
    assert float(specops.spectral_norm(np.asarray(used, np.float64))) == pytest.approx(1, abs=1e-5)
