"""Adapters that peft writes, against the weights of the models that it merges them into."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import specops
from specops.inspection import Comparison, compare, differences, with_updates

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
save_file = pytest.importorskip("safetensors.torch").save_file
conv1d = pytest.importorskip("transformers.pytorch_utils").Conv1D
pytestmark = pytest.mark.filterwarnings("ignore")
nn = torch.nn

LAYERS = ["fc", "square", "c3", "c1", "c5"]
LORA = {"r": 3, "lora_alpha": 6}
PRODUCT = {"r": 1, "alpha": 6, "target_modules": LAYERS}
PATTERNS = {"rank_pattern": {"fc": 2}, "alpha_pattern": {"^c3": 16, "f.": 5}}
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "LoRA": ("LoraConfig", {**LORA, "target_modules": [*LAYERS, "table", "c3d"]}),
    "stored the other way round": (
        "LoraConfig",
        {**LORA, "target_modules": ["turned", "turned_square"], "fan_in_fan_out": True},
    ),
    "both ways": ("LoraConfig", {**LORA, "target_modules": ["turned", "fc"]}),
    "rsLoRA": ("LoraConfig", {**LORA, "use_rslora": True, "target_modules": [*LAYERS, "table"]}),
    "patterns": ("LoraConfig", {**LORA, **PATTERNS, "target_modules": LAYERS}),
    "DoRA": ("LoraConfig", {**LORA, "use_dora": True, "target_modules": [*LAYERS, "table"]}),
    "DoRA the other way round": (
        "LoraConfig",
        {**LORA, "use_dora": True, "target_modules": ["turned"], "fan_in_fan_out": True},
    ),
    "attention": ("LoraConfig", {**LORA, "target_modules": ["attention"]}),
    "whole layers beside": (
        "LoraConfig", {**LORA, "target_modules": ["fc"], "modules_to_save": ["square"]},
    ),
    "AdaLoRA": (
        "AdaLoraConfig",
        {"init_r": 3, "lora_alpha": 6, "total_step": 9, "target_modules": ["fc", "square"]},
    ),
    "LoHa": ("LoHaConfig", {**PRODUCT, "r": 3}),
    "LoHa, cores": ("LoHaConfig", {**PRODUCT, "use_effective_conv2d": True}),
    "LoHa, patterns": ("LoHaConfig", {**PRODUCT, **PATTERNS}),
    "LoKr": ("LoKrConfig", PRODUCT),
    "LoKr, whole": ("LoKrConfig", {**PRODUCT, "r": 16}),
    "LoKr, both": ("LoKrConfig", {**PRODUCT, "decompose_both": True}),
    "LoKr, cores": (
        "LoKrConfig",
        {
            **PRODUCT, "use_effective_conv2d": True, "decompose_factor": 2,
            "target_modules": ["fc", "c3"],  # of others peft 0.21 cannot compute it itself
        },
    ),
    "LoKr, patterns": ("LoKrConfig", {**PRODUCT, **PATTERNS}),
}  # fmt: skip


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.c1, self.c3 = nn.Conv2d(4, 8, 1), nn.Conv2d(8, 6, 3)
        self.c3d, self.c5 = nn.Conv3d(2, 4, 3), nn.Conv1d(4, 6, 5)
        self.fc, self.square = nn.Linear(8, 12), nn.Linear(8, 8)
        self.turned, self.turned_square = conv1d(12, 8), conv1d(8, 8)
        self.table, self.attention = nn.Embedding(10, 8), nn.MultiheadAttention(8, 2)

    def forward(self, x: Any) -> Any:
        return x


def moved(model: Any) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) / 2)


def compared(one: Path, other: Path) -> Comparison:
    first, second = specops.inspect(one), specops.inspect(other)
    assert not second.problems
    found = compare(first, second)
    found = replace(found, differences=differences(found, one, other))
    return with_updates(found, first, second)


@pytest.mark.parametrize("kind", KINDS)
def test_sums_are_those_that_peft_merges(kind: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    name, settings = KINDS[kind]
    model = Network()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    (tmp_path / "base").mkdir()
    save_file(before, tmp_path / "base" / "model.safetensors", metadata={"format": "pt"})
    model = peft.get_peft_model(model, getattr(peft, name)(**settings))
    moved(model)
    model.save_pretrained(tmp_path / "adapter")
    merged = model.merge_and_unload().state_dict()
    (tmp_path / "merged").mkdir()
    save_file(merged, tmp_path / "merged" / "model.safetensors", metadata={"format": "pt"})
    found = compared(tmp_path / "base", tmp_path / "adapter")
    wanted = compared(tmp_path / "base", tmp_path / "merged")
    pairs = {pair.name: pair for pair in found.pairs}
    changed = {k for k, v in before.items() if v.ndim > 1 and not torch.equal(v, merged[k])}
    # That one peft 0.21 adds twice, whether it merges or not.
    changed -= {"attention.out_proj.weight"}
    assert set(pairs) == changed
    for pair in wanted.pairs:
        if pair.name not in changed:
            continue
        mine, difference = pairs[pair.name], found.difference(pairs[pair.name])
        assert mine.other.geometry == pair.other.geometry
        for a, b in (
            (mine.other.figures, pair.other.figures),
            (difference, wanted.difference(pair)),
        ):
            assert a is not None
            assert b is not None
            np.testing.assert_allclose(a.sigma_max, b.sigma_max, rtol=1e-4, err_msg=pair.name)
            np.testing.assert_allclose(a.each, b.each, rtol=1e-4, err_msg=pair.name)


def test_a_base_that_peft_has_changed_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    model = nn.Sequential(nn.Linear(8, 12))
    save_file(model.state_dict(), tmp_path / "base" / "m.safetensors", metadata={"format": "pt"})
    settings = {**LORA, "target_modules": ["0"], "init_lora_weights": "pissa"}
    peft.get_peft_model(model, peft.LoraConfig(**settings)).save_pretrained(tmp_path / "adapter")
    found = compared(tmp_path / "base", tmp_path / "adapter")
    assert not found.pairs
    (row,) = specops.inspect(tmp_path / "adapter").measured
    assert "pissa changed the weight" in row.why


def test_stacks_of_experts(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    settings = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "head_dim": 4}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 3}
    config = transformers.GptOssConfig(vocab_size=20, pad_token_id=0, **settings, **heads)
    model = transformers.GptOssForCausalLM(config)
    name = "model.layers.0.mlp.experts.down_proj"
    before = model.get_parameter(name).detach().double().clone()
    targets = {"target_modules": ["q_proj"], "target_parameters": ["mlp.experts.down_proj"]}
    model = peft.get_peft_model(model, peft.LoraConfig(r=2, lora_alpha=6, **targets))
    moved(model)
    model.save_pretrained(tmp_path)
    update = model.merge_and_unload().get_parameter(name).detach().double() - before
    rows = {w.name: w for w in specops.inspect(tmp_path).measured}
    row = rows["base_model.model.model.layers.0.mlp.experts (update)"]
    assert row.figures is not None
    wanted = torch.linalg.matrix_norm(update, 2)
    np.testing.assert_allclose(row.figures.each, wanted, rtol=1e-4)


@pytest.mark.parametrize("kind", ["OFTConfig", "VeraConfig", "FourierFTConfig", "IA3Config"])
def test_what_is_no_sum_is_to_be_merged_first(kind: str, tmp_path: Path) -> None:
    options = {
        "OFTConfig": {"oft_block_size": 4, "r": 0},
        "VeraConfig": {"r": 3},
        "FourierFTConfig": {"n_frequency": 20},
        "IA3Config": {"feedforward_modules": []},
    }
    config = getattr(peft, kind)(target_modules=["fc"], **options[kind])
    peft.get_peft_model(Network(), config).save_pretrained(tmp_path)
    found = specops.inspect(tmp_path)
    assert not found.measured
    assert "merge_and_unload" in found.problems[0]
