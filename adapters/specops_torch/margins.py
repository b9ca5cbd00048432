"""Gradients of a torch model's margins by its hidden layers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from specops.errors import AdapterError
from specops.measures import MarginJacobians, margins
from specops.measures.rows import row_norms
from specops_torch.chosen_layers import check_all_ran, chosen_layers
from specops_torch.evaluation import evaluating

_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


def margin_jacobians(
    model: nn.Module, x: Tensor, labels: Tensor, layers: Sequence[str] | None = None
) -> MarginJacobians:
    r"""Norms of hidden layers and of the margin's gradients with respect to them, by sample.

    Parameters
    ----------
    model : torch.nn.Module
        Gives logits (n, classes). It is run in evaluation mode and then returned to its own mode.
    x : tensor (n, ...)
        Inputs.
    labels : integer tensor (n,)
        Indices of the right classes.
    layers : sequence of str, optional
        Names of the modules whose outputs are the hidden layers; default: all linear and
        convolution layers but the last.

    Raises
    ------
    AdapterError
        A name is not one of the model's, or a module did not run or ran twice.
    """
    chosen = chosen_layers(model, layers, _LAYERS, with_last=False)
    seen: dict[str, Tensor] = {}

    def keep(name: str) -> Any:
        def hook(_: nn.Module, __: Any, output: Any) -> Tensor:
            if name in seen:
                raise AdapterError(f"{name} ran twice: its output is no single hidden layer")
            if not isinstance(output, Tensor):
                raise AdapterError(f"{name} gives {type(output).__name__}, no tensor")
            seen[name] = output if output.requires_grad else output.detach().requires_grad_()
            # The next layer gets a copy, because activations may write to it in place.
            return seen[name].clone()

        return hook

    handles = [layer.register_forward_hook(keep(name)) for name, layer in chosen]
    try:
        with evaluating(model), torch.inference_mode(False), torch.enable_grad():
            found = margins(model(x.clone()), labels)
            total = found.sum()
    finally:
        for handle in handles:
            handle.remove()
    check_all_ran(chosen, seen)
    hidden = [seen[name] for name, _ in chosen]
    with torch.inference_mode(False):
        gradients = torch.autograd.grad(total, hidden, materialize_grads=True)

    def norms(tensors: Sequence[Tensor]) -> Tensor:
        return torch.stack([row_norms(t.detach()) for t in tensors])

    return MarginJacobians(norms(hidden), norms(gradients), found.detach())
