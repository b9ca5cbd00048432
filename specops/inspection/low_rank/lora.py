"""Updates B·A: LoRA and similar ones, of matrices, kernels, embeddings and stacked parameters."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np

from specops.inspection.low_rank.scale import Scale, rank_of, scale_of
from specops.inspection.low_rank.update import DORA, UPDATE, Shapes, Tensors, Update

_PAIRS: Final = (
    # first factor, second factor: names of peft (with or without an adapter's), of kohya
    (r"\.lora_A(\.(?!weight)[^.]+)?(\.weight)?$", ".lora_B{1}{2}"),
    (r"\.lora_embedding_A(\.[^.]+)?()$", ".lora_embedding_B{1}{2}"),
    (r"\.lora_down()(\.weight)$", ".lora_up{1}{2}"),
)
_FLAX: Final = re.compile(r"(.+)([./])lora_a(\.value)?")
"""(stem), (separator of names), (suffix that nnx adds to a variable)."""
_LENGTHS: Final = ("lora_magnitude_vector", "dora_scale")
_CHANGED_BASES: Final = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Initialisations of peft that subtract the initial update from the base weight."""
_VARIANTS: Final = ("use_qalora", "use_bdlora", "kasa_config", "monteclora_config")
"""Settings of peft under which an update is not B·A alone."""
_ROUNDING: Final = 1e-5
"""The number that AdaLoRA adds to the rank by which it divides."""


def loras(shapes: Shapes, adapter: Mapping[str, Any]) -> Iterator[Update]:
    """All updates B·A of a file."""
    for layer, first, second, which in _pairs(shapes):
        yield from _lora(layer, first, second, which, shapes, adapter)
    yield from _of_flax(shapes)


def _pairs(shapes: Shapes) -> Iterator[tuple[str, str, str, str]]:
    """(layer, first factor, second factor, the adapter's part of the name) of each product B·A."""
    for name, shape in shapes.items():
        for pattern, second in _PAIRS:
            found = re.search(pattern, name)
            if found is None:
                continue
            layer = name[: found.start()]
            other = layer + second.format("", found[1] or "", found[2] or "")
            if other in shapes and len(shape) >= 2:
                yield layer, name, other, found[1] or ""


