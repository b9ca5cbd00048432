"""Weights with a low-rank update added: what a network runs that has both."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from specops.inspection.low_rank import DORA, UNSCALED, UPDATE, Make, Shapes, Tensors, Update


def find_merged(
    updates: Iterable[Update], shapes: Shapes, adapter: Mapping[str, Any]
) -> Iterator[tuple[str, tuple[int, ...], tuple[str, ...], str, Make, str]]:
    """(name, shape, sources, how, how to make it, base) of each base + update in a file.

    Where the file has the base, says how much of the update to add, and has no other update: which
    of several is in use, no file says.
    """
    for update, shape, sources, how, make in updates:
        stem = update.removesuffix(UPDATE)
        base = next((n for n in (f"{stem}.base_layer.weight", f"{stem}.weight") if n in shapes), "")
        turned = is_turned(sources[0], adapter)
        if stem == update or shapes.get(base) != (shape[::-1] if turned else shape):
            continue
        if can_be_added(how):
            name = f"{stem}.weight"
            name = f"{name} (merged)" if name == base else name
            merged = _Merged(base, make, turned)
            yield name, shapes[base], (base, *sources), f"{base} and its {how}", merged, base


@dataclass(frozen=True)
class _Merged:
    base: str
    update: Make
    turned: bool

    def __call__(self, tensors: Tensors) -> np.ndarray:
        return added(tensors[self.base], self.update(tensors), self.turned)


def is_turned(first: str, adapter: Mapping[str, Any]) -> bool:
    """Whether an update with this first factor is added transposed.

    That of a table is, and those of layers that store (inputs, outputs).
    """
    return "lora_embedding" in first or adapter.get("fan_in_fan_out") is True


def can_be_added(how: str) -> bool:
    """Whether what is said of an update tells all that its sum with the base takes."""
    return UNSCALED not in how and DORA not in how


def added(
    base: np.ndarray, update: np.ndarray | tuple[np.ndarray, np.ndarray], turned: bool
) -> np.ndarray:
    """base + update, in double precision.

    Raises
    ------
    ValueError
        Their shapes differ.
    """
    whole = update[0] @ update[1] if isinstance(update, tuple) else update
    whole = whole.T if turned else whole
    if whole.shape != base.shape:
        raise ValueError(f"an update of shape {whole.shape} for a weight of shape {base.shape}")
    return np.asarray(base.astype(np.float64) + whole)
