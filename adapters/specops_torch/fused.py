r"""The weight in use on the CPU as one operation, forward and backward.

With :math:`\sigma = \langle u, Wv\rangle` and :math:`F = \|W\|_F^2` both normalisations are
:math:`aW + b\,uv^T` with numbers a and b that depend on σ and F alone: s/σ and 0, or, where the
stable rank is limited to r by :math:`t = \sqrt{(r - 1)/(F/\sigma^2 - 1)} < 1`, t/σ and 1 − t.
Their derivative is :math:`aG + \alpha\,uv^T + \beta W` for a gradient G: one update instead of
five passes over the matrix. ``ENABLED = False`` computes everything by the rule's `apply`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch.autograd.forward_ad import unpack_dual

from specops.geometry import Dense, Geometry
from specops.tracking import Tracked, TrackedBlocks
from specops_torch.fast_paths import DTYPES, transformed

ENABLED = True
_LEAST, _GREATEST = 1e-12, 1e12
"""The range of norms whose squares single precision can hold."""
_APART = 1e-3
"""The least F/σ² − 1 that single precision still resolves: below it, digits cancel."""


class Kind(NamedTuple):
    """What the fused operation needs to know of a rule and geometry."""

    follow: Tracked
    limits: bool
    """Whether the stable rank is limited."""
    number: float | None
    """The scale or the ratio; None while a schedule gives it."""

    @property
    def argument(self) -> str:
        """The argument of `apply` that takes this number."""
        return "ratio" if self.limits else "scale"


def kind_of(rule: Any, geometry: Geometry) -> Kind | None:
    """The kind; None if only the rule's `apply` can compute it."""
    limits, follow = rule.formula == "rank limited", rule.tracked(geometry)
    if not (limits or rule.formula == "normalized"):
        return None
    if row_blocks(follow) == 0 and (limits or isinstance(follow, TrackedBlocks)):
        return None
    kind = Kind(follow, limits, None)
    if rule.is_scheduled():
        return kind
    return kind._replace(number=rule.arguments(1, "", geometry)[kind.argument])


@lru_cache(maxsize=1024)
def row_blocks(follow: Tracked | None) -> int:
    """How many blocks of rows of the flattened weight are tracked; 0 if it is something else."""
    if not isinstance(follow, TrackedBlocks):
        return 0
    view = follow.geometry
    if view.batch_axes or view.repeats > 1 or replace(view, splits=None) != Dense():
        return 0
    return len(view.splits or (0,))


