"""Closures that evaluate a loss again: its penalties must come along each time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from specops_torch.constrained import Constrained


def with_penalty(
    closure: Callable[[], Any], due: Sequence[Constrained], step: int
) -> Callable[[], Any]:
    """The closure's loss and gradients plus those of the penalties, with vectors of now.

    An optimizer that calls it several times in one step, as LBFGS does, sees one function:
    vectors advance once, before the first call.
    """
    states: dict[str, Any] = {}
    for c in due:
        weight = c.location.parameter.detach()
        if c.state is None:
            c.state = c.rule.init(weight, c.geometry, c.name)
        _, c.state, _ = c.rule.update(weight, c.geometry, c.state, step=step, name=c.name)
        states[c.name] = c.state

    def wrapped() -> Any:
        # The caller's grad mode is the closure's: LBFGS enables it.
        loss = closure()
        with torch.no_grad():
            for c in due:
                parameter = c.location.parameter
                if parameter.grad is None:
                    continue
                value, gradient = c.rule.penalty(
                    parameter.detach(), c.geometry, states[c.name], step=step, name=c.name
                )
                parameter.grad.add_(gradient)
                loss = loss + value.to(loss.dtype) if torch.is_tensor(loss) else loss + float(value)
        return loss

    return wrapped
