"""Weights with a low-rank update added, as a network uses them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from specops.inspection.low_rank.update import Make, Shapes, Tensors, Update


def find_merged(
    updates: Iterable[Update], shapes: Shapes, adapter: Mapping[str, Any]
) -> Iterator[tuple[str, tuple[int, ...], tuple[str, ...], str, Make, str]]:
    """(name, shape, sources, description, function, base) of each base + update in a file.

    The file must have the base, say how much of the update to add, and have no other update of it:
    no file says which of several is in use.
    """
    for update in updates:
        base = next((n for n in update.bases if n in shapes), "")
        shape = shapes.get(base, ())
        turned = is_turned(update, shape, adapter)
        if update.obstacle or not _fits(update, shape, turned):
            continue
        name = base.replace(".base_layer", "")
        name = f"{name} (merged)" if name == base else name
        how = f"{base} and its {update.how}"
        yield name, shape, (base, *update.sources), how, _Merged(base, update, turned), base


@dataclass(frozen=True)
class _Merged:
    base: str
    update: Update
    turned: bool

    def __call__(self, tensors: Tensors) -> np.ndarray:
        return added(tensors[self.base], self.update, tensors, self.turned)


def is_turned(
    update: Update, base: tuple[int, ...], adapter: Mapping[str, Any], outputs_last: bool = False
) -> bool:
    """Whether an update is added transposed, as for embeddings and layers (inputs, outputs).

    Shapes tell, unless they are square. Then other knowledge of the layer does, or peft's settings,
    which are those of the last layer if there are several kinds.
    """
    if update.turned or len(update.shape) != 2 or len(base) != 2:
        return update.turned
    if base[0] != base[1]:
        return update.shape == base[::-1]
    return outputs_last or adapter.get("fan_in_fan_out") is True


def _fits(update: Update, base: tuple[int, ...], turned: bool) -> bool:
    """Whether the update fits a weight of this shape, in whatever axes its taps are."""
    shape = update.shape[::-1] if turned else update.shape
    flat = len(shape) != len(base) > 2 and shape[0] == base[0]
    return shape == base or (flat and math.prod(shape) == math.prod(base))


def added(base: np.ndarray, update: Update, tensors: Tensors, turned: bool) -> np.ndarray:
    """base + update in double precision, rescaled to DoRA's lengths if there are any.

    Raises
    ------
    ValueError
        Their shapes differ.
    """
    if not _fits(update, base.shape, turned):
        raise ValueError(f"an update of shape {update.shape} for a weight of shape {base.shape}")
    made = update.make(tensors)
    whole = made[0] @ made[1] if isinstance(made, tuple) else made
    w = base.T if turned else base
    total = w.astype(np.float64) + whole.reshape(w.shape)
    if update.lengths:
        total = _of_lengths(total, tensors[update.lengths].astype(np.float64), update.lengths)
    return np.asarray(total.T if turned else total)


def _of_lengths(w: np.ndarray, lengths: np.ndarray, name: str) -> np.ndarray:
    """The weight with these lengths along its outputs, or, as LyCORIS may store, its inputs."""
    axis = 0
    if name.endswith("dora_scale") and lengths.shape[:1] != w.shape[:1]:
        axis = 1
    if lengths.size != w.shape[axis]:
        raise ValueError(f"{lengths.size} lengths for {w.shape[axis]} channels")
    others = tuple(i for i in range(w.ndim) if i != axis)
    found = np.sqrt(np.sum(w**2, axis=others, keepdims=True))
    return np.asarray(w * (lengths.reshape(found.shape) / found))
