"""The functions of a training loop in JAX: pure, and usable inside jit, vmap, grad and scan."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from specops.errors import PlanError
from specops.geometry import Geometry
from specops.training.assigned import warn_of
from specops.training.coverage import warn_of_coverage
from specops_jax.bodies import alike, each
from specops_jax.firing import advance, begin, enforced, is_due
from specops_jax.meshes import partitioned
from specops_jax.numbers import with_numbers
from specops_jax.one_firing import acting
from specops_jax.program import Item, Program, program
from specops_jax.state import SpecopsState, check_states, of_arrays

Params = Any


def init(
    params: Params, plan: Any, geometries: Mapping[str, Geometry] | None = None
) -> SpecopsState:
    """The state of a plan for these parameters, before the first step.

    Parameters
    ----------
    params : pytree of arrays
        Parameters of flax, haiku, equinox or your own. A parameter's name is the keys of its path,
        joined by "/".
    plan : rule or Plan
        A bare rule acts on every array whose geometry is known.
    geometries : dict of str to Dense or Conv, optional
        Patterns of names and the map those arrays stand for, or what `geometries_of` returned.
        Modules that stand in the tree (equinox, nnx) are looked at without it.

    Returns
    -------
    SpecopsState

    Raises
    ------
    PlanError
        The plan does not fit the parameters.
    GeometryError
        A geometry does not fit its array, or a rule needs an input size that it lacks.
    NonFiniteError
        A constrained array holds NaN or infinity.
    """
    own, leaves, _ = program(params, plan, geometries)
    warn_of_coverage(own.assignments)
    for item in own.items:
        warn_of(item.assignment)
    return begin(own, leaves)


def project_params(
    params: Params,
    plan: Any,
    state: SpecopsState,
    geometries: Mapping[str, Geometry] | None = None,
    *,
    on_host: bool = True,
) -> tuple[Params, SpecopsState]:
    """Count one step and let the rules that are due act: after ``optax.apply_updates``.

    Rules of stage "weights" change the arrays as they are stored, half precision included;
    vectors of forward rules and of penalties advance. Nothing is done to gradients: see
    `add_penalty` and `penalty`.

    Parameters
    ----------
    params, plan, geometries
        As in `init`.
    state : SpecopsState
        The state from `init`, or from the previous call.
    on_host : bool, optional
        As in `constrain`.

    Returns
    -------
    params, state
        New ones; the arguments are not changed.

    Raises
    ------
    NonFiniteError
        An array that is due holds NaN or infinity, outside jit. Under jit it is left alone and
        counted, also where a schedule gives what is no bound: see `check`.
    StateError
        A state of another plan, or of other parameters.

    Notes
    -----
    Differentiable where the rule's own steps are: for ``ClipSpectralNorm`` of a matrix this is
    the derivative of the nearest point, for convolutions and ``SpectralHammer`` that of the
    compiled rounds, with the vectors held fixed; the value beside it is theirs too, whatever
    `on_host` says. Under ``shard_map`` give whole
    (replicated) convolution kernels.

    Running statistics of batch normalisation (flax's ``batch_stats``) stay those of the parameters
    that training batches have met. After the last projection estimate them anew, by a pass over
    batches in training mode without gradients, before evaluating: this package's README shows how.
    """
    own, leaves, structure = program(params, plan, geometries)
    own = replace(own, on_host=on_host)
    arrays, state = advance(own, leaves, state, "weights", "forward", "gradients")
    for item in own.of("weights"):
        leaves[item.index] = arrays[item.name]
    return jax.tree.unflatten(structure, leaves), state


def enforce(params: Params, plan: Any, geometries: Mapping[str, Geometry] | None = None) -> Params:
    """Let every rule of stage "weights" act, certified, whether it is due or not: before an export.

    This is computed on the host, outside jit, so that nothing has to be compiled for one call.
    Bounds hold as stored. Running statistics of batch normalisation then belong to the old
    parameters: estimate them anew before evaluating, see `project_params`.

    Parameters
    ----------
    params, plan, geometries
        As in `init`.

    Raises
    ------
    NonFiniteError
        A constrained array holds NaN or infinity.
    """
    own, leaves, structure = program(params, plan, geometries)
    for item in own.of("weights"):
        leaves[item.index] = enforced(item, leaves[item.index])
    return jax.tree.unflatten(structure, leaves)


def normalize_params(
    params: Params,
    plan: Any,
    state: SpecopsState,
    geometries: Mapping[str, Geometry] | None = None,
    *,
    scales: Mapping[str, Any] | None = None,
) -> Params:
    """The parameters that the forward pass uses: differentiable, the state stays as it is.

    Call it inside the loss, on the parameters that are differentiated, and advance the state
    once per step, by `project_params` or `constrain`.

    Parameters
    ----------
    params, plan, state, geometries
        As in `project_params`.
    scales : dict of str to array, optional
        Current values of the trainable scales that `init_scales` gave.

    Raises
    ------
    PlanError
        Scales of other names than `init_scales` gives them.
    StateError
        A state of another plan, or of other parameters.

    Notes
    -----
    Under jit a schedule that gives no scale or ratio makes the weight NaN, which the loss shows.
    Parameters that were loaded or replaced since the state was made need a new one (`init`): along
    vectors of others they have next to no norm, and would be used many times too large.
    A module that is given whole (nnx, equinox) comes back as a copy, and what calling it writes
    (statistics, counts) stays there: ``nnx.update(model, nnx.state(used, nnx.Not(nnx.Param)))``.
    """
    own, leaves, structure = program(params, plan, geometries)
    state = of_arrays(state)
    check_states(own.of("forward"), leaves, state)
    step = state.step + 1
    _check_scales(own, scales)
    items = own.of("forward")

    def apply(weights: Any, states: Any, step: Any, scales: Any) -> dict[str, Any]:
        used = {}
        for item in items:
            options: dict[str, Any] = {"step": step, "name": item.name}
            if scales is not None and item.forward_rule.trained_scale() is not None:
                options["scale"] = scales[_scale_name(own, item)]
            given = weights[item.name], item.geometry, states[item.name]
            act = partial(item.forward_rule.apply, *given, **options)
            used[item.name] = acting(item, act)
        return used

    weights = {item.name: leaves[item.index] for item in items}
    used = partitioned(apply, lambda of, whole: of, weights, state.rules, step, scales)
    for item in items:
        leaves[item.index] = used[item.name]
    return jax.tree.unflatten(structure, leaves)


def penalty(
    params: Params, plan: Any, state: SpecopsState, geometries: Mapping[str, Geometry] | None = None
) -> jax.Array:
    r"""The sum of a plan's penalties, to add to the loss, as line searches need it.

    Its gradient is what `add_penalty` adds. The vectors are those of the state, advanced by the
    rule's iterations, and count as constants; the state stays as it is. Advance it once per step,
    by `project_params`.

    Parameters
    ----------
    params, plan, state, geometries
        As in `project_params`.

    Returns
    -------
    jax.Array
        A 0-d array: :math:`\sum\tfrac\lambda2\sigma^2` over the rules of stage "gradients" that
        are due at the next step.

    Raises
    ------
    PlanError
        No rule of the plan is a penalty.
    StateError
        A state of another plan, or of other parameters.

    Examples
    --------
    >>> import specops
    >>> params = {"w": jnp.diag(jnp.array([4.0, 1.0]))}
    >>> maps = {"w": specops.Dense()}
    >>> rule = specops.SpectralNormPenalty(0.5, norm="reshaped")
    >>> float(penalty(params, rule, init(params, rule, maps), maps))
    4.0
    """
    own, leaves, _ = program(params, plan, geometries)
    state = of_arrays(state)
    items = own.of("gradients")
    if not items:
        raise PlanError("penalty has nothing to add: no rule of the plan is of stage 'gradients'")
    check_states(items, leaves, state)
    step = state.step + 1

    def total(weights: Any, states: Any, step: Any) -> jax.Array:
        result = jnp.zeros(())
        for group in alike(items, weights, step):
            fixed = [jax.lax.stop_gradient(jnp.asarray(weights[i.name])) for i, _ in group]
            given = [(n, w, states[i.name]) for (i, n), w in zip(group, fixed, strict=True)]
            found = each(partial(_term, group[0][0], step), given)
            for (item, _), w, (value, term) in zip(group, fixed, found, strict=True):
                # The gradient of the sum is the rule's term, however the value is computed.
                value = value + jnp.sum(jnp.real(jnp.conj(term) * (weights[item.name] - w)))
                due = is_due(own.plan, step, item.assignment.every)
                result = result + jnp.where(due, value, 0.0)
        return result

    weights = {item.name: leaves[item.index] for item in items}
    found: jax.Array = partitioned(total, lambda of, whole: whole, weights, state.rules, step)
    return found


def _term(item: Item, step: Any, given: tuple[Any, Any, Any]) -> tuple[Any, Any]:
    """(a penalty, its gradient) with the vectors that follow."""
    numbers, weight, state = given
    rule, options = with_numbers(item, numbers).gradient_rule, {"step": step, "name": item.name}
    _, moved, _ = rule.update(weight, item.geometry, state, **options)
    return rule.penalty(weight, item.geometry, moved, **options)


def init_scales(
    params: Params, plan: Any, geometries: Mapping[str, Geometry] | None = None
) -> dict[str, jax.Array]:
    """Initial values of a plan's trainable scales: by array, or by rule where shared.

    Parameters
    ----------
    params, plan, geometries
        As in `init`.

    Returns
    -------
    dict of str to array
        The scales, to train beside the parameters and to pass to `normalize_params`.
    """
    own, leaves, _ = program(params, plan, geometries)
    result = {}
    for item in own.of("forward"):
        scale = item.forward_rule.trained_scale()
        if scale is not None:
            dtype = jnp.promote_types(leaves[item.index].dtype, jnp.float32)
            result[_scale_name(own, item)] = jnp.asarray(scale.initial, dtype)
    return result


def _check_scales(own: Program, scales: Mapping[str, Any] | None) -> None:
    if scales is None:
        return
    trained = [i for i in own.of("forward") if i.forward_rule.trained_scale() is not None]
    expected = {_scale_name(own, item) for item in trained}
    unknown, missing = sorted(set(scales) - expected), sorted(expected - set(scales))
    if unknown or missing:
        raise PlanError(
            f"scales must be those that init_scales gives, {sorted(expected)}: unknown {unknown}, "
            f"missing {missing}"
        )


def _scale_name(own: Program, item: Item) -> str:
    scale = item.forward_rule.trained_scale()
    if scale is None or not scale.shared:
        return item.name
    rules = [entry[1] for entry in own.plan.entries]
    return f"rule {rules.index(item.rule)}"
