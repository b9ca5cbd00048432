"""One step of a plan: which rules fire, and what they do to arrays, which may be traced.

Arrays of the same shape under the same rule share one compiled function, which handles them one
after the other, so that compile times grow with the number of shapes, not of layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from specops.arrays import cond
from specops.training.plan import Plan
from specops_jax.bodies import alike, body_of, each
from specops_jax.callbacks import call_host, is_left_to_host
from specops_jax.meshes import partitioned, replicated
from specops_jax.numbers import parted, with_numbers
from specops_jax.one_firing import (
    acting,
    checked,
    fetched,
    refuse_nonfinite,
    unchanged,
    updated,
)
from specops_jax.program import Item, Program
from specops_jax.state import Arrays, SpecopsState, check_states, of_arrays

Results = dict[str, tuple[Any, dict[str, Any], dict[str, Any], Any]]
"""(array, state, figures, whether the weight was finite) by name."""


def begin(program: Program, leaves: Sequence[Any]) -> SpecopsState:
    """The state before the first step."""
    figures = {}
    groups: dict[Any, list[Item]] = {}
    for item in program.items:
        bare = _without_numbers(item)
        groups.setdefault(body_of(bare, leaves[item.index]), []).append(bare)
    rules = _start(list(groups.values()), leaves)
    for group in groups.values():
        bare, weight = group[0], leaves[group[0].index]
        seen = jax.eval_shape(
            lambda w, s, i=bare: updated(i, w, s, jnp.int32(1))[2],
            jax.ShapeDtypeStruct(weight.shape, weight.dtype),
            rules[bare.name],
        )
        for item in group:
            figures[item.name] = {k: _zeros(x.shape, x.dtype) for k, x in seen.items()}
    names = [item.name for item in program.items]
    fired, nonfinite = ({name: _zeros((), np.int32) for name in names} for _ in range(2))
    return SpecopsState(_zeros((), np.int32), rules, figures, fired, nonfinite)


def _without_numbers(item: Item) -> Item:
    """The item as it is within a program, which does not know the values of schedules."""
    found: list[Item] = []
    jax.eval_shape(lambda: found.append(parted(item, jnp.int32(1))[0]))
    return found[0]


def _zeros(shape: tuple[int, ...], dtype: Any) -> jax.Array:
    """Zeros in a buffer of their own, so that all arrays of a state can be donated."""
    return jax.device_put(np.zeros(shape, dtype))


def _start(groups: list[list[Item]], leaves: Sequence[Any]) -> Arrays:
    weights = {item.name: leaves[item.index] for group in groups for item in group}
    traced = [g for g in groups if isinstance(weights[g[0].name], jax.core.Tracer)]
    started: Arrays = {}
    if traced:
        own = {item.name: weights[item.name] for group in traced for item in group}
        started = partitioned(partial(_start_all, traced), lambda of, whole: whole, own)
    for item in (item for group in groups for item in group if item.name not in started):
        # On the host, to avoid a compilation.
        held = fetched(item.name, weights[item.name], "init")
        refuse_nonfinite(item, held)
        wide = held.astype(jnp.promote_types(held.dtype, jnp.float32))
        # Copies, because the rule may keep the arrays that it returned.
        new = _watched(item, wide)
        started[item.name] = {key: jax.device_put(np.array(x)) for key, x in new.items()}
    return started


def _start_all(groups: list[list[Item]], weights: Any) -> Arrays:
    """The states of groups of items that are alike: all of a group start as its first one."""
    started: Arrays = {}
    for group in groups:
        found = each(partial(_watched, group[0]), [weights[item.name] for item in group])
        started |= {item.name: x for item, x in zip(group, found, strict=True)}
    return started


def _watched(item: Item, weight: Any) -> dict[str, Any]:
    new: dict[str, Any] = acting(item, partial(item.rule.watch, weight, item.geometry, item.name))
    return new


def advance(
    program: Program, leaves: Sequence[Any], state: SpecopsState, *stages: str
) -> tuple[dict[str, Any], SpecopsState]:
    """(the arrays that rules of these stages give, by name; the state after the step).

    If a rule does not fire, a weight is returned unchanged, and a term of a gradient is zero.
    """
    state = of_arrays(state)
    check_states(program.of(*stages), leaves, state)
    state = replicated(state)
    step = state.step + 1
    arrays: dict[str, Any] = {}
    rules, figures = dict(state.rules), dict(state.figures)
    fired, nonfinite = dict(state.fired), dict(state.nonfinite)
    by_interval: dict[tuple[int, bool], list[Item]] = {}
    for item in program.of(*stages):
        # Vectors of forward rules are used at every step, also before `start` and after `stop`.
        always = item.rule.stage == "forward"
        by_interval.setdefault((item.assignment.every, always), []).append(item)
    for (every, always), items in by_interval.items():
        own = {i.name: state.rules[i.name] for i in items}
        shown = {i.name: state.figures[i.name] for i in items}
        weights = {i.name: leaves[i.index] for i in items}

        def fire(
            items: list[Item] = items, w: Any = weights, s: Any = own, f: Any = shown
        ) -> Results:
            found = _fire(program, items, w, s, f, step)
            return {name: (*x[:2], _of_dtypes(x[2], f[name]), x[3]) for name, x in found.items()}

        def rest(items: list[Item] = items, w: Any = weights, s: Any = own, f: Any = shown) -> Any:
            fine = jnp.ones((), bool)
            return {i.name: (unchanged(i, w[i.name]), s[i.name], f[i.name], fine) for i in items}

        due = is_due(program.plan, step, every, always=always)
        if always and every > 1:
            due = due | _has_begun(items, weights, own)
        for name, (array, new, seen, fine) in cond(due, fire, rest).items():
            arrays[name], rules[name], figures[name] = array, new, seen
            fired[name] = jnp.where(due, step, fired[name])
            nonfinite[name] = nonfinite[name] + jnp.where(fine, 0, 1).astype(jnp.int32)
    return arrays, SpecopsState(step, rules, figures, fired, nonfinite)


def _has_begun(items: list[Item], weights: dict[str, Any], states: dict[str, Any]) -> Any:
    """Whether a weight that was zero (a new head's) no longer is, so that it needs new vectors."""
    begun = jnp.zeros((), bool)
    for item in items:
        follow, state = item.rule.tracked(item.geometry), states[item.name]
        if follow is not None and state:
            unknown = [jnp.any(norm == 0) for norm in follow.measured(state)]
            begun = begun | (jnp.any(jnp.stack(unknown)) & jnp.any(weights[item.name] != 0))
    return begun


def _of_dtypes(figures: dict[str, Any], like: dict[str, Any]) -> dict[str, Any]:
    """The figures in the dtypes of the state, even if weights were cast since."""
    return {k: jnp.asarray(x, like[k].dtype) if k in like else x for k, x in figures.items()}


def is_due(plan: Plan, step: Any, every: int, *, always: bool = False) -> Any:
    """`Plan.fires` for steps that may be traced; `always` ignores the plan's start and stop."""
    due = (step - plan.start) % every == 0
    if always:
        return due
    due = due & (step > plan.start)
    return due if plan.stop is None else due & (step < plan.stop)


def enforced(item: Item, weight: Any) -> Any:
    """A certified firing on the host."""
    rule, held = item.weight_rule, fetched(item.name, weight, "enforce")
    refuse_nonfinite(item, held)
    state = acting(item, partial(rule.init, held, item.geometry, item.name))
    new = acting(item, partial(rule.enforce, held, item.geometry, state, step=1, name=item.name))[0]
    if new is held:
        return weight
    # NumPy arrays (parameters that were fetched or read from a file) stay NumPy arrays.
    own = isinstance(weight, np.ndarray)
    return np.asarray(new) if own else jax.device_put(new, weight.sharding)


def _fire(
    program: Program,
    items: Sequence[Item],
    weights: Any,
    states: Arrays,
    figures: Arrays,
    step: Any,
) -> Results:
    def layouts(of: Any, whole: Any) -> Any:
        return {item.name: (of[item.name], whole, whole, whole) for item in items}

    def fire(weights: Any, states: Arrays, figures: Arrays, step: Any) -> Results:
        left = [i for i in items if program.on_host and is_left_to_host(i, weights[i.name])]
        names = {item.name for item in left}
        rest = [item for item in items if item.name not in names]
        results = _fire_all(rest, weights, states, step)
        if left:
            results |= call_host(left, _fire_all, weights, states, figures, step)
        return results

    results: Results = partitioned(fire, layouts, weights, states, figures, step)
    return results


def _fire_all(items: Sequence[Item], weights: Any, states: Arrays, step: Any) -> Results:
    results: Results = {}
    traced = []
    for item in items:
        weight = weights[item.name]
        if isinstance(weight, jax.core.Tracer):
            traced.append(item)
            continue
        refuse_nonfinite(item, weight)
        results[item.name] = checked(item, weight, states[item.name], step)
    for group in alike(traced, weights, step):
        own = [(numbers, weights[i.name], states[i.name]) for i, numbers in group]
        found = each(partial(_checked_with, group[0][0], step), own)
        results |= {item.name: x for (item, _), x in zip(group, found, strict=True)}
    return results


def _checked_with(item: Item, step: Any, given: tuple[Any, Any, Any]) -> Any:
    numbers, weight, state = given
    return checked(with_numbers(item, numbers), weight, state, step)
