"""Attention with gates, and without a softmax, as Qwen 3's later models have it."""

from __future__ import annotations

from specops.geometry.fused.known import Fused, Surroundings

_GATED = ("qwen3_next", "qwen3_5")
"""How the `model_type` of these models begins."""


def linear_attention(
    layer: str, rows: int, columns: int, out: int, around: Surroundings
) -> Fused | None:
    """Queries beside their gates, head by head; or the inputs of a gated delta rule."""
    if layer == "q_proj":
        heads, kind = around.count("num_attention_heads"), around.setting("model_type")
        if not (isinstance(kind, str) and kind.startswith(_GATED)):
            return None
        if not heads or rows % (2 * heads) or rows != 2 * around.inputs(["o_proj"], out):
            return None
        why = f"query and gate, {heads} heads one after the other"
        return Fused.of(out, (rows // (2 * heads),) * 2, why, heads)
    if layer not in ("in_proj_qkvz", "in_proj_ba"):
        return None
    keys, values = around.count("linear_num_key_heads"), around.count("linear_num_value_heads")
    width = (around.count("linear_key_head_dim"), around.count("linear_value_head_dim"))
    if keys and values % keys == 0:
        each = values // keys
        wide = (width[0], width[0], each * width[1], each * width[1])
        splits = wide if layer == "in_proj_qkvz" else (each, each)
        if min(splits) > 0 and keys * sum(splits) == rows:
            return Fused.of(out, splits, f"{len(splits)} maps, head by head", keys)
    return Fused.whole(out, f"{layer[8:]}: taken for one matrix, by no configuration in heads")
