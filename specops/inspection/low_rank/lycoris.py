"""Updates that are products of two matrices: by entries (LoHa) or by Kronecker (LoKr)."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from specops.inspection.low_rank.scale import Scale, scale_of_product
from specops.inspection.low_rank.update import DORA, UPDATE, Shapes, Tensors, Update

_FIRST: Final = re.compile(r"(.+)\.(hada_w1_a|lokr_w1|lokr_w1_a)(\.[^.]+)?")
"""(layer), (factor), and (name of the adapter) if a whole model was saved."""
_FLAT: Final = "; of a convolution, its reshaped kernel"


def products(shapes: Shapes, adapter: Mapping[str, Any]) -> Iterator[Update]:
    """All such updates of a file."""
    for name in shapes:
        found = _FIRST.fullmatch(name)
        if found is not None:
            layer, first, which = found[1], found[2], found[3] or ""
            make = _loha if first == "hada_w1_a" else _lokr
            yield from make(layer, which, shapes, adapter)


def _loha(layer: str, which: str, shapes: Shapes, adapter: Mapping[str, Any]) -> Iterator[Update]:
    """(w1_a w1_b) ∘ (w2_a w2_b), for convolutions possibly with Tucker cores."""
    names = tuple(f"{layer}.hada_w{i}_{x}{which}" for i in (1, 2) for x in "ab")
    if any(len(shapes.get(n, ())) != 2 for n in names):
        return
    cores = tuple(f"{layer}.hada_t{i}{which}" for i in (1, 2))
    tucker = all(n in shapes for n in cores)
    one_a, one_b = shapes[names[0]], shapes[names[1]]
    rank = one_b[0]
    shape = (one_a[1], one_b[1], *shapes[cores[0]][2:]) if tucker else (one_a[0], one_b[1])
    scale = scale_of_product(layer, rank, shapes, adapter)
    how = f"Hadamard product of two updates of rank {rank}, {scale.words}"
    cores = cores if tucker else ()
    make = _Hadamard((*names[:2], *cores[:1]), (*names[2:], *cores[1:]), scale)
    yield _update(layer, shape, (*names, *cores), how, make, shapes)


def _update(
    layer: str,
    shape: tuple[int, ...],
    factors: tuple[str, ...],
    how: str,
    make: _Hadamard | _Kronecker,
    shapes: Shapes,
) -> Update:
    lengths = f"{layer}.dora_scale" if f"{layer}.dora_scale" in shapes else ""
    if lengths:
        how += DORA
    if len(shape) == 2:
        how += _FLAT
    sources = (*factors, *make.scale.sources, *((lengths,) if lengths else ()))
    obstacle = make.scale.obstacle
    name = f"{layer}{UPDATE}"
    bases = (f"{layer}.base_layer.weight", f"{layer}.weight")
    return Update(layer, name, shape, sources, how, make, bases, lengths=lengths, obstacle=obstacle)


@dataclass(frozen=True)
class _Hadamard:
    first: tuple[str, ...]
    second: tuple[str, ...]
    scale: Scale

    def __call__(self, tensors: Tensors) -> np.ndarray:
        one, two = (_whole(names, tensors) for names in (self.first, self.second))
        return np.asarray(one * self.scale.of(tensors) * two)


def _lokr(layer: str, which: str, shapes: Shapes, adapter: Mapping[str, Any]) -> Iterator[Update]:
    """w1 ⊗ w2, each of them whole or a product, the second possibly with a Tucker core."""
    parts = [_factor(f"{layer}.lokr_w{i}", f"{layer}.lokr_t{i}", which, shapes) for i in (1, 2)]
    if any(part is None for part in parts):
        return
    (one, first, rank_one), (two, second, rank_two) = parts  # type: ignore[misc]
    if {f"{layer}.lokr_w1{which}", f"{layer}.lokr_w1_a{which}"} <= shapes.keys():
        return
    shape = (one[0] * two[0], one[1] * two[1], *two[2:])
    scale = scale_of_product(layer, rank_two or rank_one, shapes, adapter)
    how = f"Kronecker product of {one[0]}×{one[1]} and {two[0]}×{two[1]}, {scale.words}"
    make = _Kronecker(first, second, scale, len(two) == 3 and bool(adapter))
    yield _update(layer, shape, (*first, *second), how, make, shapes)


def _factor(
    name: str, core: str, which: str, shapes: Shapes
) -> tuple[tuple[int, ...], tuple[str, ...], int] | None:
    """(shape, tensors, rank or 0) of a factor of a Kronecker product."""
    whole, core = f"{name}{which}", f"{core}{which}"
    if whole in shapes:
        return shapes[whole], (whole,), 0
    names = (f"{name}_a{which}", f"{name}_b{which}")
    a, b = (shapes.get(n, ()) for n in names)
    if len(a) != 2 or len(b) < 2:
        return None
    if core in shapes:
        return (a[1], b[1], *shapes[core][2:]), (*names, core), b[0]
    return (a[0], *b[1:]), names, b[0]


@dataclass(frozen=True)
class _Kronecker:
    first: tuple[str, ...]
    second: tuple[str, ...]
    scale: Scale
    last: bool = False
    """Whether the first factor is multiplied along the last axes, as peft does with three."""

    def __call__(self, tensors: Tensors) -> np.ndarray:
        one, two = (_whole(names, tensors) for names in (self.first, self.second))
        shape = (one.shape[0] * two.shape[0], one.shape[1] * two.shape[1], *two.shape[2:])
        if not self.last:
            one = one.reshape(*one.shape, *(1,) * (two.ndim - one.ndim))
        return np.kron(one * self.scale.of(tensors), two).reshape(shape)


def _whole(names: tuple[str, ...], tensors: Tensors) -> np.ndarray:
    """A factor as it is stored, or a product of two matrices, possibly with a Tucker core."""
    parts = [tensors[n].astype(np.float64) for n in names]
    if len(parts) == 1:
        return parts[0]
    if len(parts) == 3:
        a, b, core = parts
        return np.asarray(np.einsum("rs...,si,ro->oi...", core, b, a))
    return np.tensordot(parts[0], parts[1], axes=1)
