"""Which map a tensor of a checkpoint is taken for, when only its name and shape are known."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any, Literal

from specops.errors import GeometryError
from specops.geometry import Conv, Dense, Geometry

_INDICES = ("int64", "bool")
_WIDEST_TAP = 31
"""Kernels rarely reach further: a 3-d tensor with more at its end is a stack of matrices."""
_OPTIMIZERS = {"optimizer", "opt_state", "optimizer_state", "optimizer_states"}
_DEPTHWISE = ("depthwise", "dwconv", ".dw.", "conv_dw")
_TABLES = ("embed", "wte", "wpe")


@dataclass(frozen=True)
class Assumption:
    """What a tensor is taken for.

    Attributes
    ----------
    geometry : Dense or Conv, or None
        None: it is not measured.
    why : str
        How that was decided.
    skipped : str
        Why it is not measured.
    harmless : bool
        Whether nothing is missing: biases, counters.
    shape : tuple of int, optional
        To see the tensor in, where the geometry needs another one.
    """

    geometry: Geometry | None = None
    why: str = ""
    skipped: str = ""
    harmless: bool = True
    shape: tuple[int, ...] | None = None


@dataclass
class Hints:
    """What the user knows: patterns of names, and values for the convolutions that match.

    Attributes
    ----------
    input_size, stride, groups : dict of str to tuple of int, or int
        The last pattern that matches a name counts.
    boundary : "zeros" or "circular"
        Of all convolutions.
    layout : str
        "torch", "jax" or "keras": the order of a kernel's axes; "": what the file says.
    """

    input_size: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    stride: Mapping[str, int] = field(default_factory=dict)
    groups: Mapping[str, int] = field(default_factory=dict)
    boundary: Literal["zeros", "circular"] = "zeros"
    layout: str = ""

    def of(self, name: str, key: str) -> Any:
        """The value of the last pattern that matches; None if there is none."""
        table: Mapping[str, Any] = getattr(self, key)
        found = [value for pattern, value in table.items() if fnmatchcase(name, pattern)]
        return found[-1] if found else None

    def unused(self, names: list[str]) -> list[str]:
        """Patterns that match no name."""
        tables = (self.input_size, self.stride, self.groups)
        patterns = {pattern for table in tables for pattern in table}
        return sorted(p for p in patterns if not any(fnmatchcase(n, p) for n in names))


def assume(
    name: str, shape: tuple[int, ...], dtype: str, layout: str, hints: Hints, first_conv: bool
) -> Assumption:
    """The map a tensor is taken for. `first_conv`: no convolution came before it."""
    if 0 in shape:
        return Assumption(skipped="empty")
    if len(shape) < 2:
        return Assumption(skipped="a scalar" if not shape else "1-d: a bias or scale, no matrix")
    if dtype in _INDICES:
        return Assumption(skipped=f"{dtype}: indices or flags, no weights")
    if "int" in dtype or dtype in ("bits8", "opaque"):
        reason = f"{dtype}: quantised or packed, its map is not that of the numbers stored"
        return Assumption(skipped=f"{reason}; dequantise the model first", harmless=False)
    if set(name.replace("/", ".").split(".")) & _OPTIMIZERS:
        return Assumption(skipped="of the optimizer's state")
    layout = hints.layout or layout
    last = name.replace("/", ".").rpartition(".")[2]
    path = name.lower()
    if len(shape) == 2:
        what = "a table, one row for each entry" if _any(path, _TABLES) else "2-d: a matrix"
        out = -1 if layout in ("jax", "keras") else 0
        return Assumption(Dense(out_axes=(out,)), what)
    if len(shape) > 5:
        return Assumption(skipped=f"{len(shape)}-d: no layer that is known", harmless=False)
    if len(shape) == 3:
        heads = _attention(path, last, layout)
        if heads is not None:
            return Assumption(heads, "an attention projection by heads")
        tapped = shape[0] if layout in ("jax", "keras") else shape[-1]
        if "expert" in path or tapped > _WIDEST_TAP:
            why = "named experts" if "expert" in path else f"3-d, {tapped} is too wide for a kernel"
            return Assumption(Dense(out_axes=(1,), batch_axes=(0,)), f"a stack of matrices: {why}")
    return _convolution(name, last, shape, layout, hints, first_conv)


def _convolution(
    name: str, last: str, shape: tuple[int, ...], layout: str, hints: Hints, first: bool
) -> Assumption:
    order, why = _order(shape, layout)
    if order == "*IO":
        inputs, outputs = shape[-2:]
    else:
        outputs, inputs = shape[:2]
    seen: tuple[int, ...] | None = None
    groups, note = hints.of(name, "groups"), ""
    if groups is None:
        groups = 1
        named = _any(name.lower(), _DEPTHWISE)
        separable = "separable" in name.lower() and last == "0"
        if layout == "keras" and (named or separable):
            # Keras: (*kernel, channels, multiplier); outputs of a channel stand together.
            groups, note = inputs, ", named depthwise: (taps, channels, multiplier)"
            shape = seen = (*shape[:-2], 1, inputs * outputs)
        elif inputs == 1 and outputs > 1 and (named or not first):
            groups, note = outputs, ", one input for each output: depthwise"
    size = hints.of(name, "input_size")
    spatial = len(shape) - 2
    if size is not None and len(size) == 1:
        size = size * spatial
    taps = shape[2:] if order == "OI*" else shape[:-2]
    padding: Any = "same"
    if (
        size is not None
        and order == "OI*"
        and hints.boundary == "zeros"
        and all(k % 2 for k in taps)
    ):
        padding = tuple(k // 2 for k in taps)  # torch pads both sides alike at strides too
        note += ", zeros of half a kernel around"
    geometry = Conv(
        size,
        stride=hints.of(name, "stride") or 1,
        groups=groups,
        padding=padding,
        boundary=hints.boundary,
        layout=order,
    )
    try:
        geometry.sizes(shape)
    except GeometryError as error:
        return Assumption(skipped=str(error), harmless=False)
    return Assumption(geometry, f"{len(shape)}-d, {why}{note}", shape=seen)


def _order(shape: tuple[int, ...], layout: str) -> tuple[Literal["OI*", "*IO"], str]:
    if layout in ("jax", "keras"):
        return "*IO", f"{layout}'s order: taps, inputs, outputs"
    if layout == "torch":
        return "OI*", "torch's order: outputs, inputs, taps"
    if max(shape[:-2]) <= _WIDEST_TAP < max(shape[-2:]) or min(shape[-2:]) > max(shape[:-2]):
        return "*IO", "taps first, by their sizes"
    return "OI*", "taps last, by their sizes"


def _attention(path: str, last: str, layout: str) -> Dense | None:
    if layout not in ("jax", "keras") or last not in ("kernel", "0"):
        return None
    parts = path.replace("/", ".").split(".")
    if any(p.startswith(("query", "key", "value")) for p in parts):
        return Dense(out_axes=(-2, -1))
    if any(p in ("out", "attention_output", "output_dense") for p in parts):
        return Dense(out_axes=(-1,))
    return None


def _any(path: str, words: tuple[str, ...]) -> bool:
    return any(word in path for word in words)
