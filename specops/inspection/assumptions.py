"""Which map a tensor of a checkpoint is taken for, when only its name and shape are known."""

from __future__ import annotations

from dataclasses import dataclass

from specops.geometry import Dense, Geometry
from specops.inspection.convolutions import WIDEST_TAP, guess_convolution
from specops.inspection.hints import Context

_INDICES = ("int64", "bool")
_OPTIMIZERS = {"optimizer", "opt_state", "optimizer_state", "optimizer_states"}
_TABLES = ("embed", "wte", "wpe")
_WEIGHTS = {"weight", "kernel", "qweight", "qzeros", "weight_packed", "0"}
_SCALES = ("_scale", "_scale_inv", ".scales", ".scale", ".weight_scale", ".absmax")
_ATTENTION = ("query", "key", "value")


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


def assume(name: str, shape: tuple[int, ...], dtype: str, context: Context) -> Assumption:
    """The map a tensor is taken for."""
    skipped = _no_matrix(name, shape, dtype, context)
    if skipped is not None:
        return skipped
    parts = name.replace("/", ".").split(".")
    note = ""
    if _is_reparametrised(name, context):
        note = "; a part of a reparametrised weight, as stored"
    if len(shape) == 2:
        table = any(word in name.lower() for word in _TABLES)
        what = "a table, one row for each entry" if table else "2-d: a matrix"
        out = -1 if context.layout in ("jax", "keras") else 0
        return Assumption(Dense(out_axes=(out,)), what + note)
    if len(shape) == 3:
        heads = _heads(parts, context.layout)
        if heads is not None:
            return Assumption(heads, "an attention projection by heads")
        tapped = shape[0] if context.layout in ("jax", "keras") else shape[-1]
        experts = "expert" in name.lower()
        if experts or tapped > WIDEST_TAP:
            why = "named experts" if experts else f"{tapped} is too wide for a kernel"
            return Assumption(
                Dense(out_axes=(1,), batch_axes=(0,)), f"3-d, a stack of matrices: {why}{note}"
            )
    found = guess_convolution(name, shape, context)
    if found.geometry is None:
        return Assumption(skipped=found.obstacle, harmless=found.harmless)
    return Assumption(found.geometry, found.why + note, shape=found.shape)


def _no_matrix(
    name: str, shape: tuple[int, ...], dtype: str, context: Context
) -> Assumption | None:
    parts = name.replace("/", ".").split(".")
    if 0 in shape:
        return Assumption(skipped="empty")
    if set(parts) & _OPTIMIZERS:
        return Assumption(skipped="of the optimizer's state")
    if len(shape) < 2:
        return Assumption(skipped="a scalar" if not shape else "1-d: a bias or scale, no matrix")
    if dtype in _INDICES:
        return Assumption(skipped=f"{dtype}: indices or flags, no weights")
    if dtype.startswith("float8_e8m0") or (
        name.endswith(_SCALES) and any(_bare(name) in (n, _bare(n)) for n in context.names - {name})
    ):
        return Assumption(skipped="scales of a quantised weight")
    scaled = any(name + end in context.names for end in ("_scale", "_scale_inv"))
    packed = "int" in dtype or dtype in ("bits8", "opaque")
    if scaled or (packed and parts[-1] in _WEIGHTS):
        reason = f"{dtype}: quantised or packed, its map is not that of the numbers stored"
        return Assumption(skipped=f"{reason}; dequantise the model first", harmless=False)
    if packed:
        return Assumption(skipped=f"{dtype}: no weights")
    if len(shape) > 5:
        return Assumption(skipped=f"{len(shape)}-d: no layer that is known", harmless=False)
    keras_bias = context.layout == "keras" and parts[-1] == "1" and _is_attention(parts)
    if parts[-1] in ("bias", "b") or keras_bias or name.endswith("masked_bias"):
        return Assumption(skipped="a bias or mask, no matrix")
    factors = parts[-1] in ("weight_g", "original0") and max(shape[1:]) == 1
    if factors and _is_reparametrised(name, context):
        return Assumption(skipped="the lengths of a weight-normalised layer")
    return None


def _bare(name: str) -> str:
    """A weight's name without what marks its scales."""
    for end in _SCALES:
        if name.endswith(end):
            name = name.removesuffix(end)
    return name.removesuffix(".weight").removesuffix(".qweight")


def _is_reparametrised(name: str, context: Context) -> bool:
    """Whether the layer's own weight is not stored, but what it is computed from."""
    stem, _, last = name.rpartition(".")
    if last in ("original", "original0", "original1") and "parametrizations" in stem:
        return True
    siblings = {"weight_g": "weight_v", "weight_v": "weight_g", "weight_orig": "weight_u"}
    return last in siblings and f"{stem}.{siblings[last]}" in context.names


def _is_attention(parts: list[str]) -> bool:
    return any(p.startswith(_ATTENTION) for p in parts)


def _heads(parts: list[str], layout: str) -> Dense | None:
    if layout not in ("jax", "keras") or parts[-1] not in ("kernel", "0"):
        return None
    if _is_attention(parts):
        return Dense(out_axes=(-2, -1))
    if any(p in ("out", "attention_output", "output_dense") for p in parts):
        return Dense(out_axes=(-1,))
    return None
