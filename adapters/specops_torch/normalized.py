"""Forward rules in torch: a layer sees its normalised weight while its forward runs.

The raw parameter stays where it was, under its own name. A pre-hook puts the normalised tensor
into the module's ``__dict__``, where attribute lookup finds it before the parameter, and a hook
that always runs takes it out again. Neither changes a vector: those advance once per step.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import nn

from specops.geometry import Dense, Geometry
from specops.rules import SpectralNormalization
from specops.tracking import TrackedBlocks, track
from specops_torch.sizes import SizeRecorder


class Normalizer:
    """One weight's rule, vectors and scale, as the hooks of its modules need them.

    It refers to no module and no optimizer, so that a model that carries it can be copied and
    pickled; the copy goes on with vectors of its own, as they were.
    """

    def __init__(
        self, rule: Any, name: str, geometry: Geometry, recorder: SizeRecorder | None
    ) -> None:
        self.rule, self.name, self.geometry, self.recorder = rule, name, geometry, recorder
        self.state: dict[str, torch.Tensor] | None = None
        self.scale: torch.Tensor | None = None
        """Of a schedule, or trained; None for a fixed one."""
        self.step = 1
        self.ran = False
        self._measured: tuple[int, ...] = ()
        self._pairs: tuple[tuple[torch.Tensor, torch.Tensor, torch.Tensor | None], ...] = ()
        self._factors: tuple[tuple[float, float], ...] = ()
        self._splits: tuple[int, ...] = ()

    @torch.compiler.disable
    def prepare(self, parameter: torch.Tensor) -> None:
        """Find the leading pairs, where that has not been done."""
        if self.state is None:
            with torch.no_grad():
                self.state = self.rule.init(parameter.detach(), self.geometry, self.name)
            self.mark(parameter)

    def take(self, state: dict[str, torch.Tensor], parameter: torch.Tensor) -> None:
        """Use vectors that have advanced at the parameter as it is."""
        self.state = state
        self.mark(parameter)

    def load(self, state: dict[str, torch.Tensor] | None, parameter: torch.Tensor) -> None:
        """Take over saved vectors, with their norms if the parameter is the one they are of."""
        self.state, self._measured = state, ()
        if state is None:
            return
        follow = track(self.geometry, self.rule.norm)
        with torch.no_grad():
            weight = parameter.detach()
            half = weight.dtype in (torch.float16, torch.bfloat16)
            norms = follow.norms(weight.float() if half else weight, state)
        pairs = zip(norms, follow.measured(state), strict=True)
        if all(torch.allclose(a.double(), b.double(), rtol=1e-4) for a, b in pairs):
            self.mark(parameter)

    def mark(self, parameter: torch.Tensor) -> None:
        """Say that the state's norms are those of the parameter as it is now."""
        self._measured = _token(parameter) or ()
        state, rule = self.state, self.rule
        self._pairs, self._factors = (), ()
        if not isinstance(rule, SpectralNormalization) or state is None:
            return
        if parameter.dtype not in (torch.float32, torch.float64):
            return
        follow = track(self.geometry, rule.norm)
        if not isinstance(follow, TrackedBlocks):
            self._pairs = ((state["sigma"], state["axis"], None),)
            return
        view = follow.geometry
        if view.batch_axes or replace(view, splits=None) != Dense():
            return
        self._splits = view.splits or (parameter.shape[0],)
        count = range(len(self._splits))
        self._pairs = tuple((state[f"sigma{j}"], state[f"u{j}"], state[f"v{j}"]) for j in count)
        if self.scale is None and parameter.device.type == "cpu":
            sigmas = [float(sigma) for sigma, _, _ in self._pairs]
            self._factors = tuple((self._scale() / s if s > 0 else 1.0, s or 1.0) for s in sigmas)

    def __call__(self, parameter: torch.Tensor) -> torch.Tensor:
        """The weight that the layer uses."""
        if self.state is None:
            self.prepare(parameter)
        if torch.is_autocast_enabled(parameter.device.type):
            with torch.autocast(parameter.device.type, enabled=False):
                return self._used(parameter)
        return self._used(parameter)

    def _used(self, parameter: torch.Tensor) -> torch.Tensor:
        # Unless something has changed since, the norms are known.
        compiling = torch.compiler.is_compiling()
        known = not compiling and self._measured == _token(parameter)
        if known and self._factors:
            vectors = [x for _, u, v in self._pairs for x in (u, v)]
            fixed: torch.Tensor = _Fixed.apply(parameter, self._splits, self._factors, *vectors)
            return fixed
        if len(self._pairs) == 1:
            sigma, axis, v = self._pairs[0]
            if known:
                divided: torch.Tensor = _Divided.apply(parameter, sigma, self._scale(), axis, v)
                return divided
            return parameter * (self._scale() / _safe(_norm_along(parameter, axis, v)))
        options = {} if self.scale is None else {"scale": self.scale}
        result: torch.Tensor = self.rule.apply(
            parameter, self.geometry, self.state, step=self.step, name=self.name, **options
        )
        return result

    def _scale(self) -> Any:
        if self.scale is not None:
            return self.scale
        return self.rule.fixed_scale(self.step, self.name, self.geometry)


