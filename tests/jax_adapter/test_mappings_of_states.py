"""States in mappings of the caller's own: arrays of JAX come back, in the kind that was given."""

from __future__ import annotations

from collections import OrderedDict, defaultdict
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import specops

W = jnp.asarray(np.random.default_rng(0).normal(size=(6, 5)))


class Named(dict[str, Any]):
    """A dict that JAX does not know: no tree to it."""

    label = "mine"


class Frozen(Mapping[str, Any]):
    def __init__(self, values: Mapping[str, Any]) -> None:
        self._values = dict(values)

    def __getitem__(self, key: str) -> Any:
        return self._values[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)


def defaults(values: Mapping[str, Any]) -> Any:
    found: Any = defaultdict(int)
    found.update(values)
    return found


@pytest.mark.parametrize("kind", [dict, OrderedDict, Named, Frozen, defaults])
def test_states_come_back_as_arrays_of_jax(kind: Any) -> None:
    rule = specops.SpectralNormPenalty(0.1, norm="reshaped")
    state = kind(rule.init(W, specops.Dense(), "w"))
    gradient, after, _ = rule.update(W, specops.Dense(), state)
    assert isinstance(gradient, jax.Array)
    for values in (state, after):
        assert all(isinstance(values[key], jax.Array) for key in values)


@pytest.mark.parametrize("kind", [OrderedDict, Named, Frozen, defaults])
def test_what_is_passed_on_keeps_its_kind(kind: Any) -> None:
    from specops.arrays import entry

    state = kind({"u": W[0], "k": 3})

    @entry
    def passed(w: Any, state: Any) -> Any:
        assert isinstance(w, np.ndarray)
        assert isinstance(state["u"], np.ndarray)
        return state, kind({"u": state["u"] + 1, "k": state["k"]})

    same, other = passed(W, state)
    assert type(same) is type(other) is type(state)
    assert same["u"] is state["u"]
    assert isinstance(other["u"], jax.Array)
    assert other["k"] == 3
    assert getattr(other, "default_factory", None) is getattr(state, "default_factory", None)


class Tagged(Frozen):
    def __init__(self, values: Mapping[str, Any], tag: str) -> None:
        super().__init__(values)
        self.tag = tag


def test_a_state_that_is_made_of_more_than_a_mapping_is_read() -> None:
    rule = specops.SpectralNormPenalty(0.1, norm="reshaped")
    plain = rule.init(W, specops.Dense(), "w")
    found = rule.update(W, specops.Dense(), Tagged(plain, "mine"))
    expected = rule.update(W, specops.Dense(), plain)
    np.testing.assert_array_equal(found[0], expected[0])
    assert isinstance(found[0], jax.Array)
