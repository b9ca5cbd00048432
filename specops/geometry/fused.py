"""Layers that hold several maps in one array: which blocks these are, by what layers are called.

What all who meet such a layer go by, in a file or in a model: the blocks are the same.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

from specops.geometry.dense import Dense

Shape = tuple[int, ...]
_QUERIES: Final = ("qkv_proj", "qkv", "Wqkv", "W_pack", "c_attn", "query_key_value")
_BACK: Final = ("o_proj", "out_proj", "proj", "dense", "c_proj", "Wo")
"""The projection behind an attention, by its names: as many inputs as there are queries."""
_GATED: Final = {"gate_up_proj": "down_proj", "w12": "w3", "weights_in": "weights_out", "Wi": "Wo"}
"""A gate beside what it gates, and the layer behind the two."""
_BY_HEADS: Final = {
    "query_key_value": ("gpt_neox", "gpt_neox_japanese", "bloom", "persimmon"),
    "qkv_proj": ("minimax",),
}
"""Models of Hugging Face, by what they call the layer, that store it head by head."""
_OTHERWISE: Final = ("codegen", "minimax", "gpt_bigcode")
"""Models that do not store the three one after the other."""
_CODEGEN_PARTS: Final = 4
"""In which CodeGen stores its heads, as many as the accelerators had that it was trained on."""
_THREE: Final = "query, key and value"


@dataclass(frozen=True)
class Surroundings:
    """What is known around a layer.

    Attributes
    ----------
    setting : callable
        A value of the model's configuration, as models of Hugging Face call it, by its name; None
        where it has none.
    beside : callable
        The shape of the weight of another layer of the same block, by its name, stored as this
        one is; () where there is none.
    """

    setting: Callable[[str], Any] = lambda key: None
    beside: Callable[[str], Shape] = lambda name: ()

    def count(self, *keys: str) -> int:
        """The first of these settings that is a positive number, 0 if none is."""
        found = (self.setting(key) for key in keys)
        return next((n for n in found if type(n) is int and n > 0), 0)


@dataclass(frozen=True)
class Fused:
    """An array that holds several maps.

    Attributes
    ----------
    geometry : Dense
        The maps; the whole matrix where nothing says how they lie in it.
    why : str
        What the maps are, and what speaks for it.
    doubt : str
        Why they are not told apart; empty if they are.
    """

    geometry: Dense
    why: str
    doubt: str = ""


def fused(layer: str, shape: Shape, out: int, around: Surroundings) -> Fused | None:
    """The maps that a matrix holds, by the name of its layer; None if it is no such layer.

    Parameters
    ----------
    layer : str
        The last part of the layer's name; of torch's MultiheadAttention that of its parameter.
    shape : tuple of int
        Of the matrix.
    out : 0 or -1
        Its axis of outputs.
    around : Surroundings
        What is known beside it.
    """
    if len(shape) != 2:
        return None
    rows, columns = (shape[out], shape[1 + out])
    if layer == "in_proj_weight" and rows == 3 * columns:
        return Fused(Dense(out_axes=(out,), splits=(columns,) * 3), f"{_THREE} in one")
    if layer in _GATED:
        return _gated(layer, rows, out, around)
    if layer not in _QUERIES:
        return None
    known = _by_model(layer, rows, around) or _by_sizes(layer, rows, columns, out, around)
    if known is None:
        doubt = f"{_THREE} of all heads are taken for one matrix: nothing says how they lie in it"
        return Fused(Dense(out_axes=(out,)), doubt, doubt)
    splits, repeats, why = known
    if len(splits) == 1:
        return Fused(Dense(out_axes=(out,)), why)
    return Fused(Dense(out_axes=(out,), splits=splits, repeats=repeats), why)


def fused_experts(
    parameter: str,
    shape: Shape,
    around: Surroundings,
    *,
    turned: bool | None = None,
    alternating: bool | None = None,
) -> Fused | None:
    """The maps of stacked experts; None where it is not known which axis is that of outputs.

    Parameters
    ----------
    parameter : str
        Its name: "gate_up_proj" holds two maps of every expert.
    shape : tuple of int
        (experts, outputs, inputs), or the other way round.
    around : Surroundings
        `beside` has other stacks of the same experts.
    turned : bool, optional
        Whether outputs come last; None: by the stack behind or before it, else by the width of
        the model.
    alternating : bool, optional
        Whether rows of the gate and of what it gates alternate; None: as in GPT-OSS alone.
    """
    turned = _is_turned(parameter, shape, around) if turned is None else turned
    if turned is None:
        return None
    out = 2 if turned else 1
    if parameter != "gate_up_proj":
        return Fused(Dense(out_axes=(out,), batch_axes=(0,)), "a matrix for each expert")
    if shape[out] % 2:
        doubt = f"a gate and what it gates, of {shape[out]} outputs together, are no halves"
        return Fused(Dense(out_axes=(out,), batch_axes=(0,)), doubt, doubt)
    if alternating is None:
        alternating = around.setting("model_type") == "gpt_oss"
    half = shape[out] // 2
    splits, repeats = ((1, 1), half) if alternating else ((half, half), 1)
    how = "row by row" if alternating else "in halves"
    return Fused(
        Dense(out_axes=(out,), batch_axes=(0,), splits=splits, repeats=repeats),
        f"of each expert a gate and what it gates, {how}",
    )


def _is_turned(parameter: str, shape: Shape, around: Surroundings) -> bool | None:
    """Whether stacks are (experts, inputs, outputs); None: nothing says."""
    down = parameter == "down_proj"
    other = around.beside("gate_up_proj" if down else "down_proj")
    if len(other) == 3 and (down or parameter == "gate_up_proj"):
        up, back = (other, shape) if down else (shape, other)
        if (up[1], up[2]) == (2 * back[2], back[1]):
            return False
        if (up[1], up[2]) == (back[2], 2 * back[1]):
            return True
    width = around.count("hidden_size", "hidden_dim")
    at = [axis for axis in (1, 2) if shape[axis] == width]
    return at == ([2] if down else [1]) if len(at) == 1 else None


def _gated(layer: str, rows: int, out: int, around: Surroundings) -> Fused | None:
    behind = around.beside(_GATED[layer])
    follows = len(behind) == 2 and 2 * behind[1 + out] == rows
    why = "a gate and what it gates in one"
    if follows or (layer == "gate_up_proj" and not behind and rows % 2 == 0):
        return Fused(Dense(out_axes=(out,), splits=(rows // 2,) * 2), why)
    if layer != "gate_up_proj":
        return None
    doubt = f"a gate and what it gates are taken for one matrix: {_GATED[layer]} has other inputs"
    return Fused(Dense(out_axes=(out,)), doubt, doubt)


_Known = tuple[tuple[int, ...], int, str]
"""Splits, repeats and what speaks for them."""


def _by_model(layer: str, rows: int, around: Surroundings) -> _Known | None:
    """As some models are known to store their attention."""
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
    """As most store it, one after the other: how large each is by the configuration, or around."""
    if layer == "query_key_value" or around.setting("model_type") in _OTHERWISE:
        return None
    heads, width = around.count("num_attention_heads", "n_head"), around.count("head_dim")
    groups = around.count("num_key_value_heads") or heads
    if heads and not width:
        width = around.count("hidden_size", "n_embd") // heads
    behind = (around.beside(name) for name in _BACK)
    queries = next((shape[1 + out] for shape in behind if len(shape) == 2), 0)
    if heads and (heads + 2 * groups) * width == rows and queries in (0, heads * width):
        return (heads * width, groups * width, groups * width), 1, f"{_THREE} in one"
    if layer == "c_attn" and rows in (columns, 2 * columns):
        count = rows // columns
        return (columns,) * count, 1, "key and value in one" if count == 2 else "a query alone"
    rest, odd = divmod(rows - queries, 2) if queries else divmod(rows, 3)
    # Fewer keys than queries: of heads that share them. Where there are more or fewer queries than
    # inputs too, it may as well be the values that the layer behind has for inputs.
    thirds = rest == (queries or columns)
    if odd or not (thirds or (0 < rest < queries == columns)):
        return None
    return (queries or rest, rest, rest), 1, f"{_THREE} in one"