def _norm_along(w: torch.Tensor, axis: torch.Tensor, v: torch.Tensor | None) -> torch.Tensor:
    if v is None:
        return (w * axis).sum()
    return torch.dot(axis, w.reshape(len(axis), -1) @ v)


def _token(parameter: torch.Tensor) -> tuple[int, int, int] | None:
    """What changes when a parameter's values do (but not through ``.data``)."""
    if type(parameter) is not nn.Parameter:
        return None
    return id(parameter), parameter._version, parameter.data_ptr()


class Before:
    """The pre-hook: shadow the parameter."""

    def __init__(self, normalizer: Normalizer, attribute: str, owner: str) -> None:
        self.normalizer, self.attribute, self.owner = normalizer, attribute, owner

    def __call__(self, module: nn.Module, args: Any, kwargs: Any = None) -> None:
        """Record the input's size where the norm needs it, then put the tensor in place."""
        normalizer = self.normalizer
        if normalizer.state is None and normalizer.recorder is not None and not self.owner:
            normalizer.recorder.before(module, args, kwargs or {})
            normalizer.geometry = normalizer.recorder.geometry(module)
        holder = getattr(module, self.owner) if self.owner else module
        parameter = holder._parameters[self.attribute]
        normalizer.ran = True
        holder.__dict__[self.attribute] = normalizer(parameter)


class After:
    """The hook that always runs: the parameter is back."""

    def __init__(self, normalizer: Normalizer, attribute: str, owner: str) -> None:
        self.normalizer, self.attribute, self.owner = normalizer, attribute, owner

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        """Take the tensor away; recurrent layers also keep a list of their weights."""
        holder = getattr(module, self.owner) if self.owner else module
        holder.__dict__.pop(self.attribute, None)
        if isinstance(holder, nn.RNNBase):
            holder._update_flat_weights()


def install(
    module: nn.Module, normalizer: Normalizer, attribute: str, owner: str = ""
) -> list[Any]:
    """Hook a module whose forward uses the weight, its own or that of its child `owner`."""
    before, after = Before(normalizer, attribute, owner), After(normalizer, attribute, owner)
    return [
        module.register_forward_pre_hook(before, with_kwargs=True),
        module.register_forward_hook(after, always_call=True),
    ]


class _Fixed(torch.autograd.Function):
    """f·W block by block for f = s/⟨u, Wv⟩, numbers that are known; on the CPU.

    `factors` holds (f, σ) of each block of `splits` rows, `vectors` their u and v in turn.
    """

    @staticmethod
    def forward(
        ctx: Any, w: torch.Tensor, splits: Any, factors: Any, *vectors: torch.Tensor
    ) -> torch.Tensor:
        ctx.save_for_backward(w, *vectors)
        ctx.splits, ctx.factors = splits, factors
        if len(splits) == 1:
            return w * factors[0][0]
        parts = zip(w.split(splits), factors, strict=True)
        return torch.cat([part * f for part, (f, _) in parts])

    @staticmethod
    def backward(ctx: Any, g: torch.Tensor) -> Any:
        w, *vectors = ctx.saved_tensors
        blocks = zip(
            g.split(ctx.splits),
            w.split(ctx.splits),
            ctx.factors,
            vectors[::2],
            vectors[1::2],
            strict=True,
        )
        step = _twice if torch.is_grad_enabled() else _once
        parts = [step(*block) for block in blocks]
        gradient = parts[0] if len(parts) == 1 else torch.cat(parts)
        return gradient, None, None, *(None for _ in vectors)


def _once(
    g: torch.Tensor, w: torch.Tensor, factors: Any, u: torch.Tensor, v: torch.Tensor
) -> torch.Tensor:
    """∂(f W) = f(∂W − W⟨uvᵀ, ∂W⟩/σ), transposed: f(G − uvᵀ⟨G, W⟩/σ)."""
    factor, sigma = factors
    flat = g.reshape(-1)
    taken = float(torch.dot(flat, w.reshape(-1))) * factor / sigma
    gradient = torch.addr(flat.view(len(u), -1), u, v, beta=factor, alpha=-taken)
    return gradient.view(w.shape)


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
        if torch.is_grad_enabled():
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
