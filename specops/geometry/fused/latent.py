"""Latent attention, as DeepSeek's models have it."""

from __future__ import annotations

from specops.geometry.fused.known import Fused, Surroundings


def latent(layer: str, rows: int, columns: int, out: int, around: Surroundings) -> Fused | None:
    """The latent of keys and values beside a positional key; or keys beside values, by heads."""
    if layer == "kv_a_proj_with_mqa":
        kept = around.inputs(["kv_b_proj"], out) or around.count("kv_lora_rank")
        if 0 < kept < rows:
            why = "the latent of keys and values, and a key of positions"
            return Fused.of(out, (kept, rows - kept), why)
        return Fused.whole(out, "the latent and a key of positions are taken for one matrix")
    if layer == "kv_b_proj":
        heads, values = around.count("num_attention_heads"), around.count("v_head_dim")
        behind = around.inputs(["o_proj"], out)
        if heads and behind and not values:
            values = behind // heads
        if heads and rows % heads == 0 and 0 < values < rows // heads:
            splits = (rows // heads - values, values)
            return Fused.of(out, splits, f"key and value, {heads} heads one after the other", heads)
        return Fused.whole(out, "key and value of all heads are taken for one matrix")
    return None
