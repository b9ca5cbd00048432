"""Forward rules in torch: a layer sees its normalised weight while its forward runs.

The raw parameter stays where it was, under its own name. A pre-hook puts the normalised tensor
into the module's ``__dict__``, where attribute lookup finds it before the parameter, and a hook
that always runs takes it out again. Neither changes a vector: those advance once per step.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from specops.geometry import Dense, Geometry
from specops.rules import SpectralNormalization
from specops.tracking import track
from specops_torch.sizes import SizeRecorder

_PLAIN = Dense()


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

    @torch.compiler.disable
    def prepare(self, parameter: torch.Tensor) -> None:
        """Find the leading pairs, where that has not been done."""
        if self.state is None:
            with torch.no_grad():
                self.state = self.rule.init(parameter.detach(), self.geometry, self.name)
            self.mark(parameter)

    def advance(self, parameter: torch.Tensor, step: int) -> dict[str, Any]:
        """Power steps at the parameter as it is; the rule's figures."""
        assert self.state is not None
        _, state, figures = self.rule.update(
            parameter.detach(), self.geometry, self.state, step=step, name=self.name
        )
        if parameter.device.type != "cpu" or bool(torch.isfinite(figures["norm"]).all()):
            self.state = state
            self.mark(parameter)
        return dict(figures)

    def load(self, state: dict[str, torch.Tensor] | None, parameter: torch.Tensor) -> None:
        """Take over saved vectors, with their norms if the parameter is the one they are of."""
        self.state, self._measured = state, ()
        if state is None:
            return
        follow = track(self.geometry, self.rule.norm)
        with torch.no_grad():
            norms = follow.norms(parameter.detach().to(torch.float32), state)
        pairs = zip(norms, follow.measured(state), strict=True)
        if all(torch.allclose(a.double(), b.double(), rtol=1e-4) for a, b in pairs):
            self.mark(parameter)

    def mark(self, parameter: torch.Tensor) -> None:
        """Say that the state's norms are those of the parameter as it is now."""
        self._measured = _token(parameter) or ()

    def __call__(self, parameter: torch.Tensor) -> torch.Tensor:
        """The weight that the layer uses."""
        if self.state is None:
            self.prepare(parameter)
        with torch.autocast(parameter.device.type, enabled=False):
            done = self._divided(parameter)
            if done is not None:
                return done
            options = {} if self.scale is None else {"scale": self.scale}
            result: torch.Tensor = self.rule.apply(
                parameter, self.geometry, self.state, step=self.step, name=self.name, **options
            )
            return result

    def _divided(self, parameter: torch.Tensor) -> torch.Tensor | None:
        """One matrix or kernel in single or double precision: as `apply`, by fewer operations."""
        state, rule = self.state, self.rule
        assert state is not None
        if not isinstance(rule, SpectralNormalization):
            return None
        if parameter.dtype not in (torch.float32, torch.float64):
            return None
        if "axis" in state:
            sigma, axis, v = state["sigma"], state["axis"], None
        elif parameter.ndim == 2 and self.geometry == _PLAIN:
            sigma, axis, v = state["sigma0"], state["u0"], state["v0"]
        else:
            return None
        scale: Any = self.scale
        if scale is None:
            scale = rule.fixed_scale(self.step, self.name, self.geometry)
        if not torch.compiler.is_compiling() and self._measured == _token(parameter):
            # Nothing has changed since the norm was measured.
            return _divide(parameter, sigma, scale, axis, v)
        sigma = (parameter * axis).sum() if v is None else torch.dot(axis, parameter @ v)
        return parameter * (scale / torch.where(sigma != 0, sigma, torch.ones_like(sigma)))


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


def _divide(
    w: torch.Tensor, sigma: torch.Tensor, scale: Any, axis: torch.Tensor, v: torch.Tensor | None
) -> torch.Tensor:
    result: torch.Tensor = _Divide.apply(w, sigma, scale, axis, v)
    return result


class _Divide(torch.autograd.Function):
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
        saved = (w, sigma, axis, v) + ((scale,) if ctx.scaled else ())
        ctx.save_for_backward(*saved)
        safe = torch.where(sigma > 0, sigma, torch.ones_like(sigma))
        return w * (scale / safe)

    @staticmethod
    def backward(ctx: Any, g: torch.Tensor) -> Any:
        w, sigma, axis, v, *rest = ctx.saved_tensors
        scale = rest[0] if ctx.scaled else ctx.scale
        with torch.autocast(w.device.type, enabled=False):
            g = g.to(w.dtype)
            if torch.is_grad_enabled():
                return _differentiable(ctx, g, w, axis, v, scale)
            safe = torch.where(sigma > 0, sigma, torch.ones_like(sigma))
            # Not torch.dot, which wants one dimension and contiguous memory.
            product = (
                torch.dot(g.reshape(-1), w.reshape(-1)) if g.is_contiguous() else (g * w).sum()
            )
            factor = scale / safe
            taken = product * (factor / safe)
            grad_w = None
            if ctx.needs_input_grad[0]:
                if v is None:
                    grad_w = (g * factor).sub_(axis * taken)
                elif w.device.type == "cpu":
                    grad_w = torch.addr(g, axis, v, beta=float(factor), alpha=-float(taken))
                else:
                    grad_w = torch.addr(g * factor, axis * taken, v, alpha=-1)
            grad_scale = product / safe if ctx.needs_input_grad[2] else None
            return grad_w, None, grad_scale, None, None


def _differentiable(
    ctx: Any, g: torch.Tensor, w: torch.Tensor, axis: torch.Tensor, v: Any, scale: Any
) -> Any:
    """The same gradients by operations that can be differentiated again."""
    direction = axis if v is None else torch.outer(axis, v)
    sigma = (w * direction).sum()
    sigma = torch.where(sigma > 0, sigma, torch.ones_like(sigma))
    product = (g * w).sum()
    grad_w = g * (scale / sigma) - direction * (product * scale / sigma**2)
    grad_scale = product / sigma if ctx.needs_input_grad[2] else None
    return grad_w if ctx.needs_input_grad[0] else None, None, grad_scale, None, None
