"""Rules for torch's functions and methods, by name: how each changes a Lipschitz bound."""

from __future__ import annotations

import math
import operator
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from specops.geometry import Conv, Dense
from specops.measures import lipschitz_upper_bound as product
from specops_torch.lipschitz import layers
from specops_torch.lipschitz.rules import (
    Refused,
    Rule,
    Varying,
    factor,
    log,
    numel,
    only,
    repeats,
    root_of_squares,
    total,
    varying,
)


def is_constant(target: Any, args: tuple[Any, ...]) -> bool:
    """Whether a result does not depend on a tensor's values: its shape, say, or zeros like it."""
    if target is getattr:
        return args[1] in ("shape", "ndim", "dtype", "device", "layout", "is_cuda")
    return target in _OF_KIND


_OF_KIND = {
    *("size", "dim", "numel", "nelement", "new_zeros", "new_ones", "new_full", "is_floating_point"),
    *(torch.zeros_like, torch.ones_like, torch.full_like, torch.numel, torch.is_floating_point),
}


def _sum(value: torch.Tensor, /, a: Any, b: Any, *, alpha: float = 1.0) -> float:
    terms = [x.log + repeats(value, x) for x in varying(a)]
    return total([*terms, *(x.log + repeats(value, x) + log(abs(alpha)) for x in varying(b))])


def _concatenated(value: Any, /, parts: Any, *options: Any, **named: Any) -> float:
    return root_of_squares(x.log for x in varying(parts))


def _larger(value: torch.Tensor, /, a: Any, b: Any) -> float:
    """Each entry of a maximum changes no more than the same entry of one of the arguments."""
    return root_of_squares(x.log + repeats(value, x) for x in varying([a, b]))


def _choice(value: torch.Tensor, /, condition: Any, a: Any, b: Any) -> float:
    if any(True for _ in varying(condition)):
        raise Refused("it chooses by values that depend on the input, and may jump")
    return _larger(value, a, b)


def _product(value: torch.Tensor, /, a: Any, b: Any) -> float:
    factors = [*varying(a), *varying(b)]
    if len(factors) > 1:
        raise Refused(
            "a product of two values that depend on the input (a gate, attention) has no "
            "Lipschitz constant on all inputs"
        )
    (x,) = factors
    other = a if x is b else b
    return x.log + repeats(value, x) + log(_largest(other))


def _quotient(value: torch.Tensor, /, a: Any, b: Any) -> float:
    x = only(a)
    if any(True for _ in varying(b)):
        raise Refused("a quotient of values that depend on the input has no bounded slope")
    least = abs(b) if not torch.is_tensor(b) else float(b.detach().abs().min())
    if least == 0.0:
        raise Refused("it divides by zero")
    return x.log + repeats(value, x) - log(least)


def _largest(constant: Any) -> float:
    if torch.is_tensor(constant):
        numbers = constant.detach()
        numbers = numbers.int() if numbers.dtype == torch.bool else numbers
        return float(numbers.abs().max())
    return abs(float(constant))


def _repeating(value: torch.Tensor, /, x: Any, *options: Any, **named: Any) -> float:
    return only(x, options, named).log + repeats(value, x)


def _summing(value: torch.Tensor, /, x: Any, *options: Any, **named: Any) -> float:
    return only(x, options, named).log + 0.5 * math.log(numel(x.value) / numel(value))


def _averaging(value: torch.Tensor, /, x: Any, *options: Any, **named: Any) -> float:
    return only(x, options, named).log - 0.5 * math.log(numel(x.value) / numel(value))


def _selection(value: Any, /, x: Any, index: Any) -> float:
    """Basic indices take every entry at most once."""
    parts = index if isinstance(index, tuple) else (index,)
    for part in parts:
        if not (part is None or part is Ellipsis or isinstance(part, int | slice)):
            raise Refused(f"it is indexed by {type(part).__name__}, which may repeat entries")
    return only(x, index).log


