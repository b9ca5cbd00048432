"""Every map of tiny models of transformers, against their own modules."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import specops
from specops.inspection import Inspection, WeightFigures

torch = pytest.importorskip("torch")
specops_torch = pytest.importorskip("specops_torch")
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("ignore")

SMALL = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
HEADS = {**SMALL, "num_attention_heads": 4}
GROUPED = {**HEADS, "num_key_value_heads": 2, "vocab_size": 20, "pad_token_id": 0}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "GPT2": ("LMHeadModel", {"n_embd": 16, "n_layer": 1, "n_head": 4, "vocab_size": 20}),
    "Llama": ("ForCausalLM", {**GROUPED, "tie_word_embeddings": True}),
    "Bert": ("Model", {**HEADS, "vocab_size": 20, "max_position_embeddings": 8}),
    "ViT": ("Model", {**HEADS, "image_size": 8, "patch_size": 4}),
    "Mamba": ("ForCausalLM", {**SMALL, "vocab_size": 20, "state_size": 4}),
    "Mixtral": ("ForCausalLM", {**GROUPED, "num_local_experts": 2}),
    "T5": (
        "ForConditionalGeneration",
        {"d_model": 16, "d_kv": 4, "d_ff": 24, "num_layers": 1, "num_heads": 4, "vocab_size": 20},
    ),
    "Wav2Vec2": (
        "Model",
        {
            **HEADS,
            "conv_dim": (8, 8),
            "conv_stride": (5, 2),
            "conv_kernel": (10, 3),
            "num_feat_extract_layers": 2,
            "num_conv_pos_embeddings": 8,
            "num_conv_pos_embedding_groups": 4,
        },
    ),
    "GPTNeoX": ("ForCausalLM", {**HEADS, "vocab_size": 20}),
    "Bloom": ("ForCausalLM", {"hidden_size": 16, "n_layer": 1, "n_head": 4, "vocab_size": 20}),
    "CodeGen": (
        "ForCausalLM",
        {"n_embd": 16, "n_layer": 1, "n_head": 4, "rotary_dim": 4, "vocab_size": 20},
    ),
    "GPTBigCode": (
        "ForCausalLM",
        {"n_embd": 16, "n_layer": 1, "n_head": 4, "vocab_size": 20, "multi_query": False},
    ),
    "GptOss": ("ForCausalLM", {**GROUPED, "num_local_experts": 2, "head_dim": 4}),
    "Phi3": ("ForCausalLM", GROUPED),
    "Mamba2": (
        "ForCausalLM",
        {"num_heads": 4, "head_dim": 8, "state_size": 4, "n_groups": 2, "vocab_size": 20, **SMALL},
    ),
    "FalconMamba": ("ForCausalLM", {**SMALL, "vocab_size": 20, "state_size": 4}),
    "Bamba": (
        "ForCausalLM",
        {
            **GROUPED,
            "num_hidden_layers": 2,
            "attn_layer_indices": [1],
            "mamba_n_heads": 4,
            "mamba_d_head": 8,
            "mamba_d_state": 4,
            "mamba_n_groups": 1,
        },
    ),
    "Lfm2": ("ForCausalLM", {**GROUPED, "num_hidden_layers": 2, "full_attn_idxs": [1]}),
    "Deberta": ("Model", {**HEADS, "vocab_size": 20, "max_position_embeddings": 8}),
    "DeepseekV3": (
        "ForCausalLM",
        {
            **GROUPED,
            "num_key_value_heads": 4,
            "first_k_dense_replace": 1,
            "kv_lora_rank": 6,
            "q_lora_rank": 5,
            "qk_rope_head_dim": 2,
            "qk_nope_head_dim": 4,
            "v_head_dim": 3,
        },
    ),
    "Qwen3Next": (
        "ForCausalLM",
        {
            **GROUPED,
            "num_hidden_layers": 2,
            "head_dim": 4,
            "num_experts": 0,
            "layer_types": ["linear_attention", "full_attention"],
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
            "linear_key_head_dim": 4,
            "linear_value_head_dim": 3,
        },
    ),
    "ModernBert": ("Model", {**HEADS, "vocab_size": 20, "pad_token_id": 0}),
    "GraniteMoeShared": (
        "ForCausalLM",
        {**GROUPED, "num_local_experts": 2, "shared_intermediate_size": 12},
    ),
    "Moonshine": (
        "ForConditionalGeneration",
        {
            "hidden_size": 16,
            "intermediate_size": 24,
            "vocab_size": 20,
            "encoder_num_hidden_layers": 1,
            "decoder_num_hidden_layers": 1,
            "encoder_num_attention_heads": 4,
            "decoder_num_attention_heads": 4,
        },
    ),
    "Glm": ("ForCausalLM", {**GROUPED, "head_dim": 4}),
    "Hiera": (
        "Model",
        {
            "embed_dim": 8,
            "image_size": [32, 32],
            "num_heads": [1, 2],
            "depths": [1, 1],
            "query_stride": [2, 2],
            "masked_unit_size": [4, 4],
            "num_query_pool": 1,
        },
    ),
    "AST": (
        "Model",
        {
            **HEADS,
            "patch_size": 4,
            "frequency_stride": 3,
            "time_stride": 2,
            "max_length": 16,
            "num_mel_bins": 16,
        },
    ),
    "ConvNext": ("Model", {"num_stages": 2, "hidden_sizes": [8, 16], "depths": [1, 1]}),
    "MobileNetV2": ("Model", {"depth_multiplier": 0.1, "min_depth": 4, "image_size": 32}),
    "ResNet": ("Model", {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1]}),
    "RegNet": (
        "Model",
        {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 3], "groups_width": 4},
    ),
}


TIED = ("GPT2", "Llama", "T5", "Bloom", "GPTBigCode", "Lfm2", "Moonshine")
BY_HEADS = {
    # As their forwards cut it: how many parts follow one another, and what is in each.
    ("GPTNeoX", "query_key_value"): 4,
    ("Bloom", "query_key_value"): 4,
    ("GPTBigCode", "c_attn"): 4,
    ("CodeGen", "qkv_proj"): 4,
    ("Deberta", "in_proj"): 4,
}
BLOCKS = {
    # The sizes of what their forwards split, and how many times that follows.
    ("Mamba", "in_proj"): ([24, 24], 1),
    ("Mamba", "x_proj"): ([1, 4, 4], 1),
    ("FalconMamba", "in_proj"): ([24, 24], 1),
    ("FalconMamba", "x_proj"): ([1, 4, 4], 1),
    ("Mamba2", "in_proj"): ([32, 32, 8, 8, 4], 1),
    ("Bamba", "in_proj"): ([32, 32, 4, 4, 4], 1),
    ("Lfm2", "in_proj"): ([16, 16, 16], 1),
    ("DeepseekV3", "kv_a_proj_with_mqa"): ([6, 2], 1),
    ("DeepseekV3", "kv_b_proj"): ([4, 3], 4),
    ("Qwen3Next", "q_proj"): ([4, 4], 4),
    ("Qwen3Next", "in_proj_qkvz"): ([4, 4, 6, 6], 2),
    ("Qwen3Next", "in_proj_ba"): ([2, 2], 2),
    ("ModernBert", "Wqkv"): ([16, 16, 16], 1),
    ("ModernBert", "Wi"): ([24, 24], 1),
    ("GraniteMoeShared", "input_linear"): ([12, 12], 1),
    ("Moonshine", "fc1"): ([24, 24], 1),
}


def matrices(kind: str, name: str, module: Any) -> list[np.ndarray] | None:
    """The maps of a module that is no convolution; of fused ones each."""
    w = module.weight.detach().double().numpy()
    layer, last = type(module).__name__, name.rpartition(".")[2]
    if layer == "Conv1D":
        w = w.T
    elif layer not in ("Linear", "Embedding") and not layer.endswith("TopKRouter"):
        return None
    rows, columns = w.shape
    if (kind, last) in BY_HEADS:
        by_heads = w.reshape(BY_HEADS[kind, last], 3, -1, columns)
        return [by_heads[:, i].reshape(-1, columns) for i in range(3)]
    if (kind, last) in BLOCKS and rows == np.prod(BLOCKS[kind, last][1]) * sum(
        BLOCKS[kind, last][0]
    ):
        sizes, repeats = BLOCKS[kind, last]
        turns = w.reshape(repeats, -1, columns)
        return [b.reshape(-1, columns) for b in np.split(turns, np.cumsum(sizes)[:-1], axis=1)]
    if last in ("c_attn", "qkv"):
        return np.split(w, 3)
    if last == "gate_up_proj":
        return np.split(w, 2)
    if last == "qkv_proj":
        return np.split(w, [rows // 2, 3 * rows // 4])
    return [w]


def truth(kind: str, model: Any) -> Iterator[tuple[str, list[float]]]:
    """(name of a weight, the norms of its maps) as the modules of a model compute."""
    for name, module in model.named_modules():
        if type(module).__name__.endswith("Experts"):
            found: dict[str, list[Any]] = {"gate_up_proj": [], "down_proj": []}
            for both, down in zip(module.gate_up_proj, module.down_proj, strict=True):
                up = both.detach().double().numpy()
                halves = [up[:, ::2], up[:, 1::2]] if kind == "GptOss" else np.split(up, 2)
                found["gate_up_proj"] += halves
                found["down_proj"] += [down.detach().double().numpy()]
            for parameter, maps in found.items():
                yield f"{name}.{parameter}", [np.linalg.norm(w, 2) for w in maps]
        weight = getattr(module, "weight", None)
        if not isinstance(weight, torch.Tensor) or weight.dim() < 2:
            continue
        if isinstance(module, torch.nn.modules.conv._ConvNd):
            w = weight.detach().double().numpy()
            bounds = specops.spectral_norm_bounds(w, specops_torch.geometry_of(module), rtol=1e-6)
            yield f"{name}.weight", [float(bounds.upper)]
            continue
        found_maps = matrices(kind, name, module)
        assert found_maps is not None, f"{name}: a {type(module).__name__}"
        yield f"{name}.weight", [np.linalg.norm(w, 2) for w in found_maps]


def stored(kind: str, wanted: dict[str, list[float]]) -> Iterator[tuple[str, float]]:
    """(name in the file, the largest norm): experts of Mixtral are stored one by one."""
    for name, norms in wanted.items():
        if kind != "Mixtral" or ".experts." not in name:
            yield name, max(norms)
            continue
        for i, norm in enumerate(norms):
            yield f"{name}.{i}", norm


def ends(row: WeightFigures) -> tuple[float, float]:
    assert row.figures is not None
    return row.figures.ends


@pytest.mark.parametrize("kind", MODELS)
def test_every_map_is_the_modules_own(kind: str, tmp_path: Path) -> None:
    suffix, settings = MODELS[kind]
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**settings)
    model = getattr(transformers, f"{kind}{suffix}")(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    model.save_pretrained(tmp_path)
    if kind == "RegNet":
        # Its configuration has no groups: they are told by the outputs before, and by other blocks.
        (tmp_path / "config.json").unlink()
    found: Inspection = specops.inspect(tmp_path)
    assert not found.problems
    tied = [note for note in found.notes if "tie_word_embeddings" in note]
    assert len(tied) == (kind in TIED), "those that share their table"
    rows = {w.name: w for w in found.measured}
    assert not any(w.readings for w in rows.values())
    maps = dict(truth(kind, model))
    hook_agrees(model, maps, rows)
    wanted = dict(stored(kind, maps))
    convolutions = (torch.nn.Conv1d, torch.nn.Conv2d)
    strided = {
        f"{name}.weight"
        for name, module in model.named_modules()
        if isinstance(module, convolutions) and set(module.stride) != {1}
    }
    for name in rows.keys() & wanted.keys():
        agrees(rows[name], wanted[name], name in strided)
    # Names that saving changes are matched by value, tied weights are stored once.
    renamed = [w for name, w in rows.items() if name not in wanted]
    rest = [value for name, value in wanted.items() if name not in rows]
    assert len(rest) >= len(renamed)
    for row in renamed:
        low, high = ends(row)
        value = next(v for v in rest if low * (1 - 1e-4) <= v <= high * (1 + 1e-4))
        rest.remove(value)
    assert set(rest) <= {v for n, v in wanted.items() if n in rows}, "a map that was not measured"


def hook_agrees(model: Any, wanted: dict[str, list[float]], rows: dict[str, WeightFigures]) -> None:
    """Every map that `attach` finds, one by one, and the words for it in a row of that name."""
    found = specops.attach(None, model, specops.Monitor()).geometries()
    # Tables are only constrained by name, reparametrised weights not at all.
    left = {
        f"{name}.weight"
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Embedding) or hasattr(module, "parametrizations")
    }
    assert wanted.keys() - left <= found.keys() <= wanted.keys()
    for name, geometry in found.items():
        if isinstance(geometry, specops.Conv):
            continue
        w = model.get_parameter(name).detach().double()
        norms = specops.spectral_norm(w, geometry)
        each = torch.cat([n.reshape(-1) for n in (norms if isinstance(norms, tuple) else (norms,))])
        np.testing.assert_allclose(np.sort(each), np.sort(wanted[name]), rtol=1e-6, err_msg=name)
        if name in rows:
            assert rows[name].geometry == geometry.describe(), name


def agrees(row: WeightFigures, value: float, strided: bool) -> None:
    """Of a row that does not say that it assumes something, or cannot decide."""
    low, high = ends(row)
    assert len(row.readings) < 3, row.why
    assert value <= high * (1 + 1e-4), (row.name, row.why)
    assert row.readings or high <= low * 1.01
    assumed = ("stride 1 assumed" in row.why and strided) or "group assumed" in row.why
    assert value >= low * (1 - 1e-4) or assumed, (row.name, row.why)
