"""Low-rank updates of weights, as peft, kohya and LyCORIS store them: LoRA, LoHa, LoKr."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Final

import numpy as np

Tensors = Mapping[str, np.ndarray]
Shapes = Mapping[str, tuple[int, ...]]
Make = Callable[[Tensors], np.ndarray | tuple[np.ndarray, np.ndarray]]
Update = tuple[str, tuple[int, ...], tuple[str, ...], str, Make]
UNSCALED: Final = "not scaled: the file has no α"
DORA: Final = "; DoRA scales its sum with the base weight anew"
UPDATE: Final = " (update)"
"""What follows the name of a layer in that of its update."""
_PAIRS: Final = (
    # first factor, second factor: names of peft (with or without an adapter's), of kohya
    (r"\.lora_A(\.(?!weight)[^.]+)?(\.weight)?$", ".lora_B{1}{2}"),
    (r"\.lora_embedding_A(\.[^.]+)?()$", ".lora_embedding_B{1}{2}"),
    (r"\.lora_down()(\.weight)$", ".lora_up{1}{2}"),
)


def find_updates(shapes: Shapes, adapter: Mapping[str, Any]) -> Iterator[Update]:
    """(name, shape, sources, how, how to make it) of each update in a file.

    The only one of its layer is called by that and `UPDATE`.
    """
    pairs = list(_pairs(shapes))
    adapters = Counter(stem for stem, _, _ in pairs)
    for stem, first, second in pairs:
        for name, *rest in _lora(stem, first, second, shapes, adapter):
            which = f"{stem} (update by {first.removeprefix(stem).strip('.')})"
            yield (name if adapters[stem] == 1 else which, *rest)  # type: ignore[misc]
    for name in shapes:
        for ending, make in (("hada_w1_a", _loha), ("lokr_w1", _lokr), ("lokr_w1_a", _lokr)):
            stem, _, last = name.rpartition(".")
            if last == ending:
                yield from make(stem, shapes)


def _pairs(shapes: Shapes) -> Iterator[tuple[str, str, str]]:
    """(layer, first factor, second factor) of each product B·A."""
    for name, shape in shapes.items():
        for pattern, second in _PAIRS:
            found = re.search(pattern, name)
            if found is None:
                continue
            stem = name[: found.start()]
            other = stem + second.format("", found[1] or "", found[2] or "")
            if other in shapes and len(shape) >= 2:
                yield stem, name, other


def _scale(stem: str, rank: int, shapes: Shapes, adapter: Mapping[str, Any]) -> _Scale:
    """What an update is multiplied by: α/rank where the file, or peft's settings, have α."""
    if shapes.get(f"{stem}.alpha") in ((), (1,)):
        return _Scale(f"{stem}.alpha", rank, 1.0, f"times α/{rank}")
    alpha = _of_pattern(adapter.get("alpha_pattern"), stem, adapter.get("lora_alpha"))
    if not isinstance(alpha, int | float):
        return _Scale("", rank, 1.0, UNSCALED)
    below = math.sqrt(rank) if adapter.get("use_rslora") else rank
    return _Scale("", rank, alpha / below, f"times {alpha / below:.4g}, as adapter_config.json has")


def _of_pattern(table: Any, stem: str, otherwise: Any) -> Any:
    if isinstance(table, dict):
        for key, value in table.items():
            if stem.endswith(f".{key}") or fnmatchcase(stem, f"*.{key}"):
                return value
    return otherwise


@dataclass(frozen=True)
class _Scale:
    alpha: str
    rank: int
    factor: float
    words: str

    def of(self, tensors: Tensors) -> float:
        if not self.alpha:
            return self.factor
        return float(tensors[self.alpha].reshape(-1)[0]) / self.rank

    @property
    def sources(self) -> tuple[str, ...]:
        return (self.alpha,) if self.alpha else ()


def _lora(
    stem: str, first: str, second: str, shapes: Shapes, adapter: Mapping[str, Any]
) -> Iterator[Update]:
    a, b = shapes[first], shapes[second]
    middle = f"{stem}.lora_mid.weight"
    rank = a[0]
    if len(b) < 2 or b[1] != rank or any(n != 1 for n in b[2:]):
        return
    scale = _scale(stem, rank, shapes, adapter)
    update, how = f"{stem}{UPDATE}", f"low-rank update B·A of rank {rank}, {scale.words}"
    if f"{stem}.lora_magnitude_vector" in shapes or f"{stem}.dora_scale" in shapes:
        how += DORA
    if middle in shapes and len(shapes[middle]) > 2:
        taps = shapes[middle][2:]
        sources = (first, second, middle, *scale.sources)
        yield update, (b[0], a[1], *taps), sources, how, _Mid(first, second, middle, scale)
        return
    sources = (first, second, *scale.sources)
    yield update, (b[0], *a[1:]), sources, how, _Lora(first, second, scale)


