"""Gradients at a step: penalties are added, and weights that no forward pass used are refused."""

from __future__ import annotations

from collections.abc import Container, Sequence
from typing import Any

import torch

from specops.errors import AdapterError
from specops.training.outcome import Outcome
from specops_torch.collectives import highest, is_distributed
from specops_torch.constrained import Constrained
from specops_torch.sharded_constrained import ShardedConstrained


def with_gradient(due: Sequence[Constrained]) -> list[Constrained]:
    """The weights with a gradient, to which a penalty can be added.

    Raises
    ------
    AdapterError
        A sparse gradient.
    """
    found = []
    for c in due:
        gradient = c.location.parameter.grad
        if gradient is not None and gradient.is_sparse:
            raise AdapterError(f"{c.name} has a sparse gradient, which a penalty would fill")
        if gradient is not None:
            found.append(c)
    return found


def add_terms(
    outcomes: Sequence[Outcome[Constrained]],
    loss_scale: torch.Tensor | None,
    maximized: Container[int],
) -> None:
    """Add the terms of rules to gradients, scaled like the loss; subtract if it is maximized."""
    for o in outcomes:
        c, step, scale = o.constrained, o.record["step"], loss_scale
        if id(c.location.parameter) in maximized:
            scale = torch.tensor(-1.0) if scale is None else -scale
        # Where the outcome has the weight in place of a term, the vectors give the term λσuvᴴ.
        by_vectors = o.array is o.weight and c.rule.formula == "penalty"
        if o.array is not None and isinstance(c, ShardedConstrained):
            c.add_term(step, None if by_vectors else o.array, o.state, scale)
        elif by_vectors:
            _add_dyads(c, o.state, step, scale)
        elif o.array is not None:
            gradient = c.location.parameter.grad
            assert gradient is not None
            gradient.add_(o.array if scale is None else o.array * scale.to(o.array.device))
        c.keep(o)


def check_ran(constrained: Sequence[Constrained]) -> None:
    """Raise if a weight is trained although its forward rule never saw a forward pass."""
    for c in constrained:
        if c.in_use is None or c.in_use.ran:
            continue
        gradient = c.location.parameter.grad
        if gradient is None or c.has_seen(gradient):
            continue
        if isinstance(c, ShardedConstrained):
            layout = c.location.known
            own = int(bool(gradient.to_local().any()))
            (used,) = highest([own], layout.group, layout.device)
        elif is_distributed():
            continue  # DDP gives every rank the gradients of layers that ran on any
        else:
            used = int(bool(gradient.any()))
        if used:
            raise AdapterError(
                f"{c.name} has a gradient, but the forward of its layer was not called since "
                f"the last step: something else uses the weight, and {c.rule!r} did not act on "
                f'it. Exclude it with ("{c.name}", None), or constrain it after the step'
            )


def about_to_step(constrained: Sequence[Constrained]) -> None:
    """Writes from now to the end of the step count as the step. Earlier ones do not."""
    for c in constrained:
        if c.in_use is not None and not c.in_use.is_fresh(c.location.parameter):
            c.in_use.forget()


def stepped(constrained: Sequence[Constrained]) -> None:
    """Remember the gradients that have been used, and wait for the next forward passes."""
    for c in constrained:
        if c.in_use is not None:
            c.see(c.location.parameter.grad)
            c.in_use.ran = False


def _add_dyads(c: Constrained, state: Any, step: int, scale: Any) -> None:
    """Add λσuvᵀ to each block of rows of the gradient, in place."""
    gradient, geometry = c.location.parameter.grad, c.geometry
    strength, follow = c.gradient_rule.strength_at(step, c.name, geometry), c.rule.tracked(geometry)
    assert gradient is not None
    assert follow is not None
    on_host = gradient.is_cpu and (scale is None or scale.is_cpu)
    vectors = follow.directions(state)
    pairs = list(zip(vectors[::2], vectors[1::2], follow.measured(state), strict=True))
    parts = (gradient,) if len(pairs) == 1 else gradient.split([u.numel() for u, _, _ in pairs])
    for part, (u, v, sigma) in zip(parts, pairs, strict=True):
        rows = part.view(u.numel(), -1)
        if on_host:
            factor = float(strength) * sigma.item() * (1.0 if scale is None else scale.item())
            rows.addr_(u, v, alpha=factor)
        else:
            factor = strength * sigma
            rows.addr_(u * (factor if scale is None else factor * scale.to(u.device)), v)
