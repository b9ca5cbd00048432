"""The Lipschitz bound of a sequential torch model, read off its layers."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from specops.errors import AdapterError
from specops.measures import LipschitzBound
from specops.measures import lipschitz_upper_bound as product
from specops_torch.batch_norms import BATCH_NORMS, diagonal
from specops_torch.evaluation import evaluating
from specops_torch.geometry import CONVOLUTIONS, geometry_of
from specops_torch.own_forward import has_own_forward
from specops_torch.sizes import SizeRecorder

_ONE = (
    nn.Identity,
    nn.Flatten,
    nn.Unflatten,
    nn.ReLU,
    nn.ReLU6,
    nn.Tanh,
    nn.Hardtanh,
    nn.LogSigmoid,
    nn.Softsign,
    nn.Dropout,
    nn.Dropout1d,
    nn.Dropout2d,
    nn.Dropout3d,
    nn.AlphaDropout,
    nn.PixelShuffle,
    nn.PixelUnshuffle,
    nn.ChannelShuffle,
)
_MAX_POOL = (nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d)
_AVERAGE_POOL = (nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d)
_OURS = ("specops_torch", "torch.nn.utils")
_NO_JUMP = 20.0
_ADAPTIVE = (nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d)
_STEEPEST = {nn.Sigmoid: 0.25, nn.GELU: 1.1291, nn.SiLU: 1.0999, nn.Softmax: 0.5}
"""Largest slopes, rounded up; of the softmax, the largest norm of its Jacobian."""


def lipschitz_upper_bound(model: nn.Module, input_shape: tuple[int, ...]) -> LipschitzBound:
    r"""An upper bound of a sequential model's Lipschitz constant in evaluation.

    .. math:: \prod_i\|W_i\|_2\,\prod_i Lip(a_i)

    Operator norms at the sizes that convolutions see; batch normalisation as the diagonal map
    :math:`\gamma/\sqrt{var + \varepsilon}` that it is in evaluation.

    Parameters
    ----------
    model : torch.nn.Sequential
        Nested ones too; single layers pass. Its mode stays as it is. Weights are those in use:
        normalised or reparametrised ones as the forward pass sees them.
    input_shape : tuple of int
        Of one sample: (channels, height, width).

    Returns
    -------
    specops.measures.LipschitzBound
        With a factor for every layer, in the order of the model.

    Raises
    ------
    AdapterError
        A layer whose constant is not known, one with a forward or hooks of its own, or a block
        that is not sequential: compute its factor, and give the numbers to
        `specops.measures.lipschitz_upper_bound`.

    Examples
    --------
    >>> model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.ReLU())
    >>> model[0].weight.data = torch.diag(torch.tensor([3.0, 1.0]))
    >>> round(lipschitz_upper_bound(model, (2,)).value, 4)
    3.0
    """
    layers: list[Any] = []
    x = torch.zeros((1, *input_shape))
    parameter = next(model.parameters(), None)
    x = x if parameter is None else x.to(parameter)
    for name, layer in _chain("", model):
        y, weight = _run(name, layer, x)
        layers.append(_factor(name, layer, x, weight))
        x = y
    return product(layers)


def _chain(name: str, module: nn.Module) -> list[tuple[str, nn.Module]]:
    _check_plain(name or type(module).__name__, module)
    if isinstance(module, nn.Sequential):
        # Not `named_children`, which gives a shared layer once.
        return [
            pair
            for key, child in module._modules.items()
            if child is not None
            for pair in _chain(f"{name}.{key}".lstrip("."), child)
        ]
    return [(name or type(module).__name__, module)]


def _check_plain(name: str, module: nn.Module) -> None:
    """Raise where a module computes something else than its class of torch does."""
    own = has_own_forward(module)
    hooks = (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
    foreign = [
        h
        for h in hooks
        if not type(h).__module__.startswith(_OURS)
        and not (getattr(h, "__module__", "") or "").startswith(_OURS)
    ]
    if own or foreign:
        what = "a forward of its own" if own else f"a hook, {foreign[0]!r}"
        raise AdapterError(
            f"{name} ({type(module).__name__}) has {what}: its Lipschitz constant is not known. "
            f"Compute it, and give the factors of all layers to "
            f"specops.measures.lipschitz_upper_bound"
        )


def _run(name: str, layer: nn.Module, x: torch.Tensor) -> tuple[torch.Tensor, Any]:
    """(the output in evaluation, the weight that the layer used), nothing of it left behind."""
    used: list[torch.Tensor] = []
    if isinstance(layer, BATCH_NORMS):
        diagonal(name, layer)

    def look(module: nn.Module, _: Any) -> None:
        # The last pre-hook: what others put into the weight's place is there.
        weight = getattr(module, "weight", None)
        used.append(weight if weight is None else weight.detach().clone())

    recorders = [h for h in layer._forward_hooks.values() if isinstance(h, SizeRecorder)]
    known = [dict(vars(recorder)) for recorder in recorders]
    handle = layer.register_forward_pre_hook(look)
    try:
        with evaluating(layer), torch.no_grad():
            y = layer(x)
    finally:
        handle.remove()
        for recorder, state in zip(recorders, known, strict=True):
            vars(recorder).update(state)
    if not isinstance(y, torch.Tensor):
        raise AdapterError(f"{name} ({type(layer).__name__}) gives {type(y).__name__}, no tensor")
    return y, used[0]


def _factor(name: str, layer: nn.Module, x: torch.Tensor, weight: Any) -> Any:
    if isinstance(layer, CONVOLUTIONS):
        spatial = tuple(x.shape[-len(layer.kernel_size) :])
        return weight, geometry_of(layer, input_shape=spatial)
    if isinstance(layer, nn.Linear):
        return weight, geometry_of(layer)
    if isinstance(layer, _ONE):
        return 1.0
    if type(layer) in _STEEPEST:
        return _STEEPEST[type(layer)]
    if isinstance(layer, nn.LeakyReLU):
        return max(1.0, abs(layer.negative_slope))
    if isinstance(layer, nn.ELU):
        return max(1.0, abs(layer.alpha))
    # Where they bend the wrong way or jump nothing bounds them.
    smooth = isinstance(layer, nn.CELU) and layer.alpha > 0
    if smooth or (isinstance(layer, nn.Softplus) and layer.threshold >= _NO_JUMP):
        return 1.0
    if isinstance(layer, nn.PReLU):
        return max(1.0, float(layer.weight.detach().abs().max()))
    if isinstance(layer, BATCH_NORMS):
        return float(diagonal(name, layer).abs().max())
    if isinstance(layer, _MAX_POOL):
        return math.sqrt(_windows(layer))
    if isinstance(layer, (*_AVERAGE_POOL, *_ADAPTIVE)):
        return _average(layer, tuple(x.shape[2:]))
    raise AdapterError(
        f"{name} ({type(layer).__name__}): its Lipschitz constant is not known. Compute it, and "
        f"give the factors of all layers to specops.measures.lipschitz_upper_bound"
    )


def _windows(layer: Any) -> int:
    """In how many windows of a max pooling an entry may be."""
    count = next(n for n, kind in enumerate(_MAX_POOL, 1) if isinstance(layer, kind))
    options = (layer.kernel_size, layer.stride, layer.dilation)
    axes = zip(*(_sizes(option, count) for option in options), strict=True)
    return math.prod(k if d > 1 else -(-k // s) for k, s, d in axes)


def _average(layer: Any, spatial: tuple[int, ...]) -> float:
    """The norm of an average pooling: the product of what it is along each axis."""
    count = len(spatial)
    if getattr(layer, "divisor_override", None):
        raise AdapterError(f"{type(layer).__name__} with divisor_override is no average")
    norm = 1.0
    for axis, size in enumerate(spatial):
        eye = torch.eye(size, dtype=torch.float64)[:, None, :]
        if isinstance(layer, _ADAPTIVE):
            wanted = _sizes(layer.output_size, count)[axis]
            image = nn.functional.adaptive_avg_pool1d(eye, size if wanted is None else wanted)
        else:
            options = (layer.kernel_size, layer.stride, layer.padding)
            image = nn.functional.avg_pool1d(
                eye,
                *(_sizes(option, count)[axis] for option in options),
                layer.ceil_mode,
                layer.count_include_pad,
            )
        norm *= float(torch.linalg.matrix_norm(image[:, 0, :], 2))
    return norm


def _sizes(option: Any, count: int) -> tuple[Any, ...]:
    return tuple(option) if isinstance(option, tuple | list) else (option,) * count