@dataclass(frozen=True)
class _Lora:
    first: str
    second: str
    scale: _Scale

    def __call__(self, tensors: Tensors) -> np.ndarray | tuple[np.ndarray, np.ndarray]:
        a = tensors[self.first].astype(np.float64)
        b = tensors[self.second].astype(np.float64) * self.scale.of(tensors)
        b = b.reshape(b.shape[:2])
        if a.ndim == 2:
            return b, a
        return np.tensordot(b, a, axes=1)


@dataclass(frozen=True)
class _Mid:
    first: str
    second: str
    middle: str
    scale: _Scale

    def __call__(self, tensors: Tensors) -> np.ndarray:
        a, b, m = (tensors[n].astype(np.float64) for n in (self.first, self.second, self.middle))
        a, b = a.reshape(a.shape[:2]), b.reshape(b.shape[:2]) * self.scale.of(tensors)
        return np.asarray(np.einsum("or,rs...,si->oi...", b, m, a))


def _loha(stem: str, shapes: Shapes) -> Iterator[Update]:
    """(w1_a w1_b) ∘ (w2_a w2_b), with Tucker cores of convolutions where there are any."""
    names = [f"{stem}.hada_w{i}_{x}" for i in (1, 2) for x in "ab"]
    if any(len(shapes.get(n, ())) != 2 for n in names):
        return
    cores = [f"{stem}.hada_t{i}" for i in (1, 2)]
    tucker = all(n in shapes for n in cores)
    one_a, one_b = shapes[names[0]], shapes[names[1]]
    rank = one_b[0]
    shape = (one_a[1], one_b[1], *shapes[cores[0]][2:]) if tucker else (one_a[0], one_b[1])
    scale = _scale(stem, rank, shapes, {})
    how = f"Hadamard product of two updates of rank {rank}, {scale.words}"
    sources = (*names, *(cores if tucker else ()), *scale.sources)
    yield f"{stem}{UPDATE}", shape, sources, how, _Hadamard(stem, tucker, scale)


@dataclass(frozen=True)
class _Hadamard:
    stem: str
    tucker: bool
    scale: _Scale

    def __call__(self, tensors: Tensors) -> np.ndarray:
        product: Any = self.scale.of(tensors)
        for i in (1, 2):
            a, b = (tensors[f"{self.stem}.hada_w{i}_{x}"].astype(np.float64) for x in "ab")
            if self.tucker:
                core = tensors[f"{self.stem}.hada_t{i}"].astype(np.float64)
                product = product * np.einsum("rs...,si,ro->oi...", core, b, a)
            else:
                product = product * (a @ b)
        return np.asarray(product)


def _lokr(stem: str, shapes: Shapes) -> Iterator[Update]:
    """w1 ⊗ w2, either of them whole or a product, the second with a Tucker core or not."""
    parts = [_factor(f"{stem}.lokr_w{i}", f"{stem}.lokr_t{i}", shapes) for i in (1, 2)]
    if any(part is None for part in parts):
        return
    (one, first, rank_one), (two, second, rank_two) = parts  # type: ignore[misc]
    if f"{stem}.lokr_w1" in shapes and f"{stem}.lokr_w1_a" in shapes:
        return
    shape = (one[0] * two[0], one[1] * two[1], *two[2:])
    rank = rank_two or rank_one
    # Whole factors are not scaled, as in LyCORIS.
    scale = _scale(stem, rank, shapes, {}) if rank else _Scale("", 1, 1.0, "not scaled")
    how = f"Kronecker product of {one[0]}×{one[1]} and {two[0]}×{two[1]}, {scale.words}"
    yield (
        f"{stem}{UPDATE}",
        shape,
        (*first, *second, *scale.sources),
        how,
        _Kronecker(first, second, scale),
    )


def _factor(
    name: str, core: str, shapes: Shapes
) -> tuple[tuple[int, ...], tuple[str, ...], int] | None:
    """(shape, tensors, rank or 0) of a factor of a Kronecker product."""
    if name in shapes:
        return shapes[name], (name,), 0
    a, b = shapes.get(f"{name}_a", ()), shapes.get(f"{name}_b", ())
    if len(a) != 2 or len(b) < 2:
        return None
    if core in shapes:
        taps = shapes[core][2:]
        return (a[1], b[1], *taps), (f"{name}_a", f"{name}_b", core), b[0]
    return (a[0], *b[1:]), (f"{name}_a", f"{name}_b"), b[0]


@dataclass(frozen=True)
class _Kronecker:
    first: tuple[str, ...]
    second: tuple[str, ...]
    scale: _Scale

    def __call__(self, tensors: Tensors) -> np.ndarray:
        one, two = (_whole(names, tensors) for names in (self.first, self.second))
        one = one.reshape(*one.shape, *(1,) * (two.ndim - one.ndim))
        return np.kron(one * self.scale.of(tensors), two)


def _whole(names: tuple[str, ...], tensors: Tensors) -> np.ndarray:
    parts = [tensors[n].astype(np.float64) for n in names]
    if len(parts) == 1:
        return parts[0]
    if len(parts) == 3:
        a, b, core = parts
        return np.asarray(np.einsum("rs...,si,ro->oi...", core, b, a))
    return np.tensordot(parts[0], parts[1], axes=1)
