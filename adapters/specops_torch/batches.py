"""Weights whose one matrix is followed, advanced together: fewer calls for the same numbers.

On a device equal shapes are advanced as one stack. On the CPU small matrices are seen through
NumPy, whose calls cost a fraction of torch's, with one BLAS thread for all of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any

import torch

from specops.geometry import Dense
from specops.tracking import TrackedBlocks, power_steps, track
from specops_torch.constrained import Constrained

_SMALL = 2**16
"""Entries of a weight on the CPU up to which one thread is enough for a product with it."""
_PLAIN = (torch.float32, torch.float64)
_KEYS = {"u0", "v0", "sigma0"}


def grouped(due: Sequence[Constrained]) -> list[list[Constrained]]:
    """The weights that can be advanced together; every other one for itself."""
    groups: dict[Any, list[Constrained]] = {}
    for c in due:
        groups.setdefault(_key(c), []).append(c)
    return list(groups.values())


def followed(c: Constrained) -> Dense | None:
    """The matrices that the rule follows, if they are blocks of one."""
    geometry = c.geometry
    if c.viewed is None or c.viewed[0] is not geometry:
        norm = getattr(c.rule, "norm", None)
        follow = None if norm is None else track(geometry, norm)
        view = None
        if isinstance(follow, TrackedBlocks) and not follow.geometry.batch_axes:
            view = follow.geometry
        c.viewed = geometry, view
    return c.viewed[1]


def in_place(c: Constrained) -> bool:
    """Whether a penalty's term is a dyad for each block of rows, for the gradient to take."""
    gradient = c.location.parameter.grad
    if gradient is None or gradient.dtype not in _PLAIN or not gradient.is_contiguous():
        return False
    view = followed(c)
    return view is not None and hasattr(c.rule, "advance") and _is_rows(view)


def dyads(
    c: Constrained, state: dict[str, torch.Tensor]
) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """(u, v, σ) of each block."""
    view = followed(c)
    assert view is not None
    count = range(len(view.splits or (0,)))
    return [(state[f"u{j}"], state[f"v{j}"], state[f"sigma{j}"]) for j in count]


def update_together(
    group: Sequence[Constrained], states: Sequence[dict[str, torch.Tensor]]
) -> list[tuple[torch.Tensor, dict[str, torch.Tensor], dict[str, Any]]]:
    """What the rule's `update` gives for each weight of a group."""
    weights = [c.location.parameter.detach() for c in group]
    advance = _on_host if weights[0].device.type == "cpu" else _in_stack
    result = []
    for c, weight, state in zip(group, weights, advance(group, weights, states), strict=True):
        norm = state["sigma0"]
        figures = {"norm": norm}
        if c.stage == "gradients":
            figures["penalty"] = 0.5 * c.rule.strength * norm**2
        result.append((weight, state, figures))
    return result


def _on_host(
    group: Sequence[Constrained],
    weights: Sequence[torch.Tensor],
    states: Sequence[dict[str, torch.Tensor]],
) -> list[dict[str, torch.Tensor]]:
    given = []
    for c, weight, state in zip(group, weights, states, strict=True):
        u, v = state["u0"].numpy(), state["v0"].numpy()
        given.append((weight.numpy().reshape(len(u), -1), u, v, c.rule.iterations))
    return [
        {
            "u0": torch.from_numpy(u),
            "v0": torch.from_numpy(v),
            "sigma0": torch.from_numpy(sigma),
        }
        for u, v, sigma in power_steps(given)
    ]


def _in_stack(
    group: Sequence[Constrained],
    weights: Sequence[torch.Tensor],
    states: Sequence[dict[str, torch.Tensor]],
) -> list[dict[str, torch.Tensor]]:
    view = followed(group[0])
    assert view is not None
    follow = TrackedBlocks(_stacked(view))
    stacked = {key: torch.stack([s[key] for s in states]) for key in _KEYS}
    state = follow.advance(torch.stack(list(weights)), stacked, group[0].rule.iterations)
    parts = {key: value.unbind() for key, value in state.items()}
    return [{key: value[i] for key, value in parts.items()} for i in range(len(group))]


def _key(c: Constrained) -> Any:
    parameter, rule = c.location.parameter, c.rule
    alone = id(c)
    if parameter.dtype not in _PLAIN or not hasattr(rule, "iterations"):
        return alone
    if any(callable(getattr(rule, key, None)) for key in ("scale", "strength", "ratio")):
        return alone
    state, view = c.state if c.normalizer is None else c.normalizer.state, followed(c)
    if view is None or view.splits or state is None or state.keys() != _KEYS:
        return alone
    if c.stage == "gradients" and not in_place(c):
        return alone
    if parameter.device.type != "cpu":
        return id(rule), id(view), parameter.shape, parameter.dtype, parameter.device
    u, v = state["u0"], state["v0"]
    fits = len(u) == parameter.shape[0] and len(u) * len(v) == parameter.numel() <= _SMALL
    usable = fits and _is_rows(view) and u.dtype == v.dtype == parameter.dtype and u.is_cpu
    return "small" if usable else alone


@lru_cache(maxsize=1024)
def _is_rows(view: Dense) -> bool:
    return replace(view, splits=None) == Dense()


@lru_cache(maxsize=1024)
def _stacked(view: Dense) -> Dense:
    """The geometry of a stack of such weights."""
    out = tuple(axis + 1 if axis >= 0 else axis for axis in view.out_axes)
    inner = view.in_axes and tuple(axis + 1 if axis >= 0 else axis for axis in view.in_axes)
    return Dense(out, inner, batch_axes=(0,))
