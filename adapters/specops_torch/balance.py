"""`balance_norms` for a torch model: its chain of layers read off its modules."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from specops.errors import AdapterError
from specops.projections.balancing import balance_norms as balance
from specops_torch.collecting import recorded
from specops_torch.geometry import geometry_of
from specops_torch.own_forward import computes_plainly, hook_of_others, runs_in_turn
from specops_torch.reading import is_read_through

_HOMOGENEOUS = (
    nn.ReLU,
    nn.LeakyReLU,
    nn.PReLU,
    nn.Identity,
    nn.Flatten,
    nn.Unflatten,
    nn.Dropout,
    nn.Dropout1d,
    nn.Dropout2d,
    nn.Dropout3d,
    nn.MaxPool1d,
    nn.MaxPool2d,
    nn.MaxPool3d,
    nn.AvgPool1d,
    nn.AvgPool2d,
    nn.AvgPool3d,
    nn.AdaptiveAvgPool1d,
    nn.AdaptiveAvgPool2d,
    nn.AdaptiveAvgPool3d,
    nn.AdaptiveMaxPool1d,
    nn.AdaptiveMaxPool2d,
    nn.AdaptiveMaxPool3d,
    nn.Upsample,
)


@torch.no_grad()
def balance_norms(model: nn.Sequential, x: torch.Tensor) -> dict[str, float]:
    """Rescale a sequential ReLU network in place to equal operator norms; its function stays.

    Parameters
    ----------
    model : torch.nn.Sequential
        Linear and convolution layers with positively homogeneous modules between them (ReLU,
        pooling, flattening, dropout), nested sequentials included.
    x : torch.Tensor
        A batch of inputs, which determines the input sizes of the convolutions.

    Returns
    -------
    dict of str to float
        The factor of each layer's weight; their product is 1.

    Raises
    ------
    AdapterError
        A module that is no such layer (normalisation, residual blocks, other activations) or
        has hooks of others, a layer, a weight or a bias that occurs twice, or no layer at all.
    ValueError, NonFiniteError
        As in `specops.balance_norms`.

    References
    ----------
    Lin, Sekar & Fanti 2021, Proposition 2 and Theorem 1; see `specops.balance_norms`.
    """
    layers = _chain(model, "")
    names = [name for name, _ in layers]
    modules = [module for _, module in layers]
    if not modules:
        raise AdapterError("there is no linear or convolution layer to balance")
    shared = [p for m in modules for p in (m.weight, m.bias) if p is not None]
    if len(set(map(id, shared))) != len(shared):
        raise AdapterError(
            "a layer, a weight or a bias occurs twice in the chain, but can only be rescaled once"
        )
    seen = recorded(model, x)
    geometries = [seen[id(m)].geometry(m) if id(m) in seen else geometry_of(m) for m in modules]
    done = balance([m.weight for m in modules], geometries, [m.bias for m in modules])
    for module, weight, bias in zip(modules, done.weights, done.biases, strict=True):
        module.weight.copy_(weight)
        if bias is not None:
            module.bias.copy_(bias)
    return dict(zip(names, done.factors, strict=True))


def _chain(model: nn.Module, prefix: str) -> list[tuple[str, Any]]:
    layers: list[tuple[str, Any]] = []
    if not runs_in_turn(model):
        raise AdapterError(
            f"expected a torch.nn.Sequential, and one without a forward of its own, got "
            f"{type(model).__name__}: balancing would change the function"
        )
    _check_hooks(prefix.rstrip(".") or type(model).__name__, model)
    for name, module in model._modules.items():
        path = f"{prefix}{name}"
        if module is None:
            continue
        if isinstance(module, nn.Sequential):
            layers += _chain(module, f"{path}.")
            continue
        _check_hooks(path, module)
        if isinstance(module, nn.Linear | nn.modules.conv._ConvNd):
            if "weight" not in module._parameters or is_read_through(module):
                raise AdapterError(
                    f"{path} computes its weight (a parametrization or a forward rule), so "
                    f"rescaling its parameters would change the function: fold or remove that first"
                )
            layers.append((path, module))
        elif not isinstance(module, _HOMOGENEOUS) or not computes_plainly(module):
            raise AdapterError(
                f"{path} is a {type(module).__name__}, which does not commute with a positive "
                f"factor: balancing would change the function"
            )
    return layers


def _check_hooks(name: str, module: nn.Module) -> None:
    hook = hook_of_others(module)
    if hook is not None:
        raise AdapterError(
            f"{name} has a hook, {hook!r}, which may not commute with a positive factor: remove "
            f"it for the time of balancing"
        )
