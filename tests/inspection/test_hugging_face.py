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
    "Phi3": ("ForCausalLM", GROUPED),
    "ConvNext": ("Model", {"num_stages": 2, "hidden_sizes": [8, 16], "depths": [1, 1]}),
    "MobileNetV2": ("Model", {"depth_multiplier": 0.1, "min_depth": 4, "image_size": 32}),
    "ResNet": ("Model", {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1]}),
    "RegNet": (
        "Model",
        {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 2], "groups_width": 4},
    ),
}


def matrices(name: str, module: Any) -> list[np.ndarray] | None:
    """The maps of a module that is no convolution; of fused ones each."""
    w = module.weight.detach().double().numpy()
    kind, last = type(module).__name__, name.rpartition(".")[2]
    if kind == "Conv1D":
        w = w.T
    elif kind not in ("Linear", "Embedding", "MixtralTopKRouter"):
        return None
    rows, columns = w.shape
    if last == "c_attn":
        return np.split(w, 3)
    if last == "gate_up_proj":
        return np.split(w, 2)
    if last == "query_key_value":
        by_heads = w.reshape(4, 3, -1, columns)
        return [by_heads[:, i].reshape(-1, columns) for i in range(3)]
    if last == "qkv_proj":
        return np.split(w, [rows // 2, 3 * rows // 4])
    return [w]


def truth(model: Any) -> Iterator[tuple[str, float]]:
    """(name of a weight, its largest singular value) as the modules of a model compute."""
    for name, module in model.named_modules():
        if hasattr(module, "gate_up_proj") and not isinstance(module.gate_up_proj, torch.nn.Module):
            for i, both in enumerate(module.gate_up_proj.detach().double().numpy()):
                stem = f"{name.replace('.mlp.', '.block_sparse_moe.')}.{i}"
                yield from zip(
                    (f"{stem}.w1.weight", f"{stem}.w3.weight"),
                    (np.linalg.norm(w, 2) for w in np.split(both, 2)),
                    strict=True,
                )
                down = module.down_proj[i].detach().double().numpy()
                yield f"{stem}.w2.weight", np.linalg.norm(down, 2)
            continue
        if not isinstance(getattr(module, "weight", None), torch.Tensor) or module.weight.dim() < 2:
            continue
        if isinstance(module, torch.nn.modules.conv._ConvNd):
            from specops_torch import geometry_of

            w = module.weight.detach().double().numpy()
            yield f"{name}.weight", float(specops.spectral_norm_bounds(
                w, geometry_of(module), rtol=1e-6).upper)  # fmt: skip
            continue
        found = matrices(name, module)
        assert found is not None, f"{name}: a {type(module).__name__}"
        yield f"{name}.weight", max(np.linalg.norm(w, 2) for w in found)


def ends(row: WeightFigures) -> tuple[float, float]:
    assert row.figures is not None
    sigma = row.figures.sigma_max
    return sigma if isinstance(sigma, tuple) else (sigma, sigma)


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
    found: Inspection = specops.inspect(tmp_path)
    assert not found.problems
    tied = [note for note in found.notes if "tie_word_embeddings" in note]
    assert len(tied) == (kind in ("GPT2", "Llama", "T5")), "those that share their table"
    rows = {w.name: w for w in found.measured}
    # Groups of 4 behind 16 channels, where an attention of channels gives 4 as well.
    assert sum(bool(w.readings) for w in rows.values()) <= (2 if kind == "RegNet" else 0)
    wanted = dict(truth(model))
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


def agrees(row: WeightFigures, value: float, strided: bool) -> None:
    """Of a row that does not say that it assumes something, or cannot decide."""
    low, high = ends(row)
    assert len(row.readings) < 3, row.why
    assert value <= high * (1 + 1e-4), (row.name, row.why)
    assert row.readings or high <= low * 1.01
    assumed = ("stride 1 assumed" in row.why and strided) or "group assumed" in row.why
    assert value >= low * (1 - 1e-4) or assumed, (row.name, row.why)
