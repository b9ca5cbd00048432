"""Matrices: which axis is the output, and the blocks of matrices that hold several maps."""

from __future__ import annotations

from typing import Final

from specops.geometry import Dense
from specops.geometry.fused import fused, gates_of
from specops.inspection.assumptions.context import LEAF, Context, parts_of
from specops.inspection.assumptions.reading import Assumption, Reading
from specops.inspection.low_rank import UPDATE

_TABLES: Final = (
    *("embed", "wte", "wpe", "relative_attention_bias"),
    *("pos_emb", "position_enc", "latent_query", "query_tokens", "latents"),
)
_NO_TABLES: Final = ("embed_out", "unembed")


def matrix(name: str, shape: tuple[int, ...], context: Context) -> Assumption:
    """The maps that a tensor of two axes may stand for."""
    parts = parts_of(name)
    out, how = _output_axis(name, shape, context)
    gates = _gates(name, parts, shape, out, context)
    if gates is not None:
        return Assumption.of(gates)
    several = _fused(name, parts, shape, out, context)
    if several:
        return Assumption.of(*several)
    unnamed = _unnamed_gates(name, out, context)
    if unnamed is not None:
        reading, sure = unnamed
        whole = Reading(Dense(out_axes=(out,)), f"2-d: a matrix{how}")
        return Assumption.of(reading) if sure else Assumption.of(reading, whole)
    if _all_experts(parts):
        how += "; of all experts together: nothing says how they lie in it"
    low = name.lower()
    table = any(word in low for word in _TABLES) and not any(word in low for word in _NO_TABLES)
    what = "a table, one row for each entry" if table else "2-d: a matrix"
    return Assumption.of(Reading(Dense(out_axes=(out,)), what + how))


def _all_experts(parts: list[str]) -> bool:
    """Whether a matrix holds all experts, unnumbered, as DBRX and MegaBlocks store them."""
    at = parts.index("experts") if "experts" in parts[:-1] else len(parts)
    return at < len(parts) and not any(part.isdecimal() for part in parts[at + 1 :])


def _output_axis(name: str, shape: tuple[int, ...], context: Context) -> tuple[int, str]:
    """(0 or -1, the reason for it besides the file's layout)."""
    out = -1 if context.taps_first else 0
    bias = context.bias(name)
    if not context.taps_first and bias == (shape[1],) != (shape[0],):
        return -1, ", inputs × outputs by its bias"
    if parts_of(name)[-2:-1] in (["c_attn"], ["c_proj"], ["c_fc"], ["q_attn"]):
        config = context.configuration.value("model_type")
        if config in ("gpt2", "openai-gpt", "imagegpt", "decision_transformer"):
            return -1, f", inputs × outputs as in {config}"
    return out, ""


def _gates(
    name: str, parts: list[str], shape: tuple[int, ...], out: int, context: Context
) -> Reading | None:
    """The blocks of a recurrent layer, one for each gate."""
    rows = shape[out]
    told = context.configuration.layer(name)
    if told is not None and told.gates:
        return _split(told.gates, rows, out, f"{told.kind}: a matrix for each gate")
    hidden = 0
    if parts[-1].startswith(("weight_ih", "weight_hh")):
        end = parts[-1][len("weight_ih") :]
        recurrent = context.shapes.get(context.beside(name, "weight_hh" + end), ())
        projected = context.beside(name, "weight_hr" + end) in context.shapes
        bias = context.shapes.get(context.beside(name, "bias_hh" + end), ())
        if len(recurrent) == 2 and not projected:
            hidden = recurrent[1]
        elif projected:
            hidden = context.shapes[context.beside(name, "weight_hr" + end)][1]
        elif bias and bias[0] % 4 == 0:
            return None  # without a recurrent matrix, gates look like a plain layer
    elif "lstm" in "".join(parts[-3:-2]) and parts[-2:] == ["linear", "w"]:  # haiku
        beside = rows // 4 if rows % 4 == 0 and context.bias(name) == (rows,) else 0
        hidden = beside if shape[1 + out] > beside else 0
    elif parts[-1] in ("w_i", "w_h") and context.taps_first:  # haiku
        recurrent = context.shapes.get(context.beside(name, "w_h"), ())
        hidden = recurrent[0] if len(recurrent) == 2 else 0
    elif any(word in part.lower() for word in ("lstm", "gru", "cell") for part in parts):
        last = {"kernel": "recurrent_kernel", "0": "1"}.get(parts[-1], parts[-1])
        recurrent = context.shapes.get(context.beside(name, last), ())
        if parts[-1] in ("kernel", "recurrent_kernel", "0", "1") and len(recurrent) == 2:
            hidden = recurrent[0]
    found = gates_of(hidden, rows, out)
    return None if found is None else Reading(found.geometry, found.why)


def _unnamed_gates(name: str, out: int, context: Context) -> tuple[Reading, bool] | None:
    """(the gates, whether that is certain) of a cell of equinox in a file without names.

    Both matrices of a cell come before its biases; a GRU has a bias of all gates and another of one
    gate. Layers without biases may look the same, unless a layer with as many inputs follows.
    """
    if not name.startswith(LEAF):
        return None
    number = int(name.removeprefix(LEAF))
    for first in (number, number - 1):
        one, other, bias, more = (context.shapes.get(f"{LEAF}{first + i}", ()) for i in range(4))
        if len(one) != 2 or len(other) != 2 or one[0] != other[0] or other[0] % other[1]:
            continue
        rows, hidden = other
        count = rows // hidden
        found = gates_of(hidden, rows, out)
        if found is None or (len(bias) > 1 and rows in bias):
            continue
        sure = bias == (rows,) and (count == 4 or more == (hidden,))
        if not sure and len(bias) == 1:
            continue
        return Reading(found.geometry, found.why), sure
    return None


def _fused(
    name: str, parts: list[str], shape: tuple[int, ...], out: int, context: Context
) -> list[Reading]:
    """The maps of a matrix that holds several; also all as one map, if nothing decides."""
    if name.endswith(UPDATE):
        layer, out = parts[-1].removesuffix(UPDATE), 0  # named after the layer, outputs first
    else:
        layer = parts[-1] if parts[-1] == "in_proj_weight" else (parts[-2:-1] or [""])[0]
    found = fused(layer, shape, out, context.around(name))
    if found is None:
        return []
    whole = Reading(found.geometry, found.why)
    if found.likely is None:
        return [whole]
    return [Reading(found.likely, f"{layer}: several in one, by its name alone"), whole]


def _split(count: int, rows: int, out: int, why: str) -> Reading | None:
    if rows % count:
        return None
    sizes = (rows // count,) * count if count > 1 else None
    return Reading(Dense(out_axes=(out,), splits=sizes), why)
