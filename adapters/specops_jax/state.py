"""What rules remember between steps, as a pytree that any checkpoint can hold."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax

from specops.history import plain

Arrays = dict[str, dict[str, jax.Array]]


class SpecopsState(NamedTuple):
    """State of a plan in a training loop.

    Attributes
    ----------
    step : int32 array
        Steps counted since `init`.
    rules : dict of str to dict of arrays
        The rules' own states, by parameter name.
    figures : dict of str to dict of arrays
        Of the latest firing: zeros before the first.
    fired : dict of str to int32 array
        The step of that firing: 0 before the first.
    nonfinite : dict of str to int32 array
        Firings at which a weight held NaN or infinity and was left alone; see `check`.
    """

    step: jax.Array
    rules: Arrays
    figures: Arrays
    fired: dict[str, jax.Array]
    nonfinite: dict[str, jax.Array]


def records(state: SpecopsState) -> list[dict[str, Any]]:
    """What fired at the state's step: step, name and the rule's figures as floats, for a log.

    Call it outside jit; it waits for the step.
    """
    step = int(state.step)
    return [
        plain({"step": step, "name": name, **state.figures[name]})
        for name, fired in state.fired.items()
        if step and int(fired) == step
    ]


def find_state(state: Any) -> SpecopsState:
    """The `SpecopsState` within an optimizer's state.

    Raises
    ------
    ValueError
        There is none, or more than one: pass the inner state then.
    """
    leaves = jax.tree_util.tree_leaves(state, is_leaf=lambda x: isinstance(x, SpecopsState))
    found = [x for x in leaves if isinstance(x, SpecopsState)]
    if len(found) != 1:
        raise ValueError(
            f"expected one specops_jax state in the optimizer's state, found {len(found)}"
        )
    return found[0]
