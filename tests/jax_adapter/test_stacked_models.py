"""Models that are stacked, one for each seed or device, are not taken for one model."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import specops_jax
from specops import ClipSpectralNorm, Dense
from specops.errors import PlanError

nn = pytest.importorskip("flax.linen")

CAP = 0.5


class Net(nn.Module):  # type: ignore[misc,name-defined]
    @nn.compact
    def __call__(self, x: Any) -> Any:
        x = nn.Conv(2, (3, 3))(x)
        return nn.Dense(6)(x.reshape(len(x), -1))


def stacked() -> tuple[Any, Any]:
    """(parameters for three seeds, the maps of one model)."""
    net, x = Net(), jnp.ones((1, 3, 3, 1))
    keys = jax.random.split(jax.random.key(0), 3)
    params = jax.vmap(lambda key: net.init(key, x)["params"])(keys)
    return params, specops_jax.geometries_of(net, x)


@pytest.mark.parametrize("name", ["init", "enforce", "report"])
def test_what_takes_one_model_says_so(name: str) -> None:
    params, maps = stacked()
    with pytest.raises(
        PlanError, match=r"Dense_0/kernel: its module has it of shape \(18, 6\)"
    ) as e:
        getattr(specops_jax, name)(params, ClipSpectralNorm(CAP), maps)
    assert "jax.vmap" in str(e.value)


def test_mapped_and_one_by_one_they_are_bounded() -> None:
    params, maps = stacked()
    rule = ClipSpectralNorm(CAP)

    def project(params: Any) -> Any:
        state = specops_jax.init(params, rule, maps)
        return specops_jax.project_params(params, rule, state, maps, on_host=False)[0]

    mapped = jax.jit(jax.vmap(project))(params)
    for index in range(3):
        one = specops_jax.enforce(jax.tree.map(lambda x, i=index: x[i], params), rule, maps)
        for kernel in (mapped["Dense_0"]["kernel"][index], one["Dense_0"]["kernel"]):
            assert np.linalg.norm(np.asarray(kernel), 2) == pytest.approx(CAP, rel=1e-5)


def test_what_a_user_says_of_a_stack_counts() -> None:
    params, maps = stacked()
    maps |= {"Dense_0/kernel": Dense(out_axes=(-1,), batch_axes=(0,))}
    given = {name: params[name] for name in ("Dense_0",)}
    final = specops_jax.enforce(given, ClipSpectralNorm(CAP), maps)
    norms = [np.linalg.norm(np.asarray(w), 2) for w in final["Dense_0"]["kernel"]]
    np.testing.assert_allclose(norms, CAP, rtol=1e-5)
