"""Matrices: which axis is the output, and the blocks of those that hold several maps."""

from __future__ import annotations

from typing import Final

from specops.geometry import Dense
from specops.inspection.assumptions.context import Context, parts_of
from specops.inspection.assumptions.reading import Assumption, Reading

_TABLES: Final = ("embed", "wte", "wpe", "relative_attention_bias")
_NO_TABLES: Final = ("embed_out", "unembed")
_GATES: Final = {4: "an LSTM", 3: "a GRU"}
_ALL_HEADS: Final = ("gpt_neox", "bloom", "codegen", "persimmon")
"""Models of Hugging Face that store query, key and value head by head."""


def matrix(name: str, shape: tuple[int, ...], context: Context) -> Assumption:
    """What a tensor of two axes is taken for."""
    parts = parts_of(name)
    out, how = _output_axis(name, shape, context)
    fused = _gates(name, parts, shape, out, context) or _fused(name, parts, shape, out, context)
    if fused is not None:
        return Assumption.of(fused)
    low = name.lower()
    table = any(word in low for word in _TABLES) and not any(word in low for word in _NO_TABLES)
    what = "a table, one row for each entry" if table else "2-d: a matrix"
    return Assumption.of(Reading(Dense(out_axes=(out,)), what + how))


def _output_axis(name: str, shape: tuple[int, ...], context: Context) -> tuple[int, str]:
    """(0 or -1, what speaks for it beside the file's layout)."""
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
            return None  # a recurrent matrix is missing: nothing tells gates from a plain layer
    elif any(word in part.lower() for word in ("lstm", "gru", "cell") for part in parts):
        last = {"kernel": "recurrent_kernel", "0": "1"}.get(parts[-1], parts[-1])
        recurrent = context.shapes.get(context.beside(name, last), ())
        if parts[-1] in ("kernel", "recurrent_kernel", "0", "1") and len(recurrent) == 2:
            hidden = recurrent[0]
    if hidden and rows % hidden == 0 and rows // hidden in _GATES:
        count = rows // hidden
        return _split(count, rows, out, f"{count} gates of {hidden}, as {_GATES[count]} has them")
    return None


def _fused(
    name: str, parts: list[str], shape: tuple[int, ...], out: int, context: Context
) -> Reading | None:
    """Query, key and value in one matrix, or a gate beside what it gates."""
    rows, columns = shape[out], shape[1 + out] if out else shape[1]
    layer = parts[-1] if parts[-1].startswith("in_proj") else (parts[-2:-1] or [""])[0]
    if layer == "in_proj_weight" and rows == 3 * columns:
        return _split(3, rows, out, "query, key and value in one")
    if layer == "c_attn" and rows in (2 * columns, 3 * columns):
        what = "query, key and value" if rows == 3 * columns else "key and value"
        return _split(rows // columns, rows, out, f"{what} in one")
    if layer == "query_key_value":
        return _head_by_head(shape, out, context)
    if layer in ("qkv_proj", "qkv", "Wqkv", "W_pack"):
        sizes = _query_sizes(name, rows, columns, context)
        if sizes is not None:
            why = "query, key and value in one"
            return Reading(Dense(out_axes=(out,), splits=sizes), why)
    if layer == "gate_up_proj" and rows % 2 == 0:
        return _split(2, rows, out, "a gate and what it gates in one")
    return None


def _query_sizes(
    name: str, rows: int, columns: int, context: Context
) -> tuple[int, int, int] | None:
    """How many outputs are queries, keys and values: by the configuration, else its neighbours."""
    value = context.configuration.value
    heads, width = value("num_attention_heads"), value("head_dim")
    groups = value("num_key_value_heads") or heads
    if heads and not width and value("hidden_size"):
        width = value("hidden_size") // heads
    if heads and width and (heads + 2 * groups) * width == rows:
        return heads * width, groups * width, groups * width
    stem = name[: -len("." + ".".join(parts_of(name)[-2:]))]
    for back in ("o_proj", "out_proj", "proj", "dense"):
        shape = context.shapes.get(f"{stem}.{back}.weight", ())
        if len(shape) == 2 and 0 < shape[1] < rows and (rows - shape[1]) % 2 == 0:
            rest = (rows - shape[1]) // 2
            return (shape[1], rest, rest) if rest <= shape[1] else None
    return (columns,) * 3 if rows == 3 * columns else None


def _head_by_head(shape: tuple[int, ...], out: int, context: Context) -> Reading | None:
    """Query, key and value of one head after the other, as GPT-NeoX and BLOOM store them."""
    value = context.configuration.value
    heads = value("num_attention_heads") or value("n_head")
    rows, columns = shape[out], shape[1 + out] if out else shape[1]
    if value("model_type") not in _ALL_HEADS or not heads or rows % (3 * heads) or out:
        why = "query, key and value of all heads as one matrix: no config.json says how they lie"
        return Reading(Dense(out_axes=(out,)), why)
    seen = (heads, 3, rows // (3 * heads), columns)
    return Reading(
        Dense(out_axes=(0, 2), in_axes=(3,), batch_axes=(1,)),
        f"query, key and value, {heads} heads one after the other",
        seen,
    )


def _split(count: int, rows: int, out: int, why: str) -> Reading | None:
    if rows % count:
        return None
    sizes = (rows // count,) * count if count > 1 else None
    return Reading(Dense(out_axes=(out,), splits=sizes), why)
