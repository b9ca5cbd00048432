"""Rules: from Lipschitz bounds of an operation's arguments to that of its value, in logarithms."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch

Rule = Callable[..., float]

_UNBOUNDED = "its slope has no bound"
_ATTENTION = "attention has no Lipschitz constant on all inputs"
_STATISTICS = "it divides by a statistic of its input, which only its epsilon keeps from zero"
_REASONS = {
    **dict.fromkeys(("pow", "square", "exp", "sqrt", "log", "reciprocal", "rsqrt"), _UNBOUNDED),
    **dict.fromkeys(("MultiheadAttention", "scaled_dot_product_attention"), _ATTENTION),
    **dict.fromkeys(("LayerNorm", "GroupNorm", "RMSNorm", "LocalResponseNorm"), _STATISTICS),
    **dict.fromkeys(("layer_norm", "group_norm", "rms_norm", "normalize"), _STATISTICS),
    **{f"InstanceNorm{n}d": _STATISTICS for n in (1, 2, 3)},
}


def reason(name: str) -> str:
    """Why an operation of this name has no rule."""
    return _REASONS.get(name.rstrip("_"), "its Lipschitz constant is not known")


class Refused(Exception):
    """Raised with the reason why no bound of an operation is known."""


@dataclass(frozen=True)
class Varying:
    """An argument that depends on the input, and the logarithm of its Lipschitz bound."""

    value: Any
    log: float


def log(x: float) -> float:
    """The logarithm; -inf for zero."""
    if math.isnan(x):
        raise Refused("it holds NaN")
    return math.log(x) if x > 0.0 else -math.inf


def only(x: Any, *others: Any) -> Varying:
    """The first argument, if it alone depends on the input; refuses other cases."""
    if not isinstance(x, Varying):
        raise Refused("it depends on the input by another argument than its first")
    if any(True for _ in varying(others)):
        raise Refused(
            "it takes two arguments that depend on the input, and no rule for that is known"
        )
    return x


def varying(arguments: Any) -> Iterable[Varying]:
    """Every argument that depends on the input, also in containers, as often as it occurs."""
    if isinstance(arguments, Varying):
        yield arguments
    elif isinstance(arguments, list | tuple):
        for a in arguments:
            yield from varying(a)
    elif isinstance(arguments, dict):
        yield from varying(list(arguments.values()))


def numel(x: Any) -> int:
    """The number of entries of a tensor, or of several together."""
    return x.numel() if isinstance(x, torch.Tensor) else sum(map(numel, x))


def repeats(value: torch.Tensor, x: Varying) -> float:
    """The logarithm of the norm of broadcasting an argument to the value's shape."""
    return 0.5 * math.log(max(1.0, numel(value) / max(1, numel(x.value))))


def total(logs: Iterable[float]) -> float:
    """log Σ exp."""
    found = list(logs)
    top = max(found, default=-math.inf)
    if math.isinf(top):
        return top
    return top + math.log(math.fsum(math.exp(x - top) for x in found))


def root_of_squares(logs: Iterable[float]) -> float:
    """log √Σ exp²."""
    return 0.5 * total(2.0 * x for x in logs)


def factor(constant: float) -> Rule:
    """The rule of a map of its first argument with a known constant, whatever its options."""

    def rule(value: Any, /, x: Any, *options: Any, **named: Any) -> float:
        return only(x, options, named).log + log(constant)

    return rule
