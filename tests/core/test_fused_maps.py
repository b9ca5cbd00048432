"""Which maps a fused layer holds, by its name, its neighbours and its model's configuration."""

from __future__ import annotations

from typing import Any

import pytest

from specops import Dense
from specops.geometry.fused import Surroundings, fused, fused_experts, fused_stack


def around(settings: dict[str, Any], beside: dict[str, tuple[int, ...]]) -> Surroundings:
    return Surroundings(settings.get, lambda name: beside.get(name, ()))


FOUR = {"num_attention_heads": 4, "hidden_size": 8}
DELTA = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 4,
    "linear_value_head_dim": 4,
}
ONE_KEY = {"new_decoder_architecture": False, "multi_query": True}


@pytest.mark.parametrize(
    ("layer", "shape", "settings", "beside", "splits", "repeats"),
    [
        ("query_key_value", (24, 8), {"model_type": "persimmon", **FOUR}, {}, (2, 2, 2), 4),
        ("query_key_value", (12, 8), {"model_type": "falcon", **FOUR, **ONE_KEY}, {}, (8, 2, 2), 1),
        (
            "query_key_value",
            (16, 8),
            {"model_type": "falcon", **FOUR, "new_decoder_architecture": True, "num_kv_heads": 2},
            {},
            (4, 2, 2),
            2,
        ),
        ("c_attn", (12, 8), {"model_type": "gpt_bigcode", "multi_query": True, **FOUR}, {},
         (8, 2, 2), 1),
        ("c_attn", (24, 8), {"model_type": "gpt_bigcode", "multi_query": False, **FOUR}, {},
         (2, 2, 2), 4),
        ("qkv_proj", (24, 8), {"model_type": "codegen", **FOUR}, {}, (2, 2, 2), 4),
        ("qkv_proj", (24, 8), {"model_type": "minimax", **FOUR}, {}, (2, 2, 2), 4),
        ("qkv_proj", (16, 8), {"num_key_value_heads": 2, **FOUR}, {}, (8, 4, 4), 1),
        ("qkv", (48, 8), {}, {"proj": (16, 16)}, (16, 16, 16), 1),
        ("Wqkv", (24, 8), {}, {"Wo": (8, 8)}, (8, 8, 8), 1),
        ("to_qkv", (48, 8), {}, {"to_out.0": (8, 16)}, (16, 16, 16), 1),
        ("in_proj_qkv", (20, 8), FOUR, {"out_proj": (8, 12)}, (4, 4, 12), 1),
        ("kv", (16, 8), {}, {"q": (8, 8)}, (8, 8), 1),
        ("to_kv", (32, 8), {}, {"to_out": (8, 16)}, (16, 16), 1),
        ("kv_a_proj_with_mqa", (10, 8), {}, {"kv_b_proj": (40, 6)}, (6, 4), 1),
        ("kv_b_proj", (40, 6), {"num_attention_heads": 4, "v_head_dim": 4}, {}, (6, 4), 4),
        ("kv_b_proj", (40, 6), FOUR, {"o_proj": (8, 12)}, (7, 3), 4),
        ("in_proj", (32, 8), {}, {"out_proj": (8, 16), "conv1d": (16, 1, 4), "x_proj": (9, 16)},
         (16, 16), 1),
        ("x_proj", (9, 16), {}, {"dt_proj": (16, 1), "A_log": (16, 4)}, (1, 4, 4), 1),
        ("in_proj", (42, 8), {}, {"out_proj": (8, 16), "conv1d": (24, 1, 4), "A_log": (2,)},
         (16, 16, 4, 4, 2), 1),
        ("in_proj", (24, 8), {}, {"out_proj": (8, 8), "conv": (8, 1, 3)}, (8, 8, 8), 1),
        ("in_proj", (24, 8), FOUR, {"q_bias": (8,), "v_bias": (8,)}, (2, 2, 2), 4),
        ("q_proj", (32, 8), {"model_type": "qwen3_next", **FOUR}, {"o_proj": (8, 16)}, (4, 4), 4),
        ("in_proj_qkvz", (48, 8), DELTA, {}, (4, 4, 8, 8), 2),
        ("in_proj_ba", (8, 8), DELTA, {}, (2, 2), 2),
        ("c_attn", (24, 8), {}, {"c_proj": (8, 8)}, (8, 8, 8), 1),
        ("c_attn", (16, 8), {}, {"q_attn": (8, 8)}, (8, 8), 1),
        ("c_attn", (12, 8), {}, {"c_proj": (8, 8)}, (8, 2, 2), 1),
        ("gate_up_proj", (12, 8), {}, {"down_proj": (8, 6)}, (6, 6), 1),
        ("fc1", (12, 8), {}, {"fc2": (8, 6)}, (6, 6), 1),
        ("in_proj", (12, 8), {}, {"out_proj": (8, 6)}, (6, 6), 1),
        ("linear1", (56, 8), {}, {"linear2": (8, 40)}, (8, 8, 8, 32), 1),
        ("proj", (12, 8), {}, {"../2": (8, 6)}, (6, 6), 1),
        ("w12", (12, 8), {}, {"w3": (8, 6)}, (6, 6), 1),
    ],
)  # fmt: skip
def test_blocks(
    layer: str, shape: Any, settings: Any, beside: Any, splits: Any, repeats: int
) -> None:
    for out in (0, -1):
        turn = slice(None, None, 1 if out == 0 else -1)
        neighbours = {n: s[turn] if len(s) == 2 and n != "A_log" else s for n, s in beside.items()}
        found = fused(layer, shape[turn], out, around(settings, neighbours))
        assert found is not None
        assert found.geometry == Dense(out_axes=(out,), splits=splits, repeats=repeats)
        assert not found.doubt
        found.geometry.check(shape[turn])


