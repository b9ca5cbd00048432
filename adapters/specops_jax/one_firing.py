"""One firing of one rule on one array, of JAX (traced or not) or NumPy."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax

from specops import arrays
from specops.arrays import truth
from specops.errors import AdapterError, NonFiniteError, SpecopsError
from specops.rules.base import check_result
from specops_jax.program import Item


def checked(item: Item, weight: Any, state: Any, step: Any) -> tuple[Any, Any, Any, Any]:
    """(array, state, figures, whether all was finite); nothing changes if it was not.

    The state keeps its shapes and dtypes.
    """
    xp = arrays.namespace(weight)
    fine = xp.all(xp.isfinite(weight))
    # Decompositions of infinities might never end.
    safe = xp.where(fine, weight, xp.zeros_like(weight))
    array, new, figures = updated(item, safe, state, step)
    # Under a compiler, an invalid value of a schedule becomes NaN.
    fine = fine & xp.all(xp.isfinite(array))
    if truth(fine) is not True:  # no NaN without need: users may have set jax_debug_nans
        figures = jax.tree.map(lambda x: xp.where(fine, x, xp.full_like(x, xp.nan)), figures)
        array = xp.where(fine, array, unchanged(item, weight))
    same = jax.tree.structure(new) == jax.tree.structure(state) and all(
        a.shape == b.shape
        for a, b in zip(jax.tree.leaves(new), jax.tree.leaves(state), strict=True)
    )
    if not same:
        new = state  # a warm start whose shape depends on values cannot be kept
    # Weights may have been cast since the state was made.
    new = jax.tree.map(lambda a, b: xp.where(fine, a.astype(b.dtype), b), new, state)
    return array, new, figures, fine


def updated(item: Item, weight: Any, state: Any, step: Any) -> Any:
    """The result of the rule's `update`."""

    def update() -> Any:
        given = item.rule.update(weight, item.geometry, state, step=step, name=item.name)
        if item.rule.stage != "forward":
            check_result(item.rule, given[0], weight)
        return given

    return acting(item, update)


def unchanged(item: Item, weight: Any) -> Any:
    """The array that a firing without effect gives: the weight, or zeros for a gradient."""
    zero = item.rule.stage == "gradients"
    return arrays.namespace(weight).zeros_like(weight) if zero else weight


def fetched(name: str, weight: Any, caller: str) -> Any:
    """The array on the host; raises if its values are not known."""
    if isinstance(weight, jax.core.Tracer):
        raise AdapterError(
            f"{caller} reads the values of {name}: call it outside jit, grad and vmap"
        )
    if isinstance(weight, jax.ShapeDtypeStruct):
        raise AdapterError(
            f"{caller} needs the values of {name}, which is a ShapeDtypeStruct: give it arrays, or "
            f"ask for shapes alone by jax.eval_shape"
        )
    if not (getattr(weight, "is_fully_addressable", True) or weight.is_fully_replicated):
        raise AdapterError(
            f"{caller} fetches {name}, parts of which are on devices of other processes: "
            f"init may be called under jit, report and enforce take what "
            f"jax.experimental.multihost_utils.process_allgather(params, tiled=True) gives"
        )
    return jax.device_get(weight)


def refuse_nonfinite(item: Item, weight: Any) -> None:
    """Raise if the weight is not finite, as far as its values are known."""
    xp = arrays.namespace(weight)
    if truth(xp.all(xp.isfinite(weight))) is False:
        raise NonFiniteError(
            f"{item.name} holds NaN or infinity (shape {tuple(weight.shape)}): look for a diverged "
            f"step or an overflow in half precision. No weight was changed"
        )


def acting(item: Item, function: Callable[[], Any]) -> Any:
    """The result of the function, whose errors will name the item."""
    try:
        return function()
    except SpecopsError as error:
        if item.name in str(error):
            raise
        raise type(error)(f"{item.name}: {error}") from error
    except Exception as error:
        error.add_note(f"while {item.rule!r} acted on {item.name}")
        raise
