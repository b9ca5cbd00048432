"""Attention layers with query, key and value, or key and value alone, in one matrix."""

from __future__ import annotations

from typing import Final

from specops.geometry.fused.known import Fused, Surroundings

QUERIES: Final = (
    *("qkv_proj", "qkv", "Wqkv", "W_pack", "c_attn", "query_key_value"),
    *("to_qkv", "qkv_linear", "att_proj", "wqkv", "in_proj_qkv"),
)
_KEYS: Final = {"kv": ("q",), "to_kv": ("to_q",), "kv_proj": ("q_proj",), "c_attn": ("q_attn",)}
"""Names of layers with keys and values in one, and of the layer with the queries beside them."""
_BACK: Final = (
    *("o_proj", "out_proj", "proj", "dense", "c_proj", "Wo", "wo", "to_out", "to_out.0"),
    *("proj_out", "out", "projection", "../output.dense"),
)
"""Names of the projection after an attention, which has as many inputs as there are queries."""
_BY_HEADS: Final = {
    "query_key_value": ("gpt_neox", "gpt_neox_japanese", "bloom", "persimmon"),
    "qkv_proj": ("minimax",),
}
"""Hugging Face models that store the layer head by head, by the layer's name."""
_OTHERWISE: Final = ("codegen", "minimax", "gpt_bigcode", "internlm2")
"""Models that do not store query, key and value one after the other."""
_CODEGEN_PARTS: Final = 4
"""CodeGen stores its heads in so many parts, one for each accelerator that it was trained on."""
_THREE: Final = "query, key and value"


def attention(layer: str, rows: int, columns: int, out: int, around: Surroundings) -> Fused | None:
    """The maps of such a layer; None for other layers."""
    if layer == "in_proj_weight" and rows == 3 * columns:
        return Fused.of(out, (columns,) * 3, f"{_THREE} in one")
    known = _by_model(layer, rows, around)
    if known is None and layer in _KEYS and (layer != "c_attn" or rows == 2 * columns):
        return _keys(layer, rows, out, around)
    if layer not in QUERIES:
        return None
    known = known or _by_sizes(layer, rows, columns, out, around)
    if known is not None:
        splits, repeats, why = known
        return Fused.of(out, splits, why, repeats)
    doubt = f"{_THREE} of all heads are taken for one matrix: nothing says how they lie in it"
    behind = around.inputs(_BACK, out)
    by_name = layer not in ("query_key_value", "wqkv") and rows == 3 * columns and not behind
    if by_name and around.setting("model_type") not in _OTHERWISE:
        return Fused.whole(out, doubt, (columns,) * 3)
    return Fused.whole(out, doubt)


def _keys(layer: str, rows: int, out: int, around: Surroundings) -> Fused:
    """Key and value, one after the other, if each has as many outputs as there are queries."""
    if rows % 2:
        return Fused.whole(out, f"key and value are taken for one matrix, of {rows} outputs")
    halves = (rows // 2,) * 2
    if rows == 2 * around.outputs(_KEYS[layer], out) or rows == 2 * around.inputs(_BACK, out):
        return Fused.of(out, halves, "key and value in one")
    doubt = "key and value are taken for one matrix: nothing says how they lie in it"
    return Fused.whole(out, doubt, halves)


_Known = tuple[tuple[int, ...], int, str]
"""(splits, repeats, the reason for them)."""


def _by_model(layer: str, rows: int, around: Surroundings) -> _Known | None:
    """The blocks of models that are known to store their attention in a way of their own."""
    model, heads = around.setting("model_type"), around.count("num_attention_heads", "n_head")
    width = around.count("hidden_size", "n_embd", "n_embed") // (heads or 1)
    by_heads = model in _BY_HEADS.get(layer, ())
    if (model, layer) == ("codegen", "qkv_proj") and rows % (3 * _CODEGEN_PARTS) == 0:
        part = rows // (3 * _CODEGEN_PARTS)
        return (part,) * 3, _CODEGEN_PARTS, f"{_THREE} in {_CODEGEN_PARTS} parts, as in {model}"
    if model == "falcon" and around.setting("new_decoder_architecture"):
        groups = around.count("num_kv_heads")
        if not groups or heads % groups or (heads + 2 * groups) * width != rows:
            return None
        splits = (heads // groups * width, width, width)
        return splits, groups, f"{_THREE}, {groups} groups of heads one after the other"
    if (model, layer) in (("falcon", "query_key_value"), ("gpt_bigcode", "c_attn")):
        shared = around.setting("multi_query")
        if shared is True and heads and (heads + 2) * width == rows:
            return (heads * width, width, width), 1, f"{_THREE}, one key for all heads"
        by_heads = shared is False
    if by_heads and heads and rows % (3 * heads) == 0:
        return (rows // (3 * heads),) * 3, heads, f"{_THREE}, {heads} heads one after the other"
    return None


def _by_sizes(layer: str, rows: int, columns: int, out: int, around: Surroundings) -> _Known | None:
    """The blocks one after the other, as most models store them.

    The configuration or the neighbouring layers tell how large each is.
    """
    if layer in ("query_key_value", "wqkv") or around.setting("model_type") in _OTHERWISE:
        return None
    queries = around.inputs(_BACK, out)
    if layer == "in_proj_qkv":
        rest, odd = divmod(rows - queries, 2)
        return ((rest, rest, queries), 1, f"{_THREE} in one") if queries and not odd else None
    heads, width = around.count("num_attention_heads", "n_head"), around.count("head_dim")
    groups = around.count("num_key_value_heads") or heads
    if heads and not width:
        width = around.count("hidden_size", "n_embd") // heads
    if heads and (heads + 2 * groups) * width == rows and queries in (0, heads * width):
        return (heads * width, groups * width, groups * width), 1, f"{_THREE} in one"
    if layer == "c_attn" and rows == columns:
        return (columns,), 1, "a query alone"
    rest, odd = divmod(rows - queries, 2)
    if not queries or odd or rest <= 0:
        return None
    # Fewer keys than queries: heads share keys. If the number of queries also differs from that of
    # the inputs, the inputs of the layer behind may be the values, and the blocks are not known.
    if rest == queries or rest < queries == columns:
        return (queries, rest, rest), 1, f"{_THREE} in one"
    return None