@pytest.mark.parametrize(
    ("layer", "shape", "settings", "beside"),
    [
        ("query_key_value", (24, 8), FOUR, {"dense": (8, 8)}),
        ("query_key_value", (24, 8), {"model_type": "gpt_neox"}, {}),
        ("query_key_value", (24, 8), {"model_type": "falcon", **FOUR}, {}),
        (
            "query_key_value",
            (16, 8),
            {"model_type": "falcon", "new_decoder_architecture": True},
            {},
        ),
        ("c_attn", (24, 8), {"model_type": "gpt_bigcode", **FOUR}, {}),
        ("qkv_proj", (24, 8), {"model_type": "minimax"}, {"o_proj": (8, 8)}),
        ("qkv", (20, 8), {}, {}),
        ("wqkv", (24, 8), {}, {"wo": (8, 8)}),
        ("kv", (15, 8), {}, {"q": (8, 8)}),
        ("kv_a_proj_with_mqa", (10, 8), {}, {}),
        ("kv_b_proj", (40, 6), {}, {"o_proj": (8, 12)}),
        ("in_proj", (24, 8), {}, {"q_bias": (8,), "v_bias": (8,)}),
        ("in_proj", (24, 8), {}, {}),
        # Of Zamba, which stores the two row by row.
        ("in_proj", (32, 8), {}, {"out_proj": (8, 16), "conv1d": (16, 1, 4)}),
        ("in_proj_ba", (8, 8), {}, {}),
        # The configuration of another part, and values of another width than keys.
        ("qkv", (16, 8), {"num_key_value_heads": 2, **FOUR}, {"proj": (8, 6)}),
        ("qkv", (24, 8), {}, {"proj": (8, 16)}),
        ("qkv", (21, 8), {}, {"proj": (8, 8)}),
        ("qkv", (28, 8), {}, {"proj": (8, 8)}),
        ("gate_up_proj", (12, 8), {}, {"down_proj": (8, 12)}),
        ("gate_up_proj", (13, 8), {}, {}),
    ],
)
def test_what_nothing_tells_apart_is_one_matrix_and_said(
    layer: str, shape: Any, settings: Any, beside: Any
) -> None:
    found = fused(layer, shape, 0, around(settings, beside))
    assert found is not None
    assert found.geometry == Dense()
    assert "one matrix" in found.doubt


@pytest.mark.parametrize(
    ("layer", "shape", "likely"),
    [
        ("qkv", (24, 8), (8, 8, 8)),
        ("c_attn", (24, 8), (8, 8, 8)),
        ("c_attn", (16, 8), (8, 8)),
        ("kv", (16, 8), (8, 8)),
        ("gate_up_proj", (12, 8), (6, 6)),
    ],
)
def test_a_name_alone_is_not_believed(layer: str, shape: Any, likely: Any) -> None:
    found = fused(layer, shape, 0, Surroundings())
    assert found is not None
    assert found.geometry == Dense()
    assert found.likely == Dense(splits=likely)
    assert "one matrix" in found.doubt


