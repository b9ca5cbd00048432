"""Weights of one shape under one rule, advanced as one stack: fewer, larger operations."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from specops.geometry import Dense
from specops.tracking import TrackedBlocks, track
from specops_torch.constrained import Constrained

_LARGEST = 2**16
"""Entries of a weight on the CPU up to which copying it costs less than calls for it alone."""


def grouped(due: Sequence[Constrained]) -> list[list[Constrained]]:
    """The weights that can be stacked, together; every other one for itself."""
    groups: dict[Any, list[Constrained]] = {}
    for c in due:
        groups.setdefault(_key(c), []).append(c)
    return list(groups.values())


def in_place(c: Constrained) -> bool:
    """Whether a penalty's term is a dyad for each block of rows, for the gradient to take."""
    gradient = c.location.parameter.grad
    if gradient is None or not gradient.is_contiguous() or not hasattr(c.rule, "advance"):
        return False
    if gradient.dtype not in (torch.float32, torch.float64):
        return False
    norm = getattr(c.rule, "norm", None)
    follow = None if norm is None else track(c.geometry, norm)
    if not isinstance(follow, TrackedBlocks):
        return False
    view = follow.geometry
    return not view.batch_axes and replace(view, splits=None) == Dense()


def dyads(
    c: Constrained, state: dict[str, torch.Tensor]
) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """(u, v, σ) of each block."""
    splits = c.geometry.splits if isinstance(c.geometry, Dense) else None
    count = range(len(splits or (0,)))
    return [(state[f"u{j}"], state[f"v{j}"], state[f"sigma{j}"]) for j in count]


def view_of(c: Constrained) -> Dense | None:
    """The one matrix that the rule follows, if it is one."""
    norm = getattr(c.rule, "norm", None)
    follow = None if norm is None else track(c.geometry, norm)
    if not isinstance(follow, TrackedBlocks):
        return None
    view = follow.geometry
    return None if view.batch_axes or view.splits else view


def _key(c: Constrained) -> Any:
    parameter, rule = c.location.parameter, c.rule
    alone = id(c)
    if parameter.dtype not in (torch.float32, torch.float64):
        return alone
    small = parameter.device.type != "cpu" or parameter.numel() <= _LARGEST
    scheduled = any(callable(getattr(rule, key, None)) for key in ("scale", "strength", "ratio"))
    state = c.state if c.normalizer is None else c.normalizer.state
    if not small or scheduled or state is None or not hasattr(rule, "iterations"):
        return alone
    view = view_of(c)
    if c.stage == "gradients" and not in_place(c):
        return alone
    if view is None or set(state) != {"u0", "v0", "sigma0"}:
        return alone
    return rule, view, parameter.shape, parameter.dtype, parameter.device


def update_stack(
    group: Sequence[Constrained], states: Sequence[dict[str, torch.Tensor]], step: int
) -> list[tuple[torch.Tensor, dict[str, torch.Tensor], dict[str, Any]]]:
    """What the rule's `update` gives for each weight, by one call for their stack."""
    view = view_of(group[0])
    assert view is not None
    weights = [c.location.parameter.detach() for c in group]
    axes = tuple(axis + 1 if axis >= 0 else axis for axis in view.out_axes)
    inner = view.in_axes and tuple(axis + 1 if axis >= 0 else axis for axis in view.in_axes)
    stacked = {key: torch.stack([s[key] for s in states]) for key in ("u0", "v0", "sigma0")}
    first = group[0]
    given = torch.stack(weights), Dense(axes, inner, batch_axes=(0,)), stacked
    if first.stage == "gradients":
        state, figures = first.rule.advance(*given, step=step, name=first.name)
    else:
        _, state, figures = first.rule.update(*given, step=step, name=first.name)
    parts = {key: value.unbind() for key, value in state.items()}
    norms = figures["norm"].unbind()
    result = []
    for i, weight in enumerate(weights):
        own = {"norm": norms[i]}
        if "penalty" in figures:
            own["penalty"] = 0.5 * first.rule.strength * norms[i] ** 2
        result.append((weight, {key: value[i] for key, value in parts.items()}, own))
    return result
