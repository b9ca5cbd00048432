"""The placeholder that optax passes to `init`, to see where a state has copies of parameters."""

from __future__ import annotations

from functools import cache
from typing import Any

import optax

from specops_jax.state import SpecopsState


def is_placeholder(params: Any) -> bool:
    """Whether `optax.tree.map_params` is asking, which passes no real parameters."""
    return isinstance(params, _placeholder())


def no_params() -> SpecopsState:
    """A state in which nothing corresponds to a parameter, leaf by leaf or branch by branch."""
    anything: list[Any] = [0] * len(SpecopsState._fields)
    return SpecopsState(*anything)


@cache
def _placeholder() -> type:
    # optax does not export the class, but passes an instance to any `init`.
    met: list[type] = []
    optax.tree_utils.tree_map_params(lambda params: met.append(type(params)), lambda x: x, None)
    return met[0]