@pytest.mark.parametrize(
    ("layer", "shape", "beside"),
    [
        ("in_proj", (16, 7), {}),
        ("in_proj", (16, 8), {"out_proj": (8, 16)}),
        ("q_proj", (16, 8), {"o_proj": (8, 8)}),
        ("q_proj", (32, 8), {"o_proj": (8, 16)}),
        ("x_proj", (9, 16), {}),
        ("fc1", (12, 8), {"fc2": (8, 12)}),
        ("linear1", (32, 8), {"linear2": (8, 32)}),
        ("linear1", (32, 8), {}),
    ],
)
def test_projections_of_other_sizes_hold_one_map(layer: str, shape: Any, beside: Any) -> None:
    assert fused(layer, shape, 0, around(FOUR, beside)) is None


@pytest.mark.parametrize(("layer", "beside"), [("Wi", {}), ("w12", {"w3": (8, 12)}), ("q", {})])
def test_other_layers_are_not_meant(layer: str, beside: Any) -> None:
    assert fused(layer, (12, 8), 0, around({}, beside)) is None
    assert fused("qkv", (12, 8, 1), 0, Surroundings()) is None


def test_a_query_alone_is_one_map() -> None:
    found = fused("c_attn", (8, 8), -1, around({}, {"c_proj": (8, 8)}))
    assert (found.geometry, found.doubt) == (Dense(out_axes=(-1,)), "")  # type: ignore[union-attr]


UP, DOWN = "gate_up_proj", "down_proj"


@pytest.mark.parametrize(
    ("parameter", "shape", "settings", "beside", "out", "splits", "repeats"),
    [
        (UP, (2, 8, 8), {}, {DOWN: (2, 8, 4)}, 1, (4, 4), 1),
        (UP, (2, 8, 8), {}, {DOWN: (2, 4, 8)}, 2, (4, 4), 1),
        (DOWN, (2, 8, 8), {}, {UP: (2, 8, 16)}, 2, None, 1),
        # Without a gate either way round would fit.
        ("up_proj", (2, 6, 8), {}, {DOWN: (2, 8, 6)}, None, None, 1),
        ("up_proj", (2, 6, 8), {"hidden_size": 8}, {DOWN: (2, 8, 6)}, 1, None, 1),
        (UP, (2, 12, 8), {"hidden_size": 8}, {}, 1, (6, 6), 1),
        (UP, (2, 8, 12), {"hidden_size": 8, "model_type": "gpt_oss"}, {}, 2, (1, 1), 6),
        (DOWN, (2, 12, 8), {"hidden_size": 8}, {}, 2, None, 1),
        (UP, (2, 12, 8), {}, {}, None, None, 1),
    ],
)
def test_stacked_experts(
    parameter: str, shape: Any, settings: Any, beside: Any, out: Any, splits: Any, repeats: int
) -> None:
    found = fused_experts(parameter, shape, around(settings, beside))
    if out is None:
        assert found is None
        return
    assert found is not None
    wanted = Dense(out_axes=(out,), batch_axes=(0,), splits=splits, repeats=repeats)
    assert found.geometry == wanted
    wanted.check(shape)


def test_halves_that_are_none_are_said() -> None:
    found = fused_experts(UP, (2, 7, 8), around({"hidden_size": 8}, {}))
    assert found is not None
    assert found.geometry == Dense(out_axes=(1,), batch_axes=(0,))
    assert "no halves" in found.doubt


@pytest.mark.parametrize(("shape", "out"), [((5, 24, 8), 1), ((5, 8, 24), -1)])
def test_stacked_layers(shape: Any, out: int) -> None:
    near = {"proj": (5, 8, 8), "o_proj": (4, 8, 8)}
    found = fused_stack("qkv", shape, out, around({}, near))
    assert found is not None
    wanted = Dense(out_axes=(out,), batch_axes=(0,), splits=(8, 8, 8))
    assert found.geometry == wanted
    alone = fused_stack("qkv", shape, out, around({}, {"proj": (4, 8, 8)}))
    assert alone is not None
    assert alone.likely == wanted
    assert alone.geometry == Dense(out_axes=(out,), batch_axes=(0,))
    assert fused_stack("dense", shape, out, Surroundings()) is None
