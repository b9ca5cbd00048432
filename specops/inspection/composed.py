"""Weights that are computed from several tensors of a file: normalised, pruned, and updates."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from specops.checkpoints import Entry
from specops.inspection.configuration import Configuration
from specops.inspection.low_rank import Tensors, Update, find_updates
from specops.inspection.low_rank.merged import find_merged


@dataclass(frozen=True)
class Composed:
    """A weight that is computed from several tensors.

    Attributes
    ----------
    name : str
        The weight's name.
    shape : tuple of int
    sources : tuple of str
        Names of the tensors that it is computed from.
    how : str
        How it is computed, in words.
    make : callable
        Takes the tensors by name and returns the weight, or the two factors of a low-rank matrix.
    base : str
        The source that is a weight by itself; "" if all sources are parts.
    update : Update, optional
        The low-rank update, if the weight is one.
    """

    name: str
    shape: tuple[int, ...]
    sources: tuple[str, ...]
    how: str
    make: Callable[[Tensors], np.ndarray | tuple[np.ndarray, np.ndarray]]
    base: str = ""
    update: Update | None = None

    @classmethod
    def of(cls, update: Update) -> Composed:
        """A low-rank update as a weight of its own."""
        how, obstacle = update.how, update.obstacle
        if obstacle and obstacle not in how:
            how += f"; {obstacle}"
        return cls(update.name, update.shape, update.sources, how, update.make, update=update)


def find_composed(entries: tuple[Entry, ...], configuration: Configuration) -> list[Composed]:
    """All weights of a file that are computed from several of its tensors."""
    shapes = {e.name: e.shape for e in entries if e.shape is not None and not e.problem}
    found = [*_normalised(shapes), *_spectral(shapes), *_pruned(shapes)]
    updates = list(find_updates(shapes, configuration.adapter))
    merged = find_merged(updates, shapes, configuration.adapter)
    return [*found, *map(Composed.of, updates), *(Composed(*m) for m in merged)]


def _normalised(shapes: Mapping[str, tuple[int, ...]]) -> Iterator[Composed]:
    """torch's weight_norm, old and parametrised, of any dim: w = g·v/‖v‖."""
    for name, shape in shapes.items():
        weight, lengths = _directions(name)
        g = shapes.get(lengths)
        if not weight or g is None or not _are_lengths(g, shape):
            continue
        # A single length is for the whole tensor; otherwise there is one per index of an axis.
        axes = tuple(i for i, n in enumerate(g) if n == 1) if math.prod(g) > 1 else None
        yield Composed(
            weight,
            shape,
            (lengths, name),
            "weight norm: g·v/‖v‖",
            _Normalise(lengths, name, axes),
        )


@dataclass(frozen=True)
class _Normalise:
    lengths: str
    directions: str
    axes: tuple[int, ...] | None

    def __call__(self, tensors: Tensors) -> np.ndarray:
        g, v = (tensors[n].astype(np.float64) for n in (self.lengths, self.directions))
        scale = float(np.abs(v).max(initial=0.0)) or 1.0
        v = v / scale
        return np.asarray(g * v / np.sqrt(np.sum(v**2, axis=self.axes, keepdims=True)))


def _directions(name: str) -> tuple[str, str]:
    """The names (weight, lengths) if a tensor may hold directions; empty if not."""
    stem, _, last = name.rpartition(".")
    dot = "." if stem else ""
    if last.endswith("_v") and last != "_v":
        return f"{stem}{dot}{last[:-2]}", f"{stem}{dot}{last[:-2]}_g"
    if last == "original1" and "parametrizations." in f"{stem}.":
        head, _, weight = stem.rpartition("parametrizations.")
        return head + weight, f"{stem}.original0"
    return "", ""


def _are_lengths(g: tuple[int, ...], v: tuple[int, ...]) -> bool:
    """Whether these are lengths: one for the whole tensor, or one per index of an axis."""
    if g in ((), (1,)):
        return len(v) > 1
    along = [a for a, b in zip(g, v, strict=False) if a == b != 1]
    same = len(g) == len(v) and all(a in (1, b) for a, b in zip(g, v, strict=True))
    return same and len(along) <= 1


def _spectral(shapes: Mapping[str, tuple[int, ...]]) -> Iterator[Composed]:
    """torch's spectral_norm in evaluation, old and parametrised: w/(uᵀ W v)."""
    for name, shape in shapes.items():
        if name.endswith("weight_orig"):
            weight = name.removesuffix("_orig")
            u, v = f"{weight}_u", f"{weight}_v"
        elif name.endswith(".original") and "parametrizations." in name:
            stem = name.removesuffix(".original")
            head, _, last = stem.rpartition("parametrizations.")
            weight, u, v = head + last, f"{stem}.0._u", f"{stem}.0._v"
        else:
            continue
        if u not in shapes or v not in shapes or len(shape) < 2:
            continue
        axis = _output_axis(shape, shapes[u], shapes[v])
        if axis is not None:
            how = "spectral norm: W/(uᵀWv) with the vectors stored"
            yield Composed(weight, shape, (name, u, v), how, _Spectral(name, u, v, axis))


@dataclass(frozen=True)
class _Spectral:
    weight: str
    u: str
    v: str
    axis: int

    def __call__(self, tensors: Tensors) -> np.ndarray:
        w, u, v = (tensors[n].astype(np.float64) for n in (self.weight, self.u, self.v))
        matrix = np.moveaxis(w, self.axis, 0).reshape(len(u), -1)
        return np.asarray(w / (u @ matrix @ v))


def _output_axis(shape: tuple[int, ...], u: tuple[int, ...], v: tuple[int, ...]) -> int | None:
    for axis in (0, 1):
        if u == (shape[axis],) and v == (math.prod(shape) // max(shape[axis], 1),):
            return axis
    return None


def _pruned(shapes: Mapping[str, tuple[int, ...]]) -> Iterator[Composed]:
    """torch's pruning: the weight times its mask."""
    for name, shape in shapes.items():
        weight = name.removesuffix("_orig")
        if weight != name and shapes.get(f"{weight}_mask") == shape and len(shape) > 1:
            yield Composed(
                weight,
                shape,
                (name, f"{weight}_mask"),
                "pruned: the weight times its mask",
                _Product(name, f"{weight}_mask"),
            )


@dataclass(frozen=True)
class _Product:
    one: str
    other: str

    def __call__(self, tensors: Tensors) -> np.ndarray:
        return np.asarray(tensors[self.one] * tensors[self.other])
