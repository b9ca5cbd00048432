"""Reports of what is constrained, and the check for weights that were not finite."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp

from specops.errors import AdapterError, NonFiniteError
from specops.geometry import Geometry
from specops.training.report import Report, measured, plan_rows
from specops_jax.functions import Params, normalize_params
from specops_jax.one_firing import fetched
from specops_jax.program import program
from specops_jax.state import SpecopsState, of_arrays


def report(
    params: Params,
    plan: Any,
    geometries: Mapping[str, Geometry] | None = None,
    *,
    state: SpecopsState | None = None,
    measure: bool = True,
) -> Report:
    """Every array of a pytree: constrained by what, or left alone and why.

    With `measure`, constrained arrays show their operator norm as it is now: exact for matrices,
    small layers and circular convolutions whose stride divides their grid, a certified upper bound
    for others. Given the `state`, it is that of the arrays which forward rules let the loss use.

    Parameters
    ----------
    params, plan, geometries
        As in `init`.
    state : SpecopsState, optional
        As in `project_params`.
    measure : bool
        False leaves the norms out, and looks at no array.

    Returns
    -------
    Report
    """
    own, leaves, _ = program(params, plan, geometries)
    if state is not None and measure and own.of("forward"):
        used = normalize_params(params, plan, state, geometries)
        leaves = jax.tree.leaves(used)
    by_name = {item.name: item for item in own.items}
    rows = []
    for row in plan_rows(own.assignments):
        item = by_name.get(row.name)
        if measure and item is not None:
            # On the host, to avoid a compilation for one report.
            w = fetched(item.name, leaves[item.index], "report")
            w = w.astype(jnp.promote_types(w.dtype, jnp.float32))
            row = replace(row, **measured(w, item.geometry, item.rule))
        rows.append(row)
    return Report(tuple(rows))


def check(state: SpecopsState) -> None:
    """Raise if compiled steps met weights that were not finite; call it outside jit.

    Parameters
    ----------
    state : SpecopsState
        As in `project_params`; within an optimizer's state, `find_state` finds it.

    Raises
    ------
    NonFiniteError
        Steps met such weights and left them alone; the message names them.
    StateError
        `state` is another object.
    AdapterError
        It was called within jit.
    """
    state = of_arrays(state)
    if isinstance(state.step, jax.core.Tracer):
        raise AdapterError("check reads the state's values: call it outside jit")
    counts = {name: int(jnp.max(n)) for name, n in state.nonfinite.items()}
    met = {name: n for name, n in counts.items() if n > 0}
    if met:
        listed = ", ".join(f"{name} ({n} times)" for name, n in met.items())
        raise NonFiniteError(
            f"by step {int(jnp.max(state.step))} a rule was due and these weights, or the bound "
            f"that its schedule gave, were not finite (a bound: not positive); they were left as "
            f"they were: {listed}. Look for a diverged step, an overflow in half precision, or "
            f"a schedule that reaches 0"
        )
