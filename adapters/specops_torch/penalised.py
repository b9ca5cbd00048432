"""Closures for optimizers that evaluate the loss several times: each time penalties are added."""

from __future__ import annotations

from collections.abc import Callable, Container, Sequence
from typing import Any

import torch

from specops.errors import AdapterError, SpecopsError
from specops.training.outcome import Outcome
from specops_torch.constrained import Constrained
from specops_torch.sharded_constrained import ShardedConstrained


def searching(closure: Callable[[], Any], constrained: Sequence[Constrained]) -> Callable[[], Any]:
    """The closure, wrapped so that changes of weights within it count as the optimizer's steps.

    A line search compares values of one function, so the singular vectors must stay as they are.
    """
    uses = [c.in_use for c in constrained if c.in_use is not None]

    def wrapped() -> Any:
        for in_use in uses:
            in_use.searching = True
        try:
            return closure()
        finally:
            for in_use in uses:
                in_use.searching = False

    return wrapped if uses else closure


def refuse_parts(due: Sequence[Constrained]) -> None:
    """Raise if a penalty is due of a weight that no rank holds as a whole."""
    for c in due:
        if isinstance(c, ShardedConstrained):
            raise AdapterError(
                f"{c.name}: closures see a penalty as one function, which is not known part by "
                f"part of sharded weights: step without a closure"
            )


def with_penalty(
    closure: Callable[[], Any],
    outcomes: Sequence[Outcome[Constrained]],
    step: int,
    maximized: Container[int],
) -> Callable[[], Any]:
    """The closure with the penalties added to its loss and gradients (subtracted if maximized).

    Their vectors are those of `outcomes`, a firing before the step, and stay fixed: an optimizer
    that calls the closure several times in one step, as LBFGS does, sees one function. A closure
    that returns nothing still returns nothing.
    """

    for o in outcomes:
        o.constrained.keep(o)
    due = [o.constrained for o in outcomes if o.array is not None]

    def wrapped() -> Any:
        # Called in the grad mode of the caller, which LBFGS sets.
        loss = closure()
        with torch.no_grad():
            for c in due:
                parameter = c.location.parameter
                if parameter.grad is None:
                    continue
                try:
                    assert c.state is not None
                    value, gradient = c.gradient_rule.penalty(
                        parameter.detach(), c.geometry, c.state, step=step, name=c.name
                    )
                except SpecopsError as error:
                    raise type(error)(f"{c.name} at step {step}: {error}") from error
                except Exception as error:
                    error.add_note(f"while {c.rule!r} acted on {c.name} at step {step}")
                    raise
                sign = -1.0 if id(parameter) in maximized else 1.0
                parameter.grad.add_(gradient, alpha=sign)
                if torch.is_tensor(loss):
                    loss = loss + sign * value.to(loss.device, loss.dtype)
                elif loss is not None:
                    loss = loss + sign * float(value)
        return loss

    return wrapped