def used(
    raw: torch.Tensor,
    kind: Kind,
    in_use: Any,
    state: dict[str, torch.Tensor],
    *,
    as_measured: bool,
) -> torch.Tensor | None:
    """The weight in use of a layer's own parameter; None if the rule's `apply` must compute it.

    With `as_measured`, the norms in the state are those of the parameter as it is.
    """
    if not ENABLED or not raw.is_cpu or raw.dtype not in DTYPES:
        return None
    if transformed() or unpack_dual(raw).tangent is not None:
        return None
    rule, overrides = in_use.rule, in_use.overrides
    trained, number = None, overrides.get(kind.argument)
    if number is None:
        number = kind.number
    elif isinstance(number, torch.nn.Parameter):
        trained, number = number if raw.requires_grad else number.detach(), 1.0
    else:
        number = number.item()
    if number is None or not math.isfinite(number):
        return None
    vectors = kind.follow.directions(state)
    if any(x.dtype != raw.dtype or not x.is_cpu for x in vectors):
        return None
    coefficients = []
    blocks = list(_blocks(vectors, raw.detach()))
    if as_measured:
        norms = [norm.item() for norm in kind.follow.measured(state)]
    else:
        norms = [_along(*block) for block in blocks]
    for (block, pair), sigma in zip(blocks, norms, strict=True):
        found = _coefficients(block, pair, sigma, kind.limits, number)
        if found is None:
            return None
        coefficients.append(found)
    name, geometry = in_use.name, in_use.geometry
    option = {kind.argument: number}

    def plain(w: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = rule.apply(w, geometry, state, name=name, **option)
        return result

    result: torch.Tensor = _Used.apply(raw, _Known(plain, coefficients, vectors))
    return result if trained is None else result * trained.to(result.dtype)


class _Known(NamedTuple):
    """The constants of one operation."""

    plain: Callable[[torch.Tensor], torch.Tensor]
    """The rule's `apply`."""
    coefficients: Sequence[_Coefficients]
    vectors: Sequence[torch.Tensor]


def _along(w: torch.Tensor, vectors: Sequence[torch.Tensor]) -> float:
    """⟨u, Wv⟩ for vectors (u, v); ⟨W, G⟩ for a single array G of the weight's shape."""
    if len(vectors) == 1:
        return float((w * vectors[0]).sum())
    u, v = vectors
    return float(torch.dot(u, torch.mv(w.reshape(u.numel(), -1), v)))


class _Coefficients(NamedTuple):
    a: float
    b: float
    sigma: float
    squared: float
    """F; 0 if the rule does not limit the stable rank."""
    rest: float
    """F/σ² − 1."""


def _coefficients(
    w: torch.Tensor, vectors: Sequence[torch.Tensor], sigma: float, limits: bool, number: float
) -> _Coefficients | None:
    if not _LEAST < sigma < _GREATEST:
        return None
    if not limits:
        return _Coefficients(number / sigma, 0.0, sigma, 0.0, 0.0)
    plain = _Coefficients(1.0 / sigma, 0.0, sigma, 0.0, 0.0)
    u, v = vectors
    side = min(u.numel(), v.numel())
    if side == 1:
        return plain
    flat = w.reshape(-1)
    squared = torch.dot(flat, flat).item()
    rest, room = squared / sigma**2 - 1.0, max(number * side, 1.0) - 1.0
    if rest <= room:
        return plain
    if not _APART < rest < math.inf:
        return None
    t = math.sqrt(room / rest)
    return _Coefficients(t / sigma, 1.0 - t, sigma, squared, rest)


class _Used(torch.autograd.Function):
    """a·W + b·uvᵀ, block by block."""

    @staticmethod
    def forward(ctx: Any, w: torch.Tensor, known: _Known) -> torch.Tensor:
        ctx.save_for_backward(w)
        ctx.known = known
        if len(known.coefficients) == 1:
            c = known.coefficients[0]
            return _updated(w, c.a, known.vectors, c.b)
        used = torch.empty_like(w, memory_format=torch.contiguous_format)
        blocks = _blocks(known.vectors, w.detach(), used)
        for c, (block, out, pair) in zip(known.coefficients, blocks, strict=True):
            _updated(block, c.a, pair, c.b, out)
        return used

    @staticmethod
    def backward(ctx: Any, g: torch.Tensor) -> Any:
        (w,) = ctx.saved_tensors
        if torch.is_autocast_enabled(g.device.type):
            with torch.autocast(g.device.type, enabled=False):
                return _gradient(ctx.known, g, w), None
        return _gradient(ctx.known, g, w), None


def _gradient(known: _Known, g: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    if torch.is_grad_enabled():
        # The gradient itself will be differentiated (create_graph).
        (twice,) = torch.autograd.grad(known.plain(w), w, g, create_graph=True)
        return twice
    if len(known.coefficients) == 1:
        return _part(known.coefficients[0], w, g, known.vectors)
    blocks = zip(known.coefficients, _blocks(known.vectors, w, g), strict=True)
    return torch.cat([_part(c, *given) for c, given in blocks])


def _part(c: _Coefficients, w: torch.Tensor, g: torch.Tensor, pair: Any) -> torch.Tensor:
    """aG + α·uvᵀ + βW."""
    product = torch.dot(w.reshape(-1), g.reshape(-1))
    if c.b == 0.0:
        return _updated(g, c.a, (pair[0] * product, *pair[1:]), -c.a / c.sigma)
    u, v = pair
    t, along = 1.0 - c.b, torch.dot(u, torch.mv(g.reshape(u.numel(), -1), v))
    turned = torch.sub(along * (t / c.rest), product, alpha=t / (c.rest * c.sigma))
    alpha = torch.add(turned * (-c.squared / c.sigma**3), product, alpha=-t / c.sigma**2)
    return torch.addcmul(_updated(g, c.a, (u * alpha, v)), w, turned, value=1.0 / c.sigma**2)


def _updated(
    x: torch.Tensor, a: float, pair: Any, b: float = 1.0, out: torch.Tensor | None = None
) -> torch.Tensor:
    """a·x + b·uvᵀ; a single array of the weight's shape may stand in place of uvᵀ."""
    if b == 0.0:
        return torch.mul(x, a, out=out)
    if len(pair) == 1:
        return torch.add(x * a, pair[0], alpha=b, out=out)
    rows = x.reshape(pair[0].numel(), -1)
    into = None if out is None else out.view_as(rows)
    return torch.addr(rows, *pair, beta=a, alpha=b, out=into).view_as(x)


def _blocks(vectors: Sequence[torch.Tensor], *tensors: torch.Tensor) -> Any:
    """(parts of the tensors, vectors) of each block of rows."""
    if len(vectors) <= 2:
        return [(*tensors, vectors)]
    rows = [u.numel() for u in vectors[::2]]
    pairs = zip(vectors[::2], vectors[1::2], strict=True)
    return zip(*(x.split(rows) for x in tensors), pairs, strict=True)
