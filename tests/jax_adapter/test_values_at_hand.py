"""Parameters of NumPy, and calls that need values where there are none."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

jax = pytest.importorskip("jax")
pytest.importorskip("optax")

import jax.numpy as jnp  # noqa: E402

import specops  # noqa: E402
import specops_jax  # noqa: E402
from specops.errors import AdapterError  # noqa: E402
from specops_jax.one_firing import fetched  # noqa: E402

CLIP = specops.ClipSpectralNorm(1.0)
PENALTY = specops.SpectralNormPenalty(0.1, norm="operator")
MAPS = {"w": specops.Dense(out_axes=(-1,))}


def weight() -> np.ndarray:
    return np.random.default_rng(0).normal(size=(8, 12))


@pytest.mark.parametrize("dtype", [np.float32, np.float64, jnp.bfloat16])
def test_the_last_word_on_parameters_that_were_fetched(dtype: Any) -> None:
    """As `jax.device_get` and files give them: neither their kind nor their dtype changes."""
    params = {"w": weight().astype(dtype)}
    new = specops_jax.enforce(params, CLIP, MAPS)["w"]
    assert type(new) is np.ndarray
    assert new.dtype == params["w"].dtype
    assert 0.99 < specops.spectral_norm(new.astype(np.float64)) <= 1 + 1e-6


def test_a_penalty_of_parameters_that_were_fetched() -> None:
    params = {"w": weight().astype(np.float32)}
    state = specops_jax.init(params, PENALTY, MAPS)
    found = specops_jax.penalty(params, PENALTY, state, MAPS)
    expected = specops_jax.penalty(jax.tree.map(jnp.asarray, params), PENALTY, state, MAPS)
    assert float(found) == pytest.approx(float(expected))
    assert float(found) > 0.1


CALLS: dict[str, Callable[[Any], Any]] = {
    "enforce": lambda params: specops_jax.enforce(params, CLIP, MAPS),
    "report": lambda params: specops_jax.report(params, CLIP, MAPS).rows[0].norm,
}


@pytest.mark.parametrize("name", CALLS)
def test_what_reads_values_says_so_where_there_are_none(name: str) -> None:
    params = {"w": jnp.asarray(weight())}
    message = f"{name} reads the values of w: call it outside jit"
    with pytest.raises(AdapterError, match=message):
        jax.jit(CALLS[name])(params)
    with pytest.raises(AdapterError, match=message):
        jax.vmap(CALLS[name])({"w": params["w"][None]})


@pytest.mark.parametrize("name", ["init", *CALLS])
def test_shapes_are_no_parameters(name: str) -> None:
    calls = CALLS | {"init": lambda params: specops_jax.init(params, CLIP, MAPS)}
    params = {"w": jax.ShapeDtypeStruct((8, 12), jnp.float32)}
    with pytest.raises(AdapterError, match=rf"{name} needs the values of w.*jax\.eval_shape"):
        calls[name](params)


def test_parts_on_devices_of_other_processes() -> None:
    """A stand-in: one process has no such array."""
    elsewhere = SimpleNamespace(is_fully_addressable=False, is_fully_replicated=False)
    with pytest.raises(AdapterError, match=r"enforce fetches w, parts of which.*process_allgather"):
        fetched("w", elsewhere, "enforce")


def test_records_under_a_compiler() -> None:
    state = specops_jax.init({"w": jnp.asarray(weight())}, CLIP, MAPS)
    with pytest.raises(AdapterError, match="records reads the state's values: call it outside jit"):
        jax.jit(specops_jax.records)(state)


@pytest.mark.parametrize("rule", [CLIP, PENALTY, specops.SpectralNormalization(norm="operator")])
def test_where_jax_raises_for_any_nan_none_is_made(rule: Any) -> None:
    params = {"w": jnp.asarray(weight())}
    state = specops_jax.init(params, rule, MAPS)
    with jax.debug_nans(True):
        _, state = specops_jax.project_params(params, rule, state, MAPS)
    assert specops_jax.records(state)