def _attribute(value: Any, /, x: Any, name: str) -> float:
    if name not in ("T", "mT", "H", "mH"):
        raise Refused(f"its attribute {name!r} is not known to bound anything")
    return only(x).log


def _matrix_product(value: torch.Tensor, /, a: Any, b: Any) -> float:
    factors = [*varying(a), *varying(b)]
    if len(factors) > 1:
        return _product(value, a, b)
    (x,) = factors
    matrix = a if x is b else b
    if matrix.ndim != 2 or x.value.ndim < 2:
        raise Refused("a product with a stack of matrices, or of vectors, has no rule")
    return x.log + log(_norm(matrix, Dense()))


def _linear(value: torch.Tensor, /, x: Any, weight: Any, bias: Any = None) -> float:
    return only(x, weight, bias).log + log(_norm(weight, Dense()))


def _convolution(count: int) -> Rule:
    def rule(
        value: torch.Tensor,
        /,
        x: Any,
        weight: Any,
        bias: Any = None,
        stride: Any = 1,
        padding: Any = 0,
        dilation: Any = 1,
        groups: int = 1,
    ) -> float:
        source = only(x, weight, bias)
        geometry = Conv(
            tuple(source.value.shape[-count:]),
            stride=stride,
            padding=padding,
            dilation=dilation,
            groups=groups,
        )
        return source.log + log(_norm(weight, geometry))

    return rule


def _norm(weight: torch.Tensor, geometry: Any) -> float:
    return product([(weight.detach(), geometry)]).factors[0]


