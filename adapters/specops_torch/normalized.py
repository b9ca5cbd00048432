"""The normalised weight that a layer uses under a forward rule, by the cheapest way to it.

Forward passes do not advance vectors: optimizer steps do.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.autograd.forward_ad import unpack_dual

from specops.errors import GeometryError, NonFiniteError
from specops.geometry import Dense, Geometry
from specops.rules import SpectralNormalization, StableRankNormalization
from specops.tracking import TrackedBlocks, track
from specops_torch.divided import divide_blocks, divide_kernel, divide_matrix, norm_along
from specops_torch.linear import DividedWeight, is_one_product, is_seen_by_linear_alone
from specops_torch.sizes import SizeRecorder

_SAME = 1e-3
"""Relative change of a norm, seen along the same vectors, that no rounding explains."""
_ONE_MATRIX = ["u0"]
_LEAST, _GREATEST = 1e-12, 1e12
"""Norms whose squares single precision holds, which derivatives of a quotient need."""
SMALL = 2**16
"""Entries of a weight up to which reading it costs less than calling operations."""
_top_hooks = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)
_PLAIN_DTYPES = (torch.float32, torch.float64)


class Normalizer:
    """One weight's rule, vectors and scale, as the hooks of its modules need them.

    It refers to no module and no optimizer, so that a model that carries it can be copied and
    pickled; the copy goes on with vectors of its own. Where a weight is found to have been
    written to from outside, by the norm along its vectors, they start anew.
    """

    def __init__(
        self,
        rule: Any,
        name: str,
        geometry: Geometry,
        recorder: SizeRecorder | None,
        *,
        lenient: bool = False,
    ) -> None:
        self.rule, self.name, self.geometry, self.recorder = rule, name, geometry, recorder
        self.state: dict[str, torch.Tensor] | None = None
        self.overrides: dict[str, torch.Tensor] = {}
        """Values of schedules and trained scales, by the rule's argument."""
        self.step = 1
        """The one that comes next, for rules of others."""
        self.lenient = lenient
        """Whether a geometry that does not fit is a reason to leave the weight alone."""
        self.ran = False
        self.drifting = False
        """Whether steps have changed the weight since the state's norms were measured."""
        self._version: tuple[int, ...] = ()
        self._known: tuple[Any, ...] = ()
        self._small: Any = None
        """The parameter, where `quickly` may try."""

    def __getstate__(self) -> dict[str, Any]:
        # No step of the optimizer reaches a copy, so what changes its weight comes from outside.
        return {**self.__dict__, "drifting": False, "_version": (), "_known": (), "_small": None}

    @torch.compiler.disable
    def prepare(self, parameter: torch.Tensor) -> None:
        """Find the leading pairs."""
        with torch.inference_mode(False), torch.no_grad():
            weight = parameter.detach()
            if weight.is_inference():
                weight = weight.clone()
            self.take(self.rule.init(weight, self.geometry, self.name), parameter)

    def take(self, state: dict[str, torch.Tensor], parameter: torch.Tensor) -> None:
        """Use vectors whose norms are those of the parameter as it is."""
        self.state, self.drifting = state, False
        self._version = _version(parameter)

    def __call__(
        self, parameter: torch.Tensor, module: nn.Module | None = None, x: Any = None
    ) -> torch.Tensor | DividedWeight:
        """The weight that the layer uses, or what stands for it where `module` is given `x`."""
        device = parameter.device.type
        if device != "meta" and torch.is_autocast_enabled(device):
            # What the backward pass does may run under autocast as well.
            with torch.autocast(device, enabled=False):
                return self._used(parameter, None, None)
        return self._used(parameter, module, x)

    def _used(
        self, parameter: torch.Tensor, module: nn.Module | None, x: Any
    ) -> torch.Tensor | DividedWeight:
        if self.state is None:
            self._restart(parameter)
        if self.state is None:
            return parameter  # not finite: the next step says so, or goes on, as the user chose
        transformed = _is_transformed() or unpack_dual(parameter).tangent is not None
        kind = self._kind(parameter)
        if kind and not transformed:
            return self._divided(parameter, kind, module, x)
        if not kind and not transformed and self._version != _version(parameter):
            self._check(parameter)
        if kind == ["axis"] or kind == ["u0"]:
            axis, v = self._vectors(parameter, kind)
            return parameter * (self._scale() / _safe(norm_along(parameter, axis, v)))
        self._follow_dtype(parameter)
        if isinstance(self.rule, StableRankNormalization) and not isinstance(
            track(self.geometry, self.rule.norm), TrackedBlocks
        ):
            return self._interpreted(parameter)
        return self._applied(parameter)

    @torch.compiler.disable
    def _interpreted(self, parameter: torch.Tensor) -> torch.Tensor:
        """What needs tables that a compiler does not trace."""
        return self._applied(parameter)

    def _applied(self, parameter: torch.Tensor) -> torch.Tensor:
        options: dict[str, Any] = dict(self.overrides)
        if not isinstance(self.rule, SpectralNormalization | StableRankNormalization):
            options["step"] = self.step
        result: torch.Tensor = self.rule.apply(
            parameter, self.geometry, self.state, name=self.name, **options
        )
        return result

    def _kind(self, parameter: torch.Tensor) -> list[str]:
        """The state's keys of what is divided by its norm in few operations; [] for others."""
        if torch.compiler.is_compiling():
            return self._find_kind(parameter)  # what is remembered would be guarded
        known = self._known
        if not known or known[0] is not self.geometry or known[1] != parameter.dtype:
            known = self._known = (self.geometry, parameter.dtype, self._find_kind(parameter))
        kind: list[str] = known[2]
        return kind

    def _find_kind(self, parameter: torch.Tensor) -> list[str]:
        if not isinstance(self.rule, SpectralNormalization) or parameter.dtype not in _PLAIN_DTYPES:
            return []
        follow = track(self.geometry, self.rule.norm)
        if not isinstance(follow, TrackedBlocks):
            return ["axis"]
        view = follow.geometry
        if view.batch_axes or replace(view, splits=None) != Dense():
            return []
        return [f"u{j}" for j in range(len(view.splits))] if view.splits else _ONE_MATRIX

    def quickly(self, parameter: torch.Tensor) -> torch.Tensor | None:
        """What the call gives for a small matrix that it met before; None: not so easily.

        What a small layer costs is the number of calls.
        """
        if _is_transformed() or self._small is not parameter or self.overrides:
            return None
        state = self.state
        if state is None or torch.is_autocast_enabled("cpu") or _is_recorded():
            return None
        u, v = state["u0"], state["v0"]
        if not (parameter.is_cpu and u.is_cpu and u.dtype == parameter.dtype):
            return None
        norm = norm_along(parameter, u, v, split=False)
        sigma, measured = norm.item(), state["sigma0"].item()
        usual = _LEAST < sigma < _GREATEST
        if not usual or not (abs(sigma - measured) <= _SAME * measured or self.drifting):
            return None
        return _quotient(parameter, norm, self.rule.scale)

    def _one_matrix(
        self,
        parameter: torch.Tensor,
        sigma: float,
        vectors: Sequence[torch.Tensor],
        module: nn.Module | None,
        x: Any,
    ) -> torch.Tensor | DividedWeight:
        """One matrix on the CPU divided by its norm, where its layer is known in its cheapest form.

        Where forward passes are computed again, as by checkpoints, the form depends on nothing
        that may differ then.
        """
        u, v = vectors
        if module is not None:
            if parameter.numel() <= SMALL and _LEAST < sigma < _GREATEST:
                self._small = parameter if type(parameter) is nn.Parameter else None
                norm = norm_along(parameter, u, v, split=False)
                return _quotient(parameter, norm, self.rule.scale)
            alone = is_seen_by_linear_alone(module) and not _is_recorded()
            if alone and is_one_product(module, x, parameter):
                return DividedWeight(parameter, sigma, self.rule.scale, u, v)
        return divide_matrix(parameter, sigma, self.rule.scale, u, v)

    def _vectors(self, parameter: torch.Tensor, kind: list[str]) -> list[Any]:
        self._follow_dtype(parameter)
        state = self.state
        assert state is not None
        if kind == ["axis"]:
            return [state["axis"], None]
        if len(kind) == 1:
            return [state["u0"], state["v0"]]
        return [state[f"{key}{j}"] for j in range(len(kind)) for key in "uv"]

    def _divided(
        self, parameter: torch.Tensor, kind: list[str], module: nn.Module | None, x: Any
    ) -> torch.Tensor | DividedWeight:
        for _ in range(2):
            vectors = self._vectors(parameter, kind)
            weight = parameter.detach()
            if len(vectors) == 2:
                norms = [norm_along(weight, *vectors)]
            else:
                parts = weight.split([len(u) for u in vectors[::2]])
                pairs = zip(parts, vectors[::2], vectors[1::2], strict=True)
                norms = [norm_along(part, u, v) for part, u, v in pairs]
            if self.drifting or self._fits(parameter, norms):
                break
            # Written to from outside: a checkpoint, an average, a copy that went its own way.
            self._restart(parameter)
        scale = self._scale()
        if kind is _ONE_MATRIX and parameter.is_cpu and type(scale) is float:
            return self._one_matrix(parameter, norms[0].item() or 1.0, vectors, module, x)
        if vectors[1] is None:
            return divide_kernel(parameter, norms[0], scale, vectors[0])
        return divide_blocks(parameter, norms, scale, vectors)

    def _fits(self, parameter: torch.Tensor, norms: list[torch.Tensor]) -> bool:
        """Whether norms along the vectors are those measured; steps in between explain others."""
        own = type(parameter) is nn.Parameter
        waits = parameter.device.type != "cpu" and torch.is_grad_enabled()
        if waits or not own:
            return True
        state = self.state
        assert state is not None
        follow = track(self.geometry, self.rule.norm)
        return all(
            abs(float(a) - float(b)) <= _SAME * abs(float(b)) or not math.isfinite(float(a))
            for a, b in zip(norms, follow.measured(state), strict=True)
        )

    def _check(self, parameter: torch.Tensor) -> None:
        """The same for weights that are not divided in few operations, where they were written."""
        if self.drifting or not hasattr(self.rule, "norm") or type(parameter) is not nn.Parameter:
            return
        self._follow_dtype(parameter)
        state = self.state
        assert state is not None
        follow = track(self.geometry, self.rule.norm)
        with torch.no_grad():
            weight = parameter.detach()
            half = weight.dtype in (torch.float16, torch.bfloat16)
            norms = follow.norms(weight.float() if half else weight, state)
            pairs = zip(norms, follow.measured(state), strict=True)
            if all(torch.allclose(a, b, rtol=_SAME, atol=0.0, equal_nan=True) for a, b in pairs):
                self._version = _version(parameter)
                return
        self._restart(parameter)

    @torch.compiler.disable
    def _restart(self, parameter: torch.Tensor) -> None:
        forgiven = (NonFiniteError, GeometryError) if self.lenient else (NonFiniteError,)
        with contextlib.suppress(*forgiven):
            self.prepare(parameter)

    def _follow_dtype(self, parameter: torch.Tensor) -> None:
        """Models are cast and moved after attaching; half precision keeps single vectors."""
        state = self.state
        assert state is not None
        dtype, device = parameter.dtype, parameter.device
        wanted = torch.float64 if dtype == torch.float64 else torch.float32
        if dtype.is_complex:
            return
        for key, x in state.items():
            if (x.dtype != wanted or x.device != device) and x.is_floating_point():
                state = self.state = {**state, key: x.to(parameter.device, wanted)}

    def _scale(self) -> Any:
        if self.overrides:
            return self.overrides["scale"]
        if type(self.rule.scale) is float:
            return self.rule.scale
        return self.rule.fixed_scale(1, self.name, self.geometry)


def _version(parameter: torch.Tensor) -> tuple[int, ...]:
    """What changes when a parameter is written to."""
    if type(parameter) is not nn.Parameter:
        return ()
    version = 0 if parameter.is_inference() else parameter._version
    return id(parameter), version, parameter.data_ptr()


def _safe(sigma: torch.Tensor) -> torch.Tensor:
    return torch.where(sigma != 0, sigma, torch.ones_like(sigma))


def _quotient(w: torch.Tensor, norm: torch.Tensor, scale: float) -> torch.Tensor:
    """By torch's own operations, which cost a small weight least, forward and backward."""
    return w * (norm.reciprocal() if scale == 1.0 else scale / norm)


def _is_recorded() -> bool:
    """Whether others keep count of tensors saved for backward, as checkpoints do."""
    return _top_hooks is None or _top_hooks(True) is not None


def _is_transformed() -> bool:
    """Whether a compiler, a tracer or a function transform is at work."""
    if torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None:
        return True
    return bool(torch._C._are_functorch_transforms_active())
