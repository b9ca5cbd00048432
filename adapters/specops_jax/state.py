"""`SpecopsState`: the state of rules between steps, as a pytree that any checkpoint can hold."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import jax

from specops.errors import AdapterError, StateError
from specops.training.history import plain
from specops_jax.program import Item

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
        Figures of the latest firing; zeros before the first.
    fired : dict of str to int32 array
        The step of that firing; 0 before the first.
    nonfinite : dict of str to int32 array
        Number of firings that left a weight alone because it, or the rule's result, held NaN or
        infinity; see `check`.
    """

    step: jax.Array
    rules: Arrays
    figures: Arrays
    fired: dict[str, jax.Array]
    nonfinite: dict[str, jax.Array]


def records(state: SpecopsState) -> list[dict[str, Any]]:
    """What fired at the state's step: step, name and the rule's figures as floats, for a log.

    Call it outside jit; it waits for the step.

    Parameters
    ----------
    state : SpecopsState
        As in `check`.

    Returns
    -------
    list of dict
        Empty where no rule was due.

    Raises
    ------
    StateError
        The state is that of stacked models, as ``vmap`` gives it (ask for one at a time), or
        `state` is another object.
    AdapterError
        It was called within jit.
    """
    state = of_arrays(state)
    if isinstance(state.step, jax.core.Tracer):
        raise AdapterError("records reads the state's values: call it outside jit")
    if state.step.ndim:
        raise StateError(
            f"the state is that of {state.step.shape[0]} stacked models: take one of them, "
            f"records(jax.tree.map(lambda x: x[0], state))"
        )
    step = int(state.step)
    return [
        plain({"step": step, "name": name, **state.figures[name]})
        for name, fired in state.fired.items()
        if step and int(fired) == step
    ]


def find_state(state: Any, index: int | None = None) -> SpecopsState:
    """The `SpecopsState` within an optimizer's state.

    Parameters
    ----------
    state : pytree
        An optimizer's state, as it is or as nested dicts: ``nnx.Optimizer``, its ``opt_state``,
        its ``nnx.state``, or what a checkpoint restores without knowing the types.
    index : int, optional
        Which one to return, in the order of the chain, if there are several (`add_penalty` and
        `constrain` in one chain).

    Raises
    ------
    ValueError
        There is none, or more than one and no `index`.
    """
    found = [x for x in jax.tree.leaves(state, is_leaf=_is_state) if _is_state(x)]
    if index is None and len(found) > 1:
        raise ValueError(
            f"the optimizer's state holds {len(found)} specops_jax states: say which, "
            f"find_state(state, index), with 0 the first of the chain"
        )
    try:
        return of_arrays(found[index or 0])
    except IndexError:
        raise ValueError(
            f"expected a specops_jax state in the optimizer's state, found {len(found)}"
        ) from None


def of_arrays(state: Any) -> SpecopsState:
    """A state of bare arrays from one whose fields are keys, or whose arrays are wrapped (nnx)."""
    if not _is_state(state):
        raise StateError(
            f"expected a SpecopsState, got {type(state).__name__}: of an optimizer's state take "
            f"specops_jax.find_state(state)"
        )
    given = state._asdict() if isinstance(state, SpecopsState) else state
    fields = {name: _bare(given.get(name, {})) for name in SpecopsState._fields}
    names = fields["fired"]
    if isinstance(names, dict):
        for key in ("rules", "figures"):
            # Conversions to nested dicts drop empty branches: restore them.
            fields[key] = {name: fields[key].get(name, {}) for name in names}
    bare = SpecopsState(**fields)
    same: Any = state
    return same if jax.tree.structure(bare) == jax.tree.structure(state) else bare


def _is_state(thing: Any) -> bool:
    if isinstance(thing, SpecopsState):
        return True
    return isinstance(thing, Mapping) and {"step", "fired", "nonfinite"} <= set(thing) <= set(
        SpecopsState._fields
    )


def _bare(thing: Any) -> Any:
    if isinstance(thing, Mapping):
        return {key: _bare(x) for key, x in thing.items()}
    inside = jax.tree.leaves(thing)
    return inside[0] if len(inside) == 1 else thing


def check_states(items: Sequence[Item], leaves: Sequence[Any], state: SpecopsState) -> None:
    """Raise if a state was made for other parameters, or another plan."""
    wrong = [
        item.name
        for item, w in ((item, leaves[item.index]) for item in items)
        if item.name not in state.rules or not _holds(state.rules[item.name], _started(item, w))
    ]
    if wrong:
        raise StateError(
            f"the state is not what the plan keeps of {', '.join(wrong)}: it was made by another "
            f"plan or version, or for other parameters. Make a new one with specops_jax.init"
        )


def _holds(found: dict[str, Any], started: dict[str, Any]) -> bool:
    """Whether a state has all that its rule starts with; firings may have added to it."""
    # Compares trailing axes: the state may be stacked, if a whole step is mapped.
    return all(
        key in found and found[key].shape[found[key].ndim - x.ndim :] == x.shape
        for key, x in started.items()
    )


def _started(item: Item, weight: Any) -> dict[str, Any]:
    """Shapes of the state that a rule starts with."""
    shapes = _shapes if item.is_key else _shapes.__wrapped__
    rule: Any = item.rule
    found: dict[str, Any] = shapes(rule, item.geometry, weight.shape, weight.dtype)
    return found


@lru_cache(maxsize=4096)
def _shapes(rule: Any, geometry: Any, shape: tuple[int, ...], dtype: Any) -> dict[str, Any]:
    weight = jax.ShapeDtypeStruct(shape, dtype)
    found: dict[str, Any] = jax.eval_shape(lambda w: rule.watch(w, geometry, ""), weight)
    return found
