"""Penalties on Jacobians, of a whole model and of its layers, as terms of a loss."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import nn

from specops.errors import AdapterError
from specops_torch.chosen_layers import check_all_ran, chosen_layers
from specops_torch.geometry import CONVOLUTIONS

Model = Callable[[torch.Tensor], torch.Tensor]


def jacobian_penalty(
    model: Model,
    x: torch.Tensor,
    *,
    projections: int | None = 1,
    generator: torch.Generator | None = None,
) -> torch.Tensor:
    r"""Mean over the batch of :math:`\tfrac12\|\partial f(x)/\partial x\|_F^2`.

    Estimated without bias by :math:`\tfrac K2\|J^Tv\|^2` for v uniform on the unit sphere of
    the K outputs, or summed over all outputs.

    Parameters
    ----------
    model : callable
        Maps (N, ...) to (N, ...), every sample independently. Batch norm in training mode mixes
        samples; the gradient is then that of the sum over the batch.
    x : torch.Tensor
        Shape (N, ...).
    projections : int or None
        Number of random directions, which cost one backward pass each. None computes the exact
        value, with one backward pass for each output.
    generator : torch.Generator, optional
        The generator of the random directions.

    Returns
    -------
    torch.Tensor
        A 0-d tensor, differentiable with respect to the parameters: add λ times it to the loss.

    Raises
    ------
    ValueError
        `projections` is below 1.

    References
    ----------
    Yoshida & Miyato 2017, section 3.3; Hoffman, Roberts & Yaida 2019 (random projections).

    Examples
    --------
    >>> layer = torch.nn.Linear(2, 2, bias=False)
    >>> _ = torch.nn.init.eye_(layer.weight)
    >>> jacobian_penalty(layer, torch.ones(3, 2), projections=None).item()
    1.0
    """
    _check_projections(projections)
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        return _half_squared_norm(model(x), x, projections, generator)


def layerwise_jacobian_penalty(
    model: nn.Module,
    x: torch.Tensor,
    layers: Sequence[str] | None = None,
    *,
    projections: int | None = 1,
    generator: torch.Generator | None = None,
) -> torch.Tensor:
    r"""Mean over the batch of :math:`\tfrac12\sum_\ell\|\partial x^\ell/\partial x^{\ell-1}\|_F^2`.

    :math:`x^{\ell-1}` is the input of the ℓ-th layer and :math:`x^\ell` that of the next, so that
    the activations between them are included; for the last layer it is the model's output. This
    is cheaper to minimise than the norm of the whole Jacobian, and similar to weight decay: the
    same if there are no activations.

    Parameters
    ----------
    model : torch.nn.Module
        Maps every sample independently, as for `jacobian_penalty`; its mode is left as it is.
    x : torch.Tensor
        Shape (N, ...).
    layers : sequence of str, optional
        Names of the layers, in the order in which they run; None stands for all linear and
        convolution layers. In a model with branches each derivative is that through the named
        layer, while the other branches are held fixed.
    projections, generator
        As for `jacobian_penalty`, for each layer.

    Returns
    -------
    torch.Tensor
        A 0-d tensor, differentiable with respect to the parameters: add λ times it to the loss.

    Raises
    ------
    ValueError
        `projections` is below 1.
    AdapterError
        A name is not one of the model's, there are no layers, or a layer did not run, ran twice,
        or does not feed the next.

    References
    ----------
    Gu & Rigazio 2014; Yoshida & Miyato 2017, section 3.3.

    Examples
    --------
    >>> layer = nn.Linear(2, 2, bias=False)
    >>> _ = nn.init.eye_(layer.weight)
    >>> model = nn.Sequential(layer, nn.ReLU(), nn.Linear(2, 2, bias=False))
    >>> _ = nn.init.eye_(model[2].weight)
    >>> layerwise_jacobian_penalty(model, torch.tensor([[1.0, -1.0]]), projections=None).item()
    1.5
    """
    _check_projections(projections)
    chosen = chosen_layers(model, layers, (nn.Linear, *CONVOLUTIONS))
    entered: dict[str, torch.Tensor] = {}

    def enter(name: str) -> Any:
        def hook(_: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
            if name in entered:
                raise AdapterError(f"{name} ran twice: what enters it is no single x")
            # A copy, so that derivatives end at this layer and nothing writes to it.
            given = args[0] if args else next(iter(kwargs.values()))
            own = given.clone() if given.requires_grad else given.clone().requires_grad_()
            entered[name] = own
            if args:
                return (own, *args[1:]), kwargs
            return args, kwargs | {next(iter(kwargs)): own}

        return hook

    handles = [
        layer.register_forward_pre_hook(enter(name), with_kwargs=True) for name, layer in chosen
    ]
    try:
        with torch.enable_grad():
            output = model(x)
    finally:
        for handle in handles:
            handle.remove()
    check_all_ran(chosen, entered)
    points = [*entered.values(), output]
    with torch.enable_grad():
        terms = [
            _half_squared_norm(after, before, projections, generator)
            for before, after in pairwise(points)
        ]
        return torch.stack(terms).sum()


def _check_projections(projections: int | None) -> None:
    if projections is not None and projections < 1:
        raise ValueError(f"projections must be at least 1 or None, got {projections}")


def _half_squared_norm(
    y: torch.Tensor,
    x: torch.Tensor,
    projections: int | None,
    generator: torch.Generator | None,
) -> torch.Tensor:
    """Mean over the batch of ½‖∂y/∂x‖_F², or an estimate without bias."""
    outputs = y.reshape(len(x), -1)
    count = outputs.shape[1]
    total = outputs.new_zeros(())
    if projections is None:
        directions = torch.eye(count, dtype=outputs.dtype, device=outputs.device)
        directions = directions[:, None, :].expand(-1, len(x), -1)
        weight = 1.0
    else:
        shape = (projections, len(x), count)
        directions = torch.randn(
            shape, generator=generator, dtype=outputs.dtype, device=outputs.device
        )
        directions = directions / directions.norm(dim=-1, keepdim=True)
        weight = count / projections
    for v in directions:
        (row,) = torch.autograd.grad(outputs, x, v, create_graph=True, allow_unused=True)
        if row is None:
            raise AdapterError(
                "an output does not depend on its input: name layers that follow each other"
            )
        total = total + row.square().sum()
    return 0.5 * weight * total / len(x)
