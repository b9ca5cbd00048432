"""State-space and short-convolution layers: the maps in their one projection of the input."""

from __future__ import annotations

from specops.geometry.fused.known import Fused, Surroundings


def state_space(
    layer: str, rows: int, columns: int, out: int, around: Surroundings
) -> Fused | None:
    """The maps of `in_proj` and `x_proj` as Mamba, Mamba 2 and LFM2 have them, and DeBERTa."""
    if layer == "x_proj":
        states, steps = around.beside("A_log"), around.inputs(["dt_proj"], out)
        if len(states) == 2 and steps and rows == steps + 2 * states[1]:
            return Fused.of(out, (steps, states[1], states[1]), "steps, B and C of a state space")
        return None
    if layer != "in_proj":
        return None
    inner = around.inputs(["out_proj"], out)
    found = _input(rows, inner, out, around) or _by_heads(rows, out, around)
    if found is not None:
        return found
    filtered = any(len(around.beside(n)) > 2 for n in ("conv1d", "conv", "spatial_conv"))
    if (2 * inner == rows and not filtered) or rows == inner:
        return None  # a gate, or one map and no more
    if rows in (2 * columns, 3 * columns) or filtered:
        return Fused.whole(
            out, "taken for one matrix: it may hold several maps, and nothing around it says which"
        )
    return None


def _input(rows: int, inner: int, out: int, around: Surroundings) -> Fused | None:
    """The maps of `in_proj`, by the channel-wise convolution that follows and the layer behind."""
    short, *plain = (around.beside(name)[:1] for name in ("conv1d", "conv", "spatial_conv"))
    if inner and (inner,) in plain and rows == 3 * inner:
        return Fused.of(out, (inner,) * 3, "two gates and an input in one")
    if not inner or not short:
        return None
    if short == (inner,) and rows == 2 * inner and around.inputs(["x_proj"], out) == inner:
        return Fused.of(out, (inner,) * 2, "an input of a state space, and its gate")
    states, odd = divmod(short[0] - inner, 2)
    heads = rows - inner - short[0]
    if states > 0 and not odd and heads > 0 and around.beside("A_log") == (heads,):
        splits = (inner, inner, states, states, heads)
        return Fused.of(out, splits, "a gate, input, B, C and steps of a state space")
    return None


def _by_heads(rows: int, out: int, around: Surroundings) -> Fused | None:
    """DeBERTa's queries, keys and values, recognised by the biases of two of them beside it."""
    bias = rows // 3
    if rows % 3 or not around.beside("q_bias") == around.beside("v_bias") == (bias,):
        return None
    heads = around.count("num_attention_heads")
    if heads and bias % heads == 0:
        why = f"query, key and value, {heads} heads one after the other"
        return Fused.of(out, (bias // heads,) * 3, why, heads)
    return Fused.whole(
        out, "query, key and value of all heads are taken for one matrix: nothing says how they lie"
    )
