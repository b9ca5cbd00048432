"""A linear layer with the weight s·W/σ that never makes this weight.

.. math:: y = \\tfrac{s}{\\sigma} x W^T + b

A product takes its factor for nothing, and of the gradient

.. math:: \\frac{s}{\\sigma}\\Bigl(G - uv^T \\frac{\\langle G, W\\rangle}{\\sigma}\\Bigr),
          \\qquad G = g^T x,

the inner product is ⟨gW, x⟩: for batches smaller than the layer everything but the products
that the layer takes anyway is one update in place.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import nn
from torch.autograd.forward_ad import unpack_dual
from torch.nn.modules import module as modules

from specops_torch.divided import divide_matrix, is_beyond_numbers

_linear, _forward = nn.functional.linear, nn.Linear.forward
_will_run = getattr(torch._C, "_will_engine_execute_node", None)


class DividedWeight:
    """Stands for s·W/σ in the forward of one `torch.nn.Linear` that `is_one_product`.

    ``torch.nn.functional.linear`` computes with W and the factor; any other function would get
    the tensor.
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

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        del types
        if func is _linear and len(args) == 3 and isinstance(args[1], cls):
            x, weight, bias = args
            parameter, sigma, scale, u, v = weight._parts
            return _Linear.apply(x, parameter, bias, scale / sigma, sigma, u, v)
        args = [divide_matrix(*a._parts) if isinstance(a, cls) else a for a in args]
        return func(*args, **(kwargs or {}))


def is_seen_by_linear_alone(module: nn.Module) -> bool:
    """Whether nothing but ``torch.nn.functional.linear`` can come across the weight.

    Not so in forwards of other layers, and where others have hooks on the layer, beside the two
    of the forward rule, or on every call of a function.
    """
    if type(module) is not nn.Linear or "forward" in module.__dict__:
        return False
    if nn.Linear.forward is not _forward or nn.functional.linear is not _linear:
        return False
    if modules._global_forward_hooks or modules._global_forward_pre_hooks:
        return False
    if len(module._forward_pre_hooks) + len(module._forward_hooks) != 2:
        return False
    return torch._C._is_torch_function_enabled() and not torch._C._len_torch_function_stack()


def is_one_product(module: nn.Module, x: Any, parameter: torch.Tensor) -> bool:
    """Whether the layer is one product: plain rows, none with a forward derivative."""
    bias: Any = module.bias
    if type(x) not in (torch.Tensor, nn.Parameter) or x.layout != torch.strided or x.is_nested:
        return False
    if x.ndim < 2 or x.dtype != parameter.dtype or x.device != parameter.device:
        return False
    given = (x, parameter) if bias is None else (x, parameter, bias)
    return all(unpack_dual(tensor).tangent is None for tensor in given)


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
        of_x, of_w = ctx.needs_input_grad[:2]
        ctx.save_for_backward(
            x if of_w else None, w if of_x or of_w else None, *((u, v) if of_w else (None, None))
        )
        ctx.numbers, ctx.shape = (factor, sigma), x.shape
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
    saved = _Saved(*ctx.saved_tensors, *ctx.numbers)
    rows = g.reshape(-1, g.shape[-1])
    of_x, of_w = (_twice if is_beyond_numbers(g) else _once)(rows, saved, wanted)
    if of_x is not None:
        of_x = of_x.reshape(ctx.shape)
    return of_x, of_w, rows.sum(0) if wanted[2] else None, None, None, None, None


def _is_asked_for(node: Any) -> bool:
    """Whether a backward pass goes on to this node: gradients of inputs need none of weights."""
    if _will_run is None or node is None:
        return True
    try:
        return bool(_will_run(node))
    except RuntimeError:
        return True  # a leaf whose gradient is what `torch.autograd.grad` returns


class _Saved(NamedTuple):
    x: torch.Tensor
    """With `u` and `v` None where the weight is frozen."""
    w: torch.Tensor
    u: torch.Tensor
    v: torch.Tensor
    factor: float
    sigma: float

    @property
    def rows(self) -> torch.Tensor:
        return self.x.reshape(-1, self.x.shape[-1])


_Pair = tuple[torch.Tensor | None, torch.Tensor | None]


def _once(g: torch.Tensor, saved: _Saved, wanted: list[bool]) -> _Pair:
    of_x = _product(g, saved.w, saved.factor) if wanted[0] else None
    if not wanted[1]:
        return of_x, None
    rows = saved.rows
    of_w = _product(g.mT, rows, saved.factor)
    # factor·⟨G, W⟩, by whichever is smaller.
    if of_x is not None and len(rows) < len(saved.w):
        taken = torch.dot(of_x.reshape(-1), rows.reshape(-1)).item()
    else:
        taken = torch.dot(of_w.reshape(-1), saved.w.reshape(-1)).item()
    return of_x, of_w.addr_(saved.u, saved.v, alpha=-taken / saved.sigma)


def _twice(g: torch.Tensor, saved: _Saved, wanted: list[bool]) -> _Pair:
    """By operations that can be differentiated again."""
    w, u, v = saved.w, saved.u, saved.v
    if u is None:
        return (g @ w * saved.factor if wanted[0] else None), None
    norm = torch.dot(u, w @ v)
    share = saved.factor * saved.sigma / norm
    of_x = g @ w * share if wanted[0] else None
    if not wanted[1]:
        return of_x, None
    whole = g.mT @ saved.rows
    return of_x, share * (whole - u[:, None] * v * ((whole * w).sum() / norm))


def _product(a: torch.Tensor, b: torch.Tensor, factor: float) -> torch.Tensor:
    return torch.addmm(a.new_empty(()), a, b, beta=0, alpha=factor)
