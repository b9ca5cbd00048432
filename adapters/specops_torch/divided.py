"""s·W/σ in torch as one operation, with the derivative that the vectors' constancy gives.

With σ = ⟨uvᵀ, W⟩ the gradient is s/σ·(G − uvᵀ⟨G, W⟩/σ): one product and one update of a matrix
instead of the chain of both. Where a gradient is to be differentiated again, and on the way
there, ordinary operations are recorded.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.autograd.forward_ad import unpack_dual

from specops.linalg.products import matvec


def norm_along(
    w: torch.Tensor, axis: torch.Tensor, v: torch.Tensor | None, *, split: bool = True
) -> torch.Tensor:
    """⟨axis, W⟩ for an axis like the kernel, or ⟨u, Wv⟩ for a matrix of the axis's rows.

    A large matrix is read by several threads if it may be `split`.
    """
    if v is None:
        return (w * axis).sum()
    matrix = w if w.ndim == 2 else w.reshape(axis.shape[0], -1)
    return torch.dot(axis, matvec(matrix, v) if split else torch.mv(matrix, v))


def divide_matrix(
    w: torch.Tensor, sigma: float, scale: float, u: torch.Tensor, v: torch.Tensor
) -> torch.Tensor:
    """One matrix of known norm along u and v."""
    fixed: torch.Tensor = _Fixed.apply(w, ((scale / sigma, sigma),), u, v)
    return fixed


def divide_blocks(
    w: torch.Tensor, norms: Sequence[torch.Tensor], scale: Any, vectors: Sequence[torch.Tensor]
) -> torch.Tensor:
    """Blocks of rows, each divided by its norm along its own u and v (`vectors` in turn)."""
    if w.device.type == "cpu" and not isinstance(scale, torch.Tensor):
        sigmas = [float(n) or 1.0 for n in norms]
        factors = [(scale / sigma, sigma) for sigma in sigmas]
        fixed: torch.Tensor = _Fixed.apply(w, factors, *vectors)
        return fixed
    rows = [len(u) for u in vectors[::2]]
    parts = zip(w.split(rows), norms, vectors[::2], vectors[1::2], strict=True)
    done = [_divide(part, norm, scale, u, v) for part, norm, u, v in parts]
    return done[0] if len(done) == 1 else torch.cat(done)


def divide_kernel(
    w: torch.Tensor, norm: torch.Tensor, scale: Any, axis: torch.Tensor
) -> torch.Tensor:
    """A kernel divided by its norm along `axis`."""
    return _divide(w, norm, scale, axis, None)


def _divide(
    w: torch.Tensor, norm: torch.Tensor, scale: Any, axis: torch.Tensor, v: torch.Tensor | None
) -> torch.Tensor:
    divided: torch.Tensor = _Divided.apply(w, norm, scale, axis, v)
    return divided


class _Fixed(torch.autograd.Function):
    """f·W block by block for f = s/σ, numbers; `factors` holds (f, σ) of each block."""

    @staticmethod
    def forward(ctx: Any, w: torch.Tensor, factors: Any, *vectors: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(w, *vectors)
        ctx.factors = factors
        if len(factors) == 1:
            return w * factors[0][0]
        rows, used = [len(u) for u in vectors[::2]], torch.empty_like(w)
        for part, (f, _), out in zip(w.split(rows), factors, used.split(rows), strict=True):
            torch.mul(part.detach(), f, out=out)
        return used

    @staticmethod
    def backward(ctx: Any, g: torch.Tensor) -> Any:
        w, *vectors = ctx.saved_tensors
        if torch.is_autocast_enabled(g.device.type):
            with torch.autocast(g.device.type, enabled=False):
                gradient = _by_blocks(g, w, ctx.factors, vectors)
        else:
            gradient = _by_blocks(g, w, ctx.factors, vectors)
        return gradient, None, *(None for _ in vectors)


def _by_blocks(
    g: torch.Tensor, w: torch.Tensor, factors: Any, vectors: Sequence[torch.Tensor]
) -> torch.Tensor:
    rows = [len(u) for u in vectors[::2]]
    blocks = zip(g.split(rows), w.split(rows), factors, vectors[::2], vectors[1::2], strict=True)
    if is_beyond_numbers(g):
        return torch.cat([_twice(*block) for block in blocks])
    gradient = w.new_empty(w.shape)
    for block, out in zip(blocks, gradient.split(rows), strict=True):
        _once(*block, out)
    return gradient


def is_beyond_numbers(g: torch.Tensor) -> bool:
    """Whether a gradient is to be differentiated again, or is several at once."""
    functorch = torch._C._functorch
    batched = functorch.is_legacy_batchedtensor(g) or functorch.is_batchedtensor(g)
    return bool(batched or torch.is_grad_enabled()) or unpack_dual(g).tangent is not None


def _once(
    g: torch.Tensor,
    w: torch.Tensor,
    factors: Any,
    u: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
) -> None:
    """∂(f W) = f(∂W − W⟨uvᵀ, ∂W⟩/σ), transposed: out ← f(G − uvᵀ⟨G, W⟩/σ)."""
    factor, sigma = factors
    flat = g.reshape(-1)
    taken = torch.dot(flat, w.reshape(-1)).item() * factor / sigma
    matrix = flat.view(u.shape[0], -1)
    torch.addr(matrix, u, v, beta=factor, alpha=-taken, out=out.view(matrix.shape))


def _twice(
    g: torch.Tensor, w: torch.Tensor, factors: Any, u: torch.Tensor, v: torch.Tensor
) -> torch.Tensor:
    return _differentiable(g, w, _dyad(u, v, w), factors[0] * factors[1])[0]


class _Divided(torch.autograd.Function):
    """s·W/σ for σ = ⟨E, W⟩ that is known; E is `axis`, or the dyad of `axis` and `v`."""

    @staticmethod
    def forward(
        ctx: Any,
        w: torch.Tensor,
        sigma: torch.Tensor,
        scale: Any,
        axis: torch.Tensor,
        v: torch.Tensor | None,
    ) -> torch.Tensor:
        ctx.scaled = isinstance(scale, torch.Tensor)
        ctx.scale = None if ctx.scaled else scale
        ctx.save_for_backward(w, sigma, axis, v, *((scale,) if ctx.scaled else ()))
        return w * (scale / _safe(sigma))

    @staticmethod
    def backward(ctx: Any, g: torch.Tensor) -> Any:
        w, sigma, axis, v, *rest = ctx.saved_tensors
        scale = rest[0] if ctx.scaled else ctx.scale
        axis = axis if v is None else _dyad(axis, v, w)
        if is_beyond_numbers(g):
            grad_w, grad_scale = _differentiable(g, w, axis, scale)
        else:
            safe = _safe(sigma)
            product = (g * w).sum()
            factor = scale / safe
            grad_w = (g * factor).sub_(axis * (product * (factor / safe)))
            grad_scale = product / safe
        return grad_w, None, grad_scale if ctx.needs_input_grad[2] else None, None, None


def _differentiable(
    g: torch.Tensor, w: torch.Tensor, axis: torch.Tensor, scale: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """Both gradients by operations that can be differentiated again."""
    sigma = _safe((w * axis).sum())
    product = (g * w).sum()
    return g * (scale / sigma) - axis * (product * scale / sigma**2), product / sigma


def _dyad(u: torch.Tensor, v: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    return (u[:, None] * v).reshape(like.shape)


def _safe(sigma: torch.Tensor) -> torch.Tensor:
    return torch.where(sigma != 0, sigma, torch.ones_like(sigma))
