"""`Context`: what is known besides a tensor's name and shape: other tensors, hints, settings."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from string import digits
from typing import Any, Final

from specops.checkpoints import Entry
from specops.geometry.fused import Surroundings
from specops.inspection.assumptions.scales import unscaled
from specops.inspection.configuration import Configuration
from specops.inspection.hints import Hints, bare_name
from specops.inspection.low_rank import UPDATE

LEAF: Final = "leaf."
"""The prefix of made-up names, for files that hold tensors in order but without names."""


_ATTENTION: Final = ("query", "key", "value")
_PROJECTIONS: Final = ("out", "attention_output", "output_dense")
"""Names of the projections to heads, and of those back from them."""
_VARIABLES: Final = r"(?:^|[./])(?:kernel|bias|scale|embedding|weight|mean|var)"
_OF_LAYER: Final = re.compile(r"((?:.*[./])?)[^./]+([./][^./]+)")
"""A name as (path to the layer) layer (the tensor's own part)."""
_NUMBERED: Final = re.compile(r"((?:.*\.)?)(\d+)\.weight")
_ENDS: Final = re.compile(rf"{_VARIABLES}(\.value)$|(:\d+)$")


@dataclass(frozen=True)
class Kernel:
    """A tensor with taps, seen by its channels.

    Attributes
    ----------
    name : str
    outputs : int
        Number of channels on the axis that is never divided into groups.
    inputs : int
        Number of channels on the other axis: those of one group.
    turned : bool
        Whether the tensors that follow show that it is stored transposed.
    axes : int
        Number of axes of taps.
    part : str
        The part of the model that it is in: the first component of its name.
    parts : list of str
        All components of its name.
    """

    name: str
    outputs: int
    inputs: int
    turned: bool
    axes: int
    part: str
    parts: list[str]


@dataclass(frozen=True)
class Context:
    """What is known besides a tensor's own name and shape.

    Attributes
    ----------
    shapes : dict of str to tuple of int
        Shapes of all tensors, in the order of the file, and of weights composed of several.
    layout : str
        The framework whose order of axes to assume, or "".
    hints : Hints
        The user's hints.
    configuration : Configuration
        What the file, or one beside it, says about the model.
    ordered : bool
        Whether tensors are known to stand in the order of the model.
    """

    shapes: dict[str, tuple[int, ...]]
    layout: str = ""
    hints: Hints = field(default_factory=Hints)
    configuration: Configuration = field(default_factory=Configuration)
    ordered: bool = False

    @classmethod
    def of(
        cls,
        entries: Iterable[Entry],
        layout: str,
        hints: Hints,
        configuration: Configuration,
        ordered: bool = False,
    ) -> Context:
        """The context of a checkpoint's entries."""
        shapes = {e.name: e.shape for e in entries if e.shape is not None}
        return cls(shapes, hints.layout or layout, hints, configuration, ordered)

    @property
    def taps_first(self) -> bool:
        """Whether kernels are stored as (*taps, inputs, outputs)."""
        return self.layout in ("jax", "keras")

    def beside(self, name: str, last: str) -> str:
        """The name of another tensor of the same layer."""
        end = _end_of(name)
        at = max(name.removesuffix(end).rfind(c) for c in "./") + 1
        return name[:at] + last + end

    def around(self, name: str) -> Surroundings:
        """The surroundings of a tensor: other layers of its block, or stacks beside it."""
        end = _end_of(name)
        of_layer = _OF_LAYER.fullmatch(name.removesuffix(end))

        def beside(other: str) -> tuple[int, ...]:
            if name.endswith(UPDATE):
                return self.shapes.get(self.beside(name, other + UPDATE), ())
            if of_layer is None or parts_of(name)[-1] == "gate_up_proj":
                return self.shapes.get(self.beside(name, other), ())
            lead = of_layer[1]
            while other.startswith("../"):
                other = other.removeprefix("../")
                lead = lead[: max(lead[:-1].rfind(c) for c in "./") + 1]
            names = (f"{lead}{other}{of_layer[2]}{end}", f"{lead}{other}{end}")
            return next((self.shapes[n] for n in names if n in self.shapes), ())

        return Surroundings(self.configuration.value, beside)

    def bias(self, name: str) -> tuple[int, ...] | None:
        """The shape of the bias of the layer that has this weight, if it is there."""
        last = parts_of(name)[-1]
        if name.startswith(LEAF):
            following = self.shapes.get(f"{LEAF}{int(last) + 1}", ())
            return following[:1] if set(following[1:]) <= {1} and following else None
        names = [self.beside(name, "bias"), self.beside(name, "b")]
        if last == "0" and self.layout == "keras":
            names.append(self.beside(name, "1"))
        if last.startswith(("weight_", "kernel_")):
            names.append(self.beside(name, f"bias_{last.partition('_')[2]}"))
        return next((self.shapes[n] for n in names if n in self.shapes), None)

    def behind(self, name: str) -> int:
        """The channels of a kernel's outputs, by its bias or the norm right after it; 0 if unknown.

        The norm counts only in a numbered sequence, where nothing else can be in between.
        """
        bias = self.bias(name)
        if bias is not None:
            return bias[0] if len(bias) == 1 else 0
        found = _NUMBERED.fullmatch(name)
        if found is None:
            return 0
        norm = f"{found[1]}{int(found[2]) + 1}."
        channels, shift = (self.shapes.get(norm + last, ()) for last in ("weight", "bias"))
        return channels[0] if len(channels) == 1 and channels == shift else 0

    @cached_property
    def kept(self) -> dict[tuple[Any, ...], Any]:
        """A cache of what was found about a layer and is needed again for others."""
        return {}

    @cached_property
    def parts(self) -> dict[str, list[str]]:
        """The components of all names."""
        return {name: parts_of(name) for name in self.shapes}

    @cached_property
    def wraps_layers(self) -> bool:
        """Whether the layers of an adapter wrap layers."""
        return any(".base_layer." in name for name in self.shapes)

    def is_of_scaled(self, name: str) -> bool:
        """Whether this is the name of scales, next to the tensor that they scale."""
        whose = unscaled(name)
        return whose in self.shapes or self._unscaled[whose] > 1

    @cached_property
    def _unscaled(self) -> Counter[str]:
        return Counter(map(unscaled, self.shapes))

    @cached_property
    def kernels(self) -> tuple[Kernel, ...]:
        """All tensors with taps, in the order of the network as far as names tell it."""
        found = []
        for name, shape in self.shapes.items():
            if not 3 <= len(shape) <= 5 or 0 in shape or _no_kernel(name, shape):
                continue
            outputs, inputs = (shape[-1], shape[-2]) if self.taps_first else (shape[0], shape[1])
            behind = 0 if self.taps_first else self.behind(name)
            turned = behind == shape[1] != shape[0]
            if turned:
                outputs, inputs = inputs, outputs
            where = part_of(name), self.parts[name]
            found.append(Kernel(name, outputs, inputs, turned, len(shape) - 2, *where))
        if self.is_sorted:
            found.sort(key=lambda kernel: natural(kernel.name))
        return tuple(found)

    @cached_property
    def is_sorted(self) -> bool:
        """Whether tensors are in the order of their names, not in that of the network."""
        names = [name for name, shape in self.shapes.items() if len(shape) > 1]
        return self.layout != "torch" or not (self.ordered or names != sorted(names))

    def before(self, name: str) -> tuple[Kernel, ...]:
        """The kernels that come before this one in the network, as far as order or numbers tell."""
        names = [kernel.name for kernel in self.kernels]
        found = self.kernels[: names.index(name)] if name in names else ()
        if self.is_sorted:
            parts = parts_of(name)
            return tuple(kernel for kernel in found if are_in_order(kernel.parts, parts))
        return found


def parts_of(name: str) -> list[str]:
    """The components of a name, without suffixes that flax nnx and older Keras add to variables."""
    return name.removesuffix(_end_of(name)).replace("/", ".").split(".")


def is_attention(parts: list[str]) -> bool:
    """Whether a name is that of a query, key or value."""
    return any(p.lstrip("_").startswith(_ATTENTION) for p in parts)


def is_behind_attention(parts: list[str]) -> bool:
    """Whether a name is that of the projection back from heads."""
    return any(p.lstrip("_") in _PROJECTIONS for p in parts)


def _end_of(name: str) -> str:
    found = _ENDS.search(name)
    return "" if found is None else found[1] or found[2]


def part_of(name: str) -> str:
    """The first component of a name, if it is no number and no layer itself."""
    parts = parts_of(bare_name(name))
    return "" if parts[0].isdecimal() or len(parts) < 3 else parts[0]


def block_of(name: str) -> str:
    """The part of a name that tensors of one block share: the name up to its last number."""
    parts = parts_of(name)
    at = [i for i, part in enumerate(parts[:-1]) if part.isdecimal()]
    return ".".join(parts[: at[-1] + 1]) if at else ""


def are_in_order(one: list[str], other: list[str]) -> bool:
    """Whether numbers say which of two names, by their components, comes first."""
    a, b = next(((a, b) for a, b in zip(one, other, strict=False) if a != b), ("", ""))
    return a.rstrip(digits) == b.rstrip(digits)


def natural(name: str) -> list[tuple[int, str]]:
    """A key that sorts layer.10 after layer.9."""
    return [(int(t), "") if t.isdecimal() else (-1, t) for t in re.split(r"(\d+)", name)]


def _no_kernel(name: str, shape: tuple[int, ...]) -> bool:
    """Whether a tensor of three axes or more has no taps: experts, biases along channels."""
    parts = parts_of(name.lower())
    attends = (is_attention(parts) or is_behind_attention(parts)) and len(shape) == 3
    return "expert" in name.lower() or "bias" in parts[-1] or set(shape[1:]) == {1} or attends
