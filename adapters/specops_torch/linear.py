"""A linear layer with the weight s·W/σ that never makes this weight.

.. math:: y = \\tfrac{s}{\\sigma} x W^T + b

A product takes its factor for nothing, and of the gradient

.. math:: \\frac{s}{\\sigma}\\Bigl(G - uv^T \\frac{\\langle G, W\\rangle}{\\sigma}\\Bigr),
          \\qquad G = g^T x,

the inner product is ⟨gW, x⟩: for batches smaller than the layer everything but the products
that the layer takes anyway is one update in place.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn.modules import module as modules

from specops_torch.divided import divide_matrix, is_beyond_numbers

_linear = nn.functional.linear
_will_run = getattr(torch._C, "_will_engine_execute_node", None)


class DividedWeight:
    """Stands for s·W/σ while the forward of one `torch.nn.Linear` runs.

    ``torch.nn.functional.linear`` computes with W and the factor; whatever else comes across it
    gets the tensor.
    """

    def __init__(
        self,
        parameter: torch.Tensor,
        sigma: float,
        scale: float,
        u: torch.Tensor,
        v: torch.Tensor,
    ) -> None:
        self._parts = parameter, sigma, scale, u, v

    def tensor(self) -> torch.Tensor:
        """S·W/σ."""
        parameter = self._parts[0]
        with torch.autocast(parameter.device.type, enabled=False):
            return divide_matrix(*self._parts)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.tensor(), name)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        del types
        if func is _linear and not kwargs:
            x, weight, bias = args
            if isinstance(weight, cls) and _is_plain(x, weight._parts[0]):
                parameter, sigma, scale, u, v = weight._parts
                return _Linear.apply(x, parameter, bias, scale / sigma, sigma, u, v)
        args = [a.tensor() if isinstance(a, cls) else a for a in args]
        named = {k: a.tensor() if isinstance(a, cls) else a for k, a in (kwargs or {}).items()}
        return func(*args, **named)


def is_seen_by_linear_alone(module: nn.Module) -> bool:
    """Whether nothing but ``torch.nn.functional.linear`` can come across the weight.

    Not so where others have hooks on the layer, beside the two of the forward rule.
    """
    hooks = len(module._forward_pre_hooks) + len(module._forward_hooks)
    others = modules._global_forward_hooks or modules._global_forward_pre_hooks
    return type(module) is nn.Linear and hooks == 2 and not others


def _is_plain(x: Any, parameter: torch.Tensor) -> bool:
    """Whether one product does it: rows of the weight's dtype, without a forward derivative."""
    if type(x) not in (torch.Tensor, nn.Parameter) or x.ndim < 2 or x.dtype != parameter.dtype:
        return False
    if torch.is_autocast_enabled(x.device.type) or x.device != parameter.device:
        return False
    return torch.autograd.forward_ad.unpack_dual(x).tangent is None


class _Linear(torch.autograd.Function):
    """f x Wᵀ + b for f = s/σ, numbers."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        w: torch.Tensor,
        bias: torch.Tensor | None,
        factor: float,
        sigma: float,
        u: torch.Tensor,
        v: torch.Tensor,
    ) -> torch.Tensor:
        ctx.save_for_backward(x, w, u, v)
        ctx.numbers = factor, sigma
        rows = x.reshape(-1, x.shape[-1])
        if bias is None:
            y = _product(rows, w.mT, factor)
        else:
            y = torch.addmm(bias, rows, w.mT, alpha=factor)
        # Not a view, so that what follows may work in place.
        return y if x.ndim == 2 else torch.ops.aten._unsafe_view(y, [*x.shape[:-1], len(w)])

    @staticmethod
    def backward(ctx: Any, g: torch.Tensor) -> Any:
        if torch.is_autocast_enabled(g.device.type):
            with torch.autocast(g.device.type, enabled=False):
                return _gradients(ctx, g)
        return _gradients(ctx, g)


def _gradients(ctx: Any, g: torch.Tensor) -> Any:
    wanted = [
        needed and _is_asked_for(node)
        for needed, (node, _) in zip(ctx.needs_input_grad[:3], ctx.next_functions[:3], strict=True)
    ]
    x, w, u, v = ctx.saved_tensors
    step: Any = _twice if is_beyond_numbers(g) else _once
    of_x, of_w = step(g, x, w, *ctx.numbers, u, v, wanted)
    of_bias = g.reshape(-1, g.shape[-1]).sum(0) if wanted[2] else None
    return of_x, of_w, of_bias, None, None, None, None


def _is_asked_for(node: Any) -> bool:
    """Whether a backward pass goes on to this node: gradients of inputs need none of weights."""
    if _will_run is None or node is None:
        return True
    try:
        return bool(_will_run(node))
    except RuntimeError:
        return True  # a leaf whose gradient is what `torch.autograd.grad` returns


def _once(
    g: torch.Tensor,
    x: torch.Tensor,
    w: torch.Tensor,
    factor: float,
    sigma: float,
    u: torch.Tensor,
    v: torch.Tensor,
    wanted: list[bool],
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    rows, g = x.reshape(-1, x.shape[-1]), g.reshape(-1, g.shape[-1])
    of_x = _product(g, w, factor) if wanted[0] else None
    of_w = None
    if wanted[1]:
        of_w = _product(g.mT, rows, factor)
        # factor·⟨G, W⟩, by whichever is smaller.
        small = of_x is not None and len(rows) < len(w)
        pair = (of_x, rows) if small else (of_w, w)
        taken = torch.dot(*(p.reshape(-1) for p in pair if p is not None)).item()
        of_w.addr_(u, v, alpha=-taken / sigma)
    return None if of_x is None else of_x.view(x.shape), of_w


def _twice(
    g: torch.Tensor,
    x: torch.Tensor,
    w: torch.Tensor,
    factor: float,
    sigma: float,
    u: torch.Tensor,
    v: torch.Tensor,
    wanted: list[bool],
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """By operations that can be differentiated again."""
    norm = torch.dot(u, w @ v)
    share = factor * sigma / norm
    of_x = g @ w * share if wanted[0] else None
    of_w = None
    if wanted[1]:
        rows, g = x.reshape(-1, x.shape[-1]), g.reshape(-1, g.shape[-1])
        whole = g.mT @ rows
        of_w = share * (whole - u[:, None] * v * ((whole * w).sum() / norm))
    return of_x, of_w


def _product(a: torch.Tensor, b: torch.Tensor, factor: float) -> torch.Tensor:
    return torch.addmm(a.new_empty(()), a, b, beta=0, alpha=factor)
