"""Layers that compute something else from their kernel than their class of the library does."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import specops
from specops.errors import PlanError

jax = pytest.importorskip("jax")
import jax.numpy as jnp  # noqa: E402

import specops_jax  # noqa: E402

OWN = "has a __call__ of its own"


def refused(params: Any, found: Any, name: str, said: str = OWN) -> None:
    assert name not in found
    assert said in found.reasons[name]
    plan = specops.Plan([(name, specops.ClipSpectralNorm(1.0))])
    with pytest.raises(PlanError, match=said):
        specops_jax.init(params, plan, found)
    specops_jax.init(params, plan, found | {name: specops.Dense(out_axes=(-1,))})


def test_of_nnx() -> None:
    nnx = pytest.importorskip("flax.nnx")

    class Named(nnx.Linear):
        """Computes as its base."""

    layer = nnx.LoRALinear(4, 4, lora_rank=2, use_bias=False, rngs=nnx.Rngs(0))
    refused(layer, specops_jax.geometries_of(layer), "kernel")
    base = nnx.Linear(4, 4, use_bias=False, rngs=nnx.Rngs(0))
    around = nnx.LoRA(4, 2, 4, base_module=base, rngs=nnx.Rngs(0))
    found = specops_jax.geometries_of(around)
    refused(around, found, "base_module/kernel", "adds a part to it")
    assert list(specops_jax.geometries_of(Named(4, 4, rngs=nnx.Rngs(0)))) == ["kernel"]


def test_of_linen() -> None:
    nn = pytest.importorskip("flax.linen")

    class Doubled(nn.Dense):
        @nn.compact
        def __call__(self, x: Any) -> Any:
            return x @ (2 * self.param("kernel", nn.initializers.ones, (4, 4)))

    class Named(nn.Dense):
        """Computes as its base."""

    x = jnp.ones((1, 4))
    refused({"kernel": np.eye(4)}, specops_jax.geometries_of(Doubled(4), x), "kernel")
    assert list(specops_jax.geometries_of(Named(4), x)) == ["kernel"]


def test_of_equinox() -> None:
    eqx = pytest.importorskip("equinox")

    class Doubled(eqx.nn.Linear):
        def __call__(self, x: Any, *, key: Any = None) -> Any:
            return 2 * super().__call__(x, key=key)

    class Named(eqx.nn.Conv1d):
        """Computes as its base."""

    key = jax.random.key(0)
    layer = Doubled(4, 4, use_bias=False, key=key)
    refused(layer, specops_jax.geometries_of(layer), "weight")
    assert list(specops_jax.geometries_of(Named(4, 4, 3, key=key))) == ["weight"]


def test_of_haiku() -> None:
    hk = pytest.importorskip("haiku")

    class Doubled(hk.Linear):
        def __call__(self, x: Any, *args: Any, **kwargs: Any) -> Any:
            return 2 * super().__call__(x, *args, **kwargs)

    found = {
        kind: specops_jax.geometries_of(
            hk.transform(lambda x, kind=kind: kind(4, with_bias=False, name="l")(x)),
            jnp.ones((1, 4)),
        )
        for kind in (hk.Linear, Doubled)
    }
    refused({"l": {"w": np.eye(4)}}, found[Doubled], "l/w")
    assert list(found[hk.Linear]) == ["l/w"]
