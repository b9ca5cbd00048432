"""The factors that single torch layers contribute to a Lipschitz bound."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from specops.geometry import Geometry
from specops.measures import lipschitz_upper_bound as product
from specops_torch.batch_norms import BATCH_NORMS, diagonal, scaled
from specops_torch.geometry import CONVOLUTIONS, geometry_of
from specops_torch.lipschitz.rules import Refused, reason
from specops_torch.sizes import unrecorded

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
    nn.Softshrink,
    nn.Tanhshrink,
    nn.ZeroPad1d,
    nn.ZeroPad2d,
    nn.ZeroPad3d,
    nn.ConstantPad1d,
    nn.ConstantPad2d,
    nn.ConstantPad3d,
)
_MAX_POOL = (nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d)
_AVERAGE_POOL = (nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d)
_NO_JUMP = 20.0
"""The least threshold of Softplus, torch's default, at which its jump to the identity, e⁻²⁰, is
less than the rounding of 20 in float32."""
_ADAPTIVE = (nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d)
_ADAPTIVE_MAX = (nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d)
STEEPEST = {
    nn.Sigmoid: 0.25,
    nn.GELU: 1.1291,
    nn.SiLU: 1.0999,
    nn.Mish: 1.0885,
    nn.SELU: 1.7581,
    nn.Hardswish: 1.5,
    nn.Hardsigmoid: 1.0 / 6.0,
    nn.Softmax: 0.5,
}
"""Largest slopes, rounded up; of the softmax, the largest norm of its Jacobian."""


def run(name: str, layer: nn.Module, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
    """(the output, the weight that the layer used); leaves no hooks behind."""
    used: list[Any] = []
    if isinstance(layer, BATCH_NORMS):
        diagonal(name, layer)

    def look(module: nn.Module, _: Any) -> None:
        # This pre-hook runs last, after those that compute the weight.
        weight = getattr(module, "weight", None)
        used.append(weight if weight is None else weight.detach().clone())

    handle = layer.register_forward_pre_hook(look)
    try:
        with unrecorded([layer]):
            # Not layer(...): what a subclass's own __call__ adds is traced as separate operations.
            y = nn.Module.__call__(layer, *args, **kwargs)
    finally:
        handle.remove()
    return y, used[0]


def factor_of(layer: nn.Module, x: torch.Tensor, weight: Any) -> float:
    """The Lipschitz constant of a layer on inputs like `x`, or a bound of it."""
    if isinstance(layer, (*CONVOLUTIONS, nn.Linear)):
        return product([(weight, _geometry(layer, x))]).factors[0]
    if isinstance(layer, BATCH_NORMS):
        return float(diagonal(type(layer).__name__, layer).abs().max())
    if x.is_complex():
        raise Refused("its Lipschitz constant is not known for complex numbers")
    known = _of_activation(layer)
    return _of_pooling(layer, tuple(x.shape)) if known is None else known


def joint_factor(layer: nn.Module, x: torch.Tensor, weight: Any, norm: Any) -> float:
    """The norm of a layer and the batch normalisation after it, as one map."""
    joint = scaled(layer, weight, diagonal(type(norm).__name__, norm))
    return product([(joint, _geometry(layer, x))]).factors[0]


def _geometry(layer: Any, x: torch.Tensor) -> Geometry:
    if isinstance(layer, nn.Linear):
        return geometry_of(layer)
    return geometry_of(layer, input_shape=tuple(x.shape[-len(layer.kernel_size) :]))


def _of_activation(layer: nn.Module) -> float | None:
    if isinstance(layer, _ONE):
        return 1.0
    steepest = [slope for kind, slope in STEEPEST.items() if isinstance(layer, kind)]
    if steepest:
        return steepest[0]
    if isinstance(layer, nn.LeakyReLU):
        return steeper(abs(float(layer.negative_slope)))
    if isinstance(layer, nn.ELU):
        return steeper(abs(float(layer.alpha)))
    # With other parameters these functions jump, or have no bounded slope.
    smooth = isinstance(layer, nn.CELU) and layer.alpha > 0
    if smooth or (isinstance(layer, nn.Softplus) and layer.threshold >= _NO_JUMP):
        return 1.0
    if isinstance(layer, nn.PReLU):
        return steeper(float(layer.weight.detach().abs().max()))
    return None


def steeper(slope: float) -> float:
    """The larger of a slope and 1; NaN stays NaN."""
    return slope if math.isnan(slope) else max(1.0, slope)


def _of_pooling(layer: nn.Module, shape: tuple[int, ...]) -> float:
    if isinstance(layer, _MAX_POOL):
        return math.sqrt(_windows(layer))
    if isinstance(layer, _ADAPTIVE_MAX):
        return math.sqrt(_adaptive_windows(layer, _pooled(shape, layer, _ADAPTIVE_MAX)))
    for kinds in (_AVERAGE_POOL, _ADAPTIVE):
        if isinstance(layer, kinds):
            return _average(layer, _pooled(shape, layer, kinds))
    raise Refused(reason(type(layer).__name__))


def _axes(layer: nn.Module, kinds: tuple[type[nn.Module], ...]) -> int:
    """How many axes a layer pools over; `kinds` are the classes for 1, 2 and 3 axes."""
    return next(n for n, kind in enumerate(kinds, 1) if isinstance(layer, kind))


def _pooled(
    shape: tuple[int, ...], layer: nn.Module, kinds: tuple[type[nn.Module], ...]
) -> tuple[int, ...]:
    """The axes that are pooled over: the last ones, with or without a batch before them."""
    return shape[-_axes(layer, kinds) :]


def _windows(layer: Any) -> int:
    """The number of windows of a max pooling in which an entry may be."""
    count = _axes(layer, _MAX_POOL)
    options = (layer.kernel_size, layer.stride, layer.dilation)
    axes = zip(*(_sizes(option, count) for option in options), strict=True)
    return math.prod(k if d > 1 else -(-k // s) for k, s, d in axes)


def _adaptive_windows(layer: Any, spatial: tuple[int, ...]) -> int:
    """The same for adaptive pooling, whose window i of m reaches from ⌊in/m⌋ to ⌈(i + 1)n/m⌉."""
    most = 1
    for n, wanted in zip(spatial, _sizes(layer.output_size, len(spatial)), strict=True):
        m = n if wanted is None else wanted
        windows = [range(i * n // m, -(-(i + 1) * n // m)) for i in range(m)]
        most *= max(sum(p in window for window in windows) for p in range(n))
    return most


def _average(layer: Any, spatial: tuple[int, ...]) -> float:
    """The norm of an average pooling: the product of its norms along the axes."""
    count = len(spatial)
    if getattr(layer, "divisor_override", None):
        raise Refused("with divisor_override it is no average")
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