def _lora(
    layer: str, first: str, second: str, which: str, shapes: Shapes, adapter: Mapping[str, Any]
) -> Iterator[Update]:
    a, b = shapes[first], shapes[second]
    rank, told = a[0], rank_of(layer, adapter)
    if len(b) < 2 or 0 in (*a, *b) or any(n != 1 for n in b[2:]) or rank % b[1]:
        return
    groups, experts = rank // b[1], 1
    if groups > 1 and (len(a) == 2 or b[0] % groups):
        return
    if adapter.get("target_parameters") and len(a) == 2 and told and rank % told == 0:
        experts = rank // told
    scale = scale_of(layer, rank // experts, shapes, adapter)
    how = f"low-rank update B·A of rank {rank // experts}, {scale.words}"
    names = [f"{layer}.{end}{tail}" for end in _LENGTHS for tail in (which, f"{which}.weight")]
    lengths = next((n for n in names if n in shapes), "")
    if lengths:
        how += DORA
    sources = (first, second, *scale.sources, *((lengths,) if lengths else ()))
    update = Update(
        layer,
        f"{layer}{UPDATE}",
        (b[0], *a[1:]),
        sources,
        how,
        lora := _Lora(first, second, scale, groups),
        bases=_bases(layer),
        turned="lora_embedding" in first,
        lengths=lengths,
        obstacle=scale.obstacle or _obstacle(layer, adapter),
    )
    middle, values = f"{layer}.lora_mid.weight", f"{layer}.lora_E{which}"
    if len(shapes.get(middle, ())) > 2 and groups == 1:
        shape, sources = (b[0], a[1], *shapes[middle][2:]), (*sources, middle)
        update = replace(update, shape=shape, sources=sources, make=_Mid(lora, middle))
    elif experts > 1:
        shape = (experts, *update.shape)
        how += ", of each of the matrices that a parameter is a stack of"
        update = replace(update, shape=shape, how=how, make=_Stack(lora, experts))
    elif values in shapes:
        how = how.replace("B·A", "B·diag(E)·A")
        sources = (*sources, values)
        update = replace(update, sources=sources, how=how, make=_Adaptive(lora, values))
    yield update


def _bases(layer: str) -> tuple[str, ...]:
    inside = (f"{layer}.base_layer", layer)
    return tuple(f"{stem}.{last}" for last in ("weight", "in_proj_weight") for stem in inside)


def _of_flax(shapes: Shapes) -> Iterator[Update]:
    """Updates of nnx.LoRA: factors (inputs, rank) and (rank, outputs), added to a kernel."""
    for first, shape in shapes.items():
        found = _FLAX.fullmatch(first)
        if found is None:
            continue
        stem, dot, end = found.groups(default="")
        second = f"{stem}{dot}lora_b{end}"
        other = shapes.get(second, ())
        outer = f"{stem.rpartition(dot)[0]}{dot}kernel{end}".removeprefix(dot)
        bases = (outer, f"{stem}{dot}base_module{dot}kernel{end}")
        base = next((shapes[n] for n in bases if n in shapes), ())
        if len(shape) == len(other) == 2 and shape[1] == other[0] and base == (shape[0], other[1]):
            how = f"low-rank update of rank {shape[1]}, as flax' LoRA adds it"
            make = _Flax(first, second)
            name, sizes = f"{stem}{UPDATE}", (other[1], shape[0])
            yield Update(stem, name, sizes, (first, second), how, make, bases, turned=True)


def _obstacle(layer: str, adapter: Mapping[str, Any]) -> str:
    """Why B·A cannot be added to the base; "" if it can."""
    if layer.endswith(".base_layer.out_proj"):
        return "behind an attention, where peft (0.21) adds it twice"
    begun = adapter.get("init_lora_weights")
    if isinstance(begun, str) and begun.lower().startswith(_CHANGED_BASES):
        return f"{begun} changed the weight that it is added to when it was made"
    found = [key for key in _VARIANTS if adapter.get(key)]
    return f"{found[0]}: it is not all of the update" if found else ""


@dataclass(frozen=True)
class _Lora:
    first: str
    second: str
    scale: Scale
    groups: int = 1
    """Groups of a convolution's outputs, each of which uses its own part of the ranks."""

    def factors(self, tensors: Tensors) -> tuple[np.ndarray, np.ndarray]:
        """B with the scale, without its axes of taps, and A."""
        a = tensors[self.first].astype(np.float64)
        b = tensors[self.second].astype(np.float64) * self.scale.of(tensors)
        return b.reshape(b.shape[:2]), a

    def __call__(self, tensors: Tensors) -> np.ndarray | tuple[np.ndarray, np.ndarray]:
        b, a = self.factors(tensors)
        if a.ndim == 2:
            return b, a
        parts = zip(np.split(b, self.groups), np.split(a, self.groups), strict=True)
        return np.concatenate([np.tensordot(one, other, axes=1) for one, other in parts])


@dataclass(frozen=True)
class _Flax:
    first: str
    second: str

    def __call__(self, tensors: Tensors) -> tuple[np.ndarray, np.ndarray]:
        a, b = (tensors[n].astype(np.float64) for n in (self.first, self.second))
        return b.T, a.T


@dataclass(frozen=True)
class _Mid:
    outer: _Lora
    middle: str

    def __call__(self, tensors: Tensors) -> np.ndarray:
        b, a = self.outer.factors(tensors)
        m = tensors[self.middle].astype(np.float64)
        return np.asarray(np.einsum("or,rs...,si->oi...", b, m, a.reshape(a.shape[:2])))


@dataclass(frozen=True)
class _Stack:
    """peft's update of a stack of matrices: the two factors have ranks in different orders."""

    outer: _Lora
    count: int

    def __call__(self, tensors: Tensors) -> np.ndarray:
        b, a = self.outer.factors(tensors)
        b = b.reshape(len(b), -1, self.count)
        return np.asarray(np.einsum("ore,eri->eoi", b, a.reshape(self.count, -1, a.shape[-1])))


@dataclass(frozen=True)
class _Adaptive:
    """AdaLoRA's update, which has singular values of its own."""

    outer: _Lora
    values: str

    def __call__(self, tensors: Tensors) -> tuple[np.ndarray, np.ndarray]:
        b, a = self.outer.factors(tensors)
        rank = len(a)
        e = tensors[self.values].astype(np.float64).reshape(rank, 1)
        return b * (rank / (rank + _ROUNDING)), a * e
