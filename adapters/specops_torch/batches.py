"""Weights whose one matrix is followed, advanced together: fewer calls for the same numbers.

On a device equal shapes are advanced as one stack. On the CPU small matrices are seen through
NumPy, whose calls cost a fraction of torch's, with one BLAS thread for all of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any, NamedTuple

import torch

from specops.geometry import Dense, Geometry
from specops.tracking import TrackedBlocks, power_steps, track
from specops_torch.constrained import Constrained
from specops_torch.normalized import SMALL

_PLAIN = (torch.float32, torch.float64)
_KEYS = {"u0", "v0", "sigma0"}


class Followed(NamedTuple):
    """How a rule sees a weight of one geometry."""

    geometry: Geometry
    view: Dense | None
    """The matrices that it follows, if they are blocks of one."""
    by_dyads: bool
    """Whether a penalty's gradient is a dyad for each of them."""
    rows: bool
    """Whether they are blocks of the rows of the weight, flattened."""


def grouped(due: Sequence[Constrained]) -> list[list[Constrained]]:
    """The weights that can be advanced together; every other one for itself."""
    groups: dict[Any, list[Constrained]] = {}
    for c in due:
        groups.setdefault(_key(c), []).append(c)
    return list(groups.values())


def followed(c: Constrained) -> Followed:
    """How the rule sees the weight now."""
    geometry = c.geometry
    if c.followed is None or c.followed.geometry is not geometry:
        norm = getattr(c.rule, "norm", None)
        follow = None if norm is None else track(geometry, norm)
        view = None
        if isinstance(follow, TrackedBlocks) and not follow.geometry.batch_axes:
            view = follow.geometry
        rows = view is not None and replace(view, splits=None) == Dense()
        c.followed = Followed(geometry, view, rows and hasattr(c.rule, "advance"), rows)
    found: Followed = c.followed
    return found


def in_place(c: Constrained) -> bool:
    """Whether a penalty's term is a dyad for each block of rows, for the gradient to take."""
    gradient = c.location.parameter.grad
    if gradient is None or gradient.dtype not in _PLAIN or not gradient.is_contiguous():
        return False
    return followed(c).by_dyads


def dyads(
    c: Constrained, state: dict[str, torch.Tensor]
) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """(u, v, σ) of each block."""
    view = followed(c).view
    assert view is not None
    count = range(len(view.splits or (0,)))
    return [(state[f"u{j}"], state[f"v{j}"], state[f"sigma{j}"]) for j in count]


def update_together(
    group: Sequence[Constrained], states: Sequence[dict[str, torch.Tensor]]
) -> list[tuple[torch.Tensor, dict[str, torch.Tensor], dict[str, Any]]]:
    """What the rule's `update` gives for each weight of a group."""
    weights = [c.location.parameter.detach() for c in group]
    if weights[0].device.type == "cpu":
        advanced, norms = _on_host(group, states)
    else:
        advanced = _in_stack(group, weights, states)
        norms = [state["sigma0"] for state in advanced]
    result = []
    for c, weight, state, norm in zip(group, weights, advanced, norms, strict=True):
        figures = {"norm": norm}
        if c.stage == "gradients":
            figures["penalty"] = 0.5 * c.rule.strength * norm * norm
        result.append((weight, state, figures))
    return result


def _on_host(
    group: Sequence[Constrained], states: Sequence[dict[str, torch.Tensor]]
) -> tuple[list[dict[str, torch.Tensor]], list[Any]]:
    given = []
    for c, state in zip(group, states, strict=True):
        assert c.on_host is not None
        given.append(
            (c.on_host.matrix, state["u0"].numpy(), state["v0"].numpy(), c.rule.iterations)
        )
    advanced, norms = [], []
    for u, v, sigma in power_steps(given):
        norms.append(float(sigma))
        advanced.append(
            {
                "u0": torch.from_numpy(u),
                "v0": torch.from_numpy(v),
                "sigma0": torch.from_numpy(sigma),
            }
        )
    return advanced, norms


def _in_stack(
    group: Sequence[Constrained],
    weights: Sequence[torch.Tensor],
    states: Sequence[dict[str, torch.Tensor]],
) -> list[dict[str, torch.Tensor]]:
    view = followed(group[0]).view
    assert view is not None
    follow = TrackedBlocks(_stacked(view))
    stacked = {key: torch.stack([s[key] for s in states]) for key in _KEYS}
    state = follow.advance(torch.stack(list(weights)), stacked, group[0].rule.iterations)
    parts = {key: value.unbind() for key, value in state.items()}
    return [{key: value[i] for key, value in parts.items()} for i in range(len(group))]


class HostMatrix:
    """A small weight on the CPU as NumPy sees it, for as long as it stays where it is."""

    def __init__(self, c: Constrained, u: torch.Tensor, v: torch.Tensor) -> None:
        parameter = c.location.parameter
        self._parameter, self._geometry, self._vectors = parameter, c.geometry, (u.shape, v.shape)
        self._address, self._shape = parameter.data_ptr(), parameter.shape
        self.matrix = parameter.detach().numpy().reshape(u.shape[0], -1)

    def fits(self, c: Constrained, state: dict[str, torch.Tensor] | None) -> bool:
        """Whether this is the weight as it is, and vectors of its size and precision."""
        parameter = c.location.parameter
        if parameter is not self._parameter or parameter.data_ptr() != self._address:
            return False
        if parameter.shape != self._shape or not parameter.is_contiguous():
            return False
        if c.geometry is not self._geometry or state is None or state.keys() != _KEYS:
            return False
        u, v = state["u0"], state["v0"]
        sizes = (u.shape, v.shape) == self._vectors and u.is_cpu and v.is_cpu
        return sizes and parameter.dtype == u.dtype == v.dtype


def _key(c: Constrained) -> Any:
    alone = id(c)
    state = c.state if c.normalizer is None else c.normalizer.state
    if c.on_host is not None:
        if c.on_host.fits(c, state):
            return "small" if c.stage != "gradients" or in_place(c) else alone
        c.on_host = None
    parameter, rule = c.location.parameter, c.rule
    if parameter.dtype not in _PLAIN or not hasattr(rule, "iterations"):
        return alone
    if any(callable(getattr(rule, key, None)) for key in ("scale", "strength", "ratio")):
        return alone
    view, rows = followed(c).view, followed(c).rows
    if view is None or view.splits or state is None or state.keys() != _KEYS:
        return alone
    if c.stage == "gradients" and not in_place(c):
        return alone
    if parameter.device.type != "cpu":
        return id(rule), id(view), parameter.shape, parameter.dtype, parameter.device
    u, v = state["u0"], state["v0"]
    fits = len(u) == parameter.shape[0] and len(u) * len(v) == parameter.numel() <= SMALL
    usable = fits and parameter.is_contiguous() and rows and u.is_cpu and v.is_cpu
    if not usable or not u.dtype == v.dtype == parameter.dtype:
        return alone
    c.on_host = HostMatrix(c, u, v)
    return "small"


@lru_cache(maxsize=1024)
def _stacked(view: Dense) -> Dense:
    """The geometry of a stack of such weights."""
    out = tuple(axis + 1 if axis >= 0 else axis for axis in view.out_axes)
    inner = view.in_axes and tuple(axis + 1 if axis >= 0 else axis for axis in view.in_axes)
    return Dense(out, inner, batch_axes=(0,))
