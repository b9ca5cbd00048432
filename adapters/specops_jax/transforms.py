"""Plans as gradient transformations of optax."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import optax

from specops.errors import AdapterError, PlanError
from specops.geometry import Geometry
from specops.training.coverage import warn_of_coverage
from specops.training.plan import Plan
from specops_jax.firing import advance, begin
from specops_jax.placeholders import is_placeholder, no_params
from specops_jax.program import Program, program
from specops_jax.state import SpecopsState


def constrain(
    plan: Any,
    geometries: Mapping[str, Geometry] | None = None,
    *,
    every: int | None = None,
    on_host: bool = True,
) -> optax.GradientTransformationExtraArgs:
    """Let a plan's rules act on what an optimizer's step leads to: last in the chain.

    The updates become what takes the parameters to where the rules put them,
    :math:`u' = P(w + u) - w`; arrays that no rule changes keep their updates bit by bit.
    Vectors of forward rules advance at those new weights.

    Parameters
    ----------
    plan : rule or Plan
        Rules of stage "weights" and "forward".
    geometries : dict of str to Dense or Conv, optional
        See `specops_jax.init`.
    every : int, optional
        Let rules act at every `every`-th step; default: the plan's own interval. Changing it does
        not recompile.
    on_host : bool, optional
        Only where the only device is a CPU, and only for `ClipSpectralNorm` of convolutions:
        whether compiled programs call back to the host for it, instead of compiling it. On the
        host it gives the same numbers as outside jit: small zero-padded layers are constrained
        themselves, at the cost that `specops.project_spectral_ball` names. Other layers take a
        tenth to one and a half times as long as compiled, and none of the seconds that
        compilation takes for each shape.

        False compiles it on a CPU too, as is always done on other devices, under ``shard_map``
        and where a derivative is asked for. Choose it for long training on small grids, for
        programs that are to be exported (``jax.export``), and for those to be kept by JAX's
        persistent cache, where that keeps none with callbacks.

    Returns
    -------
    optax.GradientTransformationExtraArgs
        Its state is a `SpecopsState`.

    Raises
    ------
    ValueError
        ``update`` was called without ``params``.
    PlanError
        The plan does not fit the parameters; raised by ``init``.

    Notes
    -----
    Put it last in the chain, or a later transformation undoes it. ``optax.MultiSteps`` around the
    chain projects on real steps only. ``optax.apply_if_finite`` belongs around the chain, too.
    Arrays that an earlier link freezes (``optax.set_to_zero``) are projected all the same:
    leave them out of the plan, or put ``constrain`` into the branch of
    ``optax.multi_transform`` that trains the others.
    ``optax.tree.map_params`` leaves this state as it is: its vectors have no parameter's shape.
    ``transform_non_params`` is called on each of its fields, which are dicts of arrays but for
    ``step``: map over them, ``lambda x: jax.tree.map(f, x)``.
    Bounds, strengths and ratios may be hyperparameters of ``optax.inject_hyperparams``, which
    rounds them to half precision where all parameters are (``hyperparam_dtype=jnp.float32``
    does not); ``every`` and other integers belong among its ``static_args``.
    ``w + (P(w + u) − w)`` rounds again and may end above the bound by a few units of the last
    place of w, which is much in half precision, and where w was far outside (in single precision
    1e-5 of the bound from a thousand times that): use `project_params` after
    ``optax.apply_updates`` where the bound must hold as stored.

    Running statistics of batch normalisation (flax's ``batch_stats``) stay those of the parameters
    that training batches have met. After the last projection estimate them anew, by a pass over
    batches in training mode without gradients, before evaluating: this package's README shows how.
    """

    def update(
        updates: Any, state: SpecopsState, params: Any = None, **extra: Any
    ) -> tuple[Any, SpecopsState]:
        del extra
        _need(params, "constrain")
        spots, shape, held, place = _beside(updates, params)
        moved = [
            p if u is None else optax.apply_updates(p, u) for p, u in zip(held, spots, strict=True)
        ]
        stepped = jax.tree.unflatten(shape, moved)
        own, leaves = _program(stepped, params, plan, geometries, every)
        own = replace(own, on_host=on_host)
        arrays, state = advance(own, leaves, state, "weights", "forward")
        for item in own.of("weights"):
            i, new = place[item.index], arrays[item.name]
            if spots[i] is None:
                continue
            # In the wider of both dtypes, so that the difference is exact.
            wide = jnp.promote_types(new.dtype, spots[i].dtype)
            delta = (new.astype(wide) - held[i].astype(wide)).astype(spots[i].dtype)
            spots[i] = jnp.where(new == leaves[item.index], spots[i], delta)
        return jax.tree.unflatten(shape, spots), state

    Plan.of(plan, every)  # raises now if the plan is wrong, not at the first step
    return optax.GradientTransformationExtraArgs(
        _starting(plan, geometries, every, ("weights", "forward"), "constrain"), update
    )


def add_penalty(
    plan: Any, geometries: Mapping[str, Geometry] | None = None, *, every: int | None = None
) -> optax.GradientTransformationExtraArgs:
    """Add the gradients of a plan's penalties: first in the chain.

    Parameters, returns and errors as `constrain`, for rules of stage "gradients". A penalty's
    vectors advance, and its term is added, at the steps that are due.

    Raises
    ------
    AdapterError
        ``update`` was called with a line search (``optax.lbfgs``), which evaluates the loss
        itself and would not see the penalty: add `penalty` to the loss instead.
    """

    def update(
        updates: Any, state: SpecopsState, params: Any = None, **extra: Any
    ) -> tuple[Any, SpecopsState]:
        if extra.get("value_fn") is not None:
            raise AdapterError(
                "a line search evaluates value_fn, which lacks the penalty whose gradient "
                "add_penalty adds: put specops_jax.penalty(params, plan, state) into the loss, for "
                "value_fn and the gradient, and leave add_penalty out of the chain"
            )
        _need(params, "add_penalty")
        own, leaves = _program(params, params, plan, geometries, every)
        terms, state = advance(own, leaves, state, "gradients")
        spots, shape, _, place = _beside(updates, params)
        for item in own.of("gradients"):
            i = place[item.index]
            if spots[i] is not None:
                spots[i] = spots[i] + terms[item.name].astype(spots[i].dtype)
        return jax.tree.unflatten(shape, spots), state

    Plan.of(plan, every)
    return optax.GradientTransformationExtraArgs(
        _starting(plan, geometries, every, ("gradients",), "add_penalty"), update
    )


def _starting(
    plan: Any,
    geometries: Mapping[str, Geometry] | None,
    every: int | None,
    stages: tuple[str, ...],
    name: str,
) -> Any:
    def init(params: Any) -> SpecopsState:
        if is_placeholder(params):
            return no_params()
        own, leaves = _program(params, params, plan, geometries, every)
        if not own.of(*stages):
            other = {"constrain": "add_penalty", "add_penalty": "constrain"}[name]
            raise PlanError(
                f"{name} has nothing to do: no rule of the plan is of stage "
                f"{' or '.join(map(repr, stages))}. Use specops_jax.{other}"
            )
        warn_of_coverage(own.assignments)
        return begin(own.only(*stages), leaves)

    return init


def _program(
    current: Any,
    params: Any,
    plan: Any,
    geometries: Mapping[str, Geometry] | None,
    every: int | None,
) -> tuple[Program, list[Any]]:
    """The program of `params`, which may hold modules, and the leaves of `current`."""
    own, _, _ = program(params, Plan.of(plan, every), geometries)
    return own, jax.tree.leaves(current)


def _beside(updates: Any, params: Any) -> tuple[list[Any], Any, list[Any], list[int]]:
    """(the updates, their tree, the parameters at their places, the update's index by parameter).

    Where nothing is updated, equinox has None among the updates, whatever the parameters hold.
    """
    spots, shape = jax.tree.flatten(updates, is_leaf=lambda x: x is None)
    held = shape.flatten_up_to(params)
    return spots, shape, held, [j for j, p in enumerate(held) for _ in jax.tree.leaves(p)]


def _need(params: Any, name: str) -> None:
    if params is None:
        raise ValueError(
            f"specops_jax.{name} needs the parameters: call "
            f"optimizer.update(gradients, state, params), and in a chain of your own pass params on"
        )