def _batch_norm(
    value: torch.Tensor,
    /,
    x: Any,
    mean: Any,
    var: Any,
    weight: Any = None,
    bias: Any = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> float:
    source = only(x, mean, var, weight, bias)
    if training or var is None:
        raise Refused("it normalises by the batch, and is no linear map")
    scale = torch.rsqrt(var.double() + eps)
    return source.log + log(float((scale if weight is None else scale * weight).abs().max()))


def _dropout(
    value: Any, x: Any, p: float = 0.5, training: bool = True, inplace: Any = None
) -> float:
    if training:
        raise Refused("it drops values in evaluation, too")
    return only(x).log


def _padding(result: Any, /, x: Any, pad: Any, mode: str = "constant", value: Any = None) -> float:
    if mode != "constant":
        raise Refused(f"padding by {mode} repeats entries, and has no rule")
    return only(x, pad, value).log


def _like(value: torch.Tensor, /, x: Any, other: Any) -> float:
    """The first argument in another's shape or dtype, whose values do not count."""
    return x.log + repeats(value, x) if isinstance(x, Varying) else -math.inf


def _reshaped(value: torch.Tensor, /, x: Any, *sizes: Any, **named: Any) -> float:
    if "dtype" in named or any(isinstance(size, torch.dtype) for size in sizes):
        raise Refused("it reads the bits of its numbers as other numbers")
    return only(x, sizes, named).log


def _parts(value: Any, /, x: Any, *options: Any, **named: Any) -> float:
    source = only(x, options, named)
    if numel(value) > numel(source.value):
        raise Refused("its parts overlap")
    return source.log


def _as(kind: Any, *takes: str) -> Rule:
    """The rule of a layer class, for the function that `takes` the same options in this order."""

    def rule(value: Any, /, x: Any, *options: Any, **named: Any) -> float:
        source = only(x, options, named)
        given = dict(zip(takes, options, strict=False)) | named
        given = {k: v for k, v in given.items() if k in takes and k != "inplace"}
        layer = kind(**given)
        found = layers.factor_of(layer, source.value, None)
        return source.log + log(found)

    return rule


def _leaky(value: Any, /, x: Any, weight: Any) -> float:
    return only(x, weight).log + log(layers.steeper(_largest(weight)))


def _soft(kind: Any) -> Rule:
    def rule(value: Any, /, x: Any, *options: Any, **named: Any) -> float:
        return only(x, options, named).log + log(layers.STEEPEST[kind])

    return rule


_ONE = (
    *("relu", "relu6", "tanh", "hardtanh", "logsigmoid", "softsign", "abs", "clamp", "clip"),
    *("clamp_min", "clamp_max", "softshrink", "tanhshrink", "sin", "cos", "arctan", "atan"),
    *("flatten", "unflatten", "reshape", "permute", "transpose", "t", "swapaxes"),
    *("swapdims", "movedim", "moveaxis", "squeeze", "unsqueeze", "contiguous", "clone", "detach"),
    *("to", "float", "double", "narrow", "select", "chunk", "split"),
    *("unbind", "flip", "roll", "amax", "amin", "pixel_shuffle", "pixel_unshuffle"),
    *("channel_shuffle", "neg", "negative", "pos", "positive"),
)
_POOL = ("kernel_size", "stride", "padding")
_MAX = (*_POOL, "dilation", "ceil_mode", "return_indices")
_MEAN = (*_POOL, "ceil_mode", "count_include_pad", "divisor_override")

_RULES: dict[str, Rule] = {
    **dict.fromkeys(_ONE, factor(1.0)),
    **dict.fromkeys(("add", "iadd", "sub", "isub", "subtract"), _sum),
    **dict.fromkeys(("cat", "concat", "concatenate", "stack", "hstack", "vstack"), _concatenated),
    **dict.fromkeys(("maximum", "minimum", "fmax", "fmin"), _larger),
    **dict.fromkeys(("mul", "imul", "multiply"), _product),
    **dict.fromkeys(("div", "truediv", "itruediv", "divide", "true_divide"), _quotient),
    **dict.fromkeys(("matmul", "imatmul", "mm"), _matrix_product),
    **dict.fromkeys(("expand", "broadcast_to", "repeat", "tile"), _repeating),
    **dict.fromkeys(("expand_as", "view_as", "reshape_as", "type_as"), _like),
    **dict.fromkeys(("dropout", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout"), _dropout),
    "feature_alpha_dropout": _dropout,
    "view": _reshaped,
    "tensor_split": _parts,
    "sum": _summing,
    "mean": _averaging,
    "getitem": _selection,
    "where": _choice,
    "linear": _linear,
    **{f"conv{n}d": _convolution(n) for n in (1, 2, 3)},
    "batch_norm": _batch_norm,
    "pad": _padding,
    "prelu": _leaky,
    "leaky_relu": _as(nn.LeakyReLU, "negative_slope", "inplace"),
    "elu": _as(nn.ELU, "alpha", "inplace"),
    "celu": _as(nn.CELU, "alpha", "inplace"),
    "softplus": _as(nn.Softplus, "beta", "threshold"),
    **{kind.__name__.lower(): _soft(kind) for kind in layers.STEEPEST},
}
for _n, _suffix in ((1, "1d"), (2, "2d"), (3, "3d")):
    _RULES |= {
        f"max_pool{_suffix}": _as(getattr(nn, f"MaxPool{_suffix}"), *_MAX),
        f"avg_pool{_suffix}": _as(getattr(nn, f"AvgPool{_suffix}"), *_MEAN),
        f"adaptive_avg_pool{_suffix}": _as(getattr(nn, f"AdaptiveAvgPool{_suffix}"), "output_size"),
        f"adaptive_max_pool{_suffix}": _as(getattr(nn, f"AdaptiveMaxPool{_suffix}"), "output_size"),
    }

METHODS: dict[str, Rule] = {n + end: rule for n, rule in _RULES.items() for end in ("", "_")}
FUNCTIONS: dict[Any, Rule] = {
    getattr(home, name + end): rule
    for home in (operator, torch, functional)
    for name, rule in _RULES.items()
    for end in ("", "_")
    if hasattr(home, name + end)
} | {getattr: _attribute}
