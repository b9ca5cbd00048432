"""Weights that a file holds in several tensors, against what the layers compute with."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import specops
from specops import Conv
from tests.inspection.files import written

RNG = np.random.default_rng(0)


def normal(*shape: int) -> np.ndarray:
    return RNG.normal(size=shape).astype(np.float32)


def rows(path: Path, tensors: dict[str, Any], **options: Any) -> dict[str, Any]:
    """The measured rows of a file with these tensors."""
    found = specops.inspect(written(path / "m.safetensors", tensors, format="pt"), **options)
    assert not found.problems
    return {w.name: w for w in found.measured}


def top(w: np.ndarray) -> float:
    return float(np.linalg.norm(np.asarray(w, float), 2))


@pytest.mark.parametrize("old", [True, False])
@pytest.mark.parametrize("dim", [0, 1, 2, None])
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_weight_norm_of_any_axis(old: bool, dim: int | None, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    utils = torch.nn.utils if old else torch.nn.utils.parametrizations
    layer = utils.weight_norm(torch.nn.Conv1d(4, 6, 5), dim=dim)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.mul_(1.5)
        layer(torch.zeros(1, 4, 9))  # the old style computes the weight in the forward pass
    tensors = {f"conv.{k}": v.detach().numpy() for k, v in layer.state_dict().items()}
    found = rows(tmp_path, tensors)
    assert list(found) == ["conv.weight"]
    wanted = specops.spectral_norm_bounds(
        layer.weight.detach().double().numpy(), Conv(None), rtol=1e-6
    )
    _, upper = found["conv.weight"].figures.sigma_max
    assert upper == pytest.approx(float(wanted.upper), rel=1e-3)
    assert "weight norm" in found["conv.weight"].why
    assert len(found["conv.weight"].sources) == 2


@pytest.mark.parametrize("old", [True, False])
@pytest.mark.parametrize("transposed", [True, False])
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_spectral_norm_is_divided_by_what_is_stored(
    old: bool, transposed: bool, tmp_path: Path
) -> None:
    torch = pytest.importorskip("torch")
    utils = torch.nn.utils if old else torch.nn.utils.parametrizations
    kind = torch.nn.ConvTranspose1d if transposed else torch.nn.Conv1d
    layer = utils.spectral_norm(kind(4, 6, 1))
    layer.eval()
    tensors = {k: v.detach().numpy() for k, v in layer.state_dict().items()}
    found = rows(tmp_path, tensors)
    assert list(found) == ["weight"]
    images = layer(torch.eye(4)[:, :, None])[:, :, 0] - layer.bias
    wanted = top(images.detach().numpy())
    assert found["weight"].figures.sigma_max == pytest.approx(wanted, rel=1e-5)


def test_tensors_that_only_sound_like_a_pair_are_left_apart(tmp_path: Path) -> None:
    found = rows(tmp_path, {"to_v": normal(4, 4), "to_g": normal(4, 4), "b_v": normal(3, 4)})
    assert set(found) == {"to_v", "to_g", "b_v"}


def test_pruned_weights_are_seen_with_their_masks(tmp_path: Path) -> None:
    w, mask = normal(5, 7), (normal(5, 7) > 0).astype(np.float32)
    found = rows(tmp_path, {"fc.weight_orig": w, "fc.weight_mask": mask})
    assert found["fc.weight"].figures.sigma_max == pytest.approx(top(w * mask), rel=1e-6)


A, B = normal(3, 8), normal(6, 3)
ALPHA = {"alpha": np.array(6.0, np.float32)}
K = normal(3, 4, 3, 3)
UPDATES = {
    "peft": ({"lora_A.weight": A, "lora_B.weight": B}, B @ A),
    "an adapter of peft": ({"lora_A.default.weight": A, "lora_B.default.weight": B}, B @ A),
    "an embedding of peft": ({"lora_embedding_A": A, "lora_embedding_B": B}, B @ A),
    "kohya": ({"lora_down.weight": A, "lora_up.weight": B, **ALPHA}, 2 * B @ A),
    "LoHa": (
        {"hada_w1_a": B, "hada_w1_b": A, "hada_w2_a": 2 * B, "hada_w2_b": A[:, ::-1], **ALPHA},
        2 * (B @ A) * (2 * B @ A[:, ::-1]),
    ),
    "LoKr": (
        {"lokr_w1": B[:2], "lokr_w2_a": B, "lokr_w2_b": A, **ALPHA},
        2 * np.kron(B[:2], B @ A),
    ),
    "LoKr, whole": ({"lokr_w1": B[:2], "lokr_w2": A, **ALPHA}, np.kron(B[:2], A)),
}  # fmt: skip


@pytest.mark.parametrize("kind", UPDATES)
def test_low_rank_updates(kind: str, tmp_path: Path) -> None:
    parts, matrix = UPDATES[kind]
    found = rows(tmp_path, {f"unet.to_q.{k}": np.ascontiguousarray(v) for k, v in parts.items()})
    (row,) = found.values()
    assert row.name == "unet.to_q (update)"
    assert row.shape == matrix.shape
    values = np.linalg.svd(matrix.astype(float), compute_uv=False)
    np.testing.assert_allclose(row.figures.spectrum, values, atol=1e-5 * values[0])
    assert ("α/3" in row.why) is ("alpha" in parts and kind != "LoKr, whole")


def test_the_scale_of_peft_stands_beside_the_file(tmp_path: Path) -> None:
    settings = {"lora_alpha": 12, "alpha_pattern": {"v": 24}, "use_rslora": False}
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings), encoding="utf-8")
    both = {f"{n}.lora_{x}.weight": w for n in ("m.q", "m.v") for x, w in (("A", A), ("B", B))}
    written(tmp_path / "adapter_model.safetensors", both, format="pt")
    folder = {w.name: w for w in specops.inspect(tmp_path).measured}
    found = rows(tmp_path, both)
    assert set(folder) == set(found)
    assert found["m.q (update)"].figures.sigma_max == pytest.approx(4 * top(B @ A), rel=1e-5)
    assert found["m.v (update)"].figures.sigma_max == pytest.approx(8 * top(B @ A), rel=1e-5)


@pytest.mark.parametrize("turned", [False, True])
def test_what_the_network_runs_is_base_and_update_where_both_are_there(
    turned: bool, tmp_path: Path
) -> None:
    w, update = normal(6, 8), 2.0 * B @ A
    base = w.T if turned else w
    settings = {"lora_alpha": 6, "fan_in_fan_out": turned}
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings), encoding="utf-8")
    tensors = {
        "q.base_layer.weight": base,
        "q.lora_A.default.weight": A,
        "q.lora_B.default.weight": B,
        "two.weight": base,
        **{f"two.lora_{x}.{n}.weight": v for n in ("a", "b") for x, v in (("A", A), ("B", B))},
        "other.weight": normal(6, 7),
        "other.lora_A": A,
        "other.lora_B": B,
        "e.weight": normal(8, 6),
        "e.lora_embedding_A.default": A,
        "e.lora_embedding_B.default": B,
    }
    found = rows(tmp_path, tensors)
    row = found["q.weight"]
    assert row.figures.sigma_max == pytest.approx(top(w + update), rel=1e-6)
    assert row.sources == tuple(list(tensors)[:3])
    assert found["q.base_layer.weight"].figures.sigma_max == pytest.approx(top(w), rel=1e-6)
    assert found["q (update)"].figures.sigma_max == pytest.approx(top(update), rel=1e-5)
    table = tensors["e.weight"] + update.T
    assert found["e.weight (merged)"].figures.sigma_max == pytest.approx(top(table), rel=1e-6)
    # Of two adapters no file says which is in use; a base of another shape is none.
    assert not {"two.weight (merged)", "other.weight (merged)"} & set(found)
    assert {f"two (update by lora_A.{n}.weight)" for n in "ab"} < set(found)
    (tmp_path / "adapter_config.json").unlink()
    assert set(found) - set(rows(tmp_path, tensors)) == {"q.weight", "e.weight (merged)"}
    total = specops.inspect(tmp_path / "m.safetensors").totals()["parameters"]
    assert total == sum(t.size for t in tensors.values())


def test_updates_beside_the_checkpoint_that_they_are_of(tmp_path: Path) -> None:
    from specops.inspection import compare, differences, with_updates

    base, adapter = tmp_path / "base", tmp_path / "adapter"
    w = {name: normal(6, 8) for name in ("model.q.weight", "model.v.weight", "model.o.weight")}
    both = {
        f"base_model.model.model.{n}.lora_{x}.weight": v
        for n in "qvx"
        for x, v in (("A", A), ("B", B))
    }
    both["base_model.model.model.v.lora_magnitude_vector"] = normal(6)
    for folder, tensors in ((base, w), (adapter, both)):
        folder.mkdir()
        written(folder / "m.safetensors", tensors, format="pt")
    (adapter / "adapter_config.json").write_text('{"lora_alpha": 6}', encoding="utf-8")
    paths = base / "m.safetensors", adapter / "m.safetensors"
    one, other = map(specops.inspect, paths)
    found = compare(one, other)
    found = replace(found, differences=differences(found, *paths))
    found = with_updates(found, one, other)
    pair, scaled = found.pairs
    assert pair.name == "model.q.weight"
    wanted = np.linalg.svd(w[pair.name] + 2.0 * B @ A, compute_uv=False)
    np.testing.assert_allclose(pair.other.figures.spectrum, wanted, rtol=1e-5)
    assert found.differences[pair.name].sigma_max == pytest.approx(2 * top(B @ A), rel=1e-5)
    lengths = both["base_model.model.model.v.lora_magnitude_vector"].astype(float)
    total = w[scaled.name] + 2.0 * B @ A
    total *= lengths[:, None] / np.linalg.norm(total, axis=1, keepdims=True)
    assert scaled.other.figures.sigma_max == pytest.approx(top(total), rel=1e-6)
    added = found.differences[scaled.name].sigma_max
    assert added == pytest.approx(top(total - w[scaled.name]), rel=1e-6)
    assert found.only_one == ["model.o.weight"]
    assert "added to what they are of" in " ".join(compare(other, one).lines())
    assert [n.rpartition(".")[2] for n in found.only_other] == ["x (update)"]


def test_updates_by_names_of_kohya(tmp_path: Path) -> None:
    from specops.inspection import compare, with_updates

    base, adapter = tmp_path / "base.safetensors", tmp_path / "adapter.safetensors"
    kernel, lengths = normal(6, 4, 3, 3), normal(1, 8)
    w = {
        "down_blocks.0.attn_1.to_q.weight": normal(6, 8),
        "down_blocks.0.attn_1.to_k.weight": normal(6, 8),
        "down_blocks.0.conv_in.weight": kernel,
        "model.mid.to_q.weight": normal(6, 8),
        "a.twice.weight": normal(6, 8),
        "b.twice.weight": normal(6, 8),
    }
    lora = {"lora_down.weight": A, "lora_up.weight": B, **ALPHA}
    flat = normal(3, 36)
    parts = {
        **{f"lora_unet_down_blocks_0_attn_1_to_q.{k}": v for k, v in lora.items()},
        **{f"lora_unet_down_blocks_0_attn_1_to_k.{k}": v for k, v in lora.items()},
        "lora_unet_down_blocks_0_attn_1_to_k.dora_scale": lengths,
        **{f"lora_te_mid_to_q.{k}": v for k, v in lora.items()},
        **{f"lora_unet_twice.{k}": v for k, v in lora.items()},
        **{
            f"lycoris_down_blocks_0_conv_in.hada_w{i}_{x}": v
            for i in (1, 2)
            for x, v in (("a", B), ("b", flat))
        },
        "lycoris_down_blocks_0_conv_in.alpha": ALPHA["alpha"],
    }
    written(base, w, format="pt")
    written(adapter, parts, format="pt")
    one, other = map(specops.inspect, (base, adapter))
    found = with_updates(compare(one, other), one, other)
    figures = {pair.name: pair.other.figures for pair in found.pairs}
    update = 2.0 * B @ A
    first, second = (w[n] for n in list(w)[:2])
    along = second + update
    along = along * (lengths / np.linalg.norm(along, axis=0, keepdims=True))
    tops = [figures.pop(n).sigma_max for n in list(w)[:2]]
    assert tops == pytest.approx([top(first + update), top(along)], rel=1e-6)
    merged = kernel + 2.0 * ((B @ flat) ** 2).reshape(kernel.shape)
    bounds = specops.spectral_norm_bounds(merged.astype(float), Conv(None), rtol=1e-6)
    assert figures.pop("down_blocks.0.conv_in.weight").sigma_max[1] == pytest.approx(
        float(bounds.upper), rel=1e-5
    )
    assert figures.pop("model.mid.to_q.weight").sigma_max == pytest.approx(
        top(w["model.mid.to_q.weight"] + update), rel=1e-6
    )
    assert not figures, "of two layers by that name none is taken"


def test_updates_of_fused_layers_are_taken_apart(tmp_path: Path) -> None:
    a, b = normal(3, 8), normal(24, 3)
    behind = {"h.c_proj.lora_A.weight": a, "h.c_proj.lora_B.weight": b[:8]}
    parts = {"h.c_attn.lora_A.weight": a, "h.c_attn.lora_B.weight": b}
    wanted = [top(part @ a) for part in np.split(b, 3)]
    row = rows(tmp_path, {**parts, **behind})["h.c_attn (update)"]
    np.testing.assert_allclose(row.figures.each, wanted, rtol=1e-5)
    (alone,) = rows(tmp_path, parts).values()
    split, whole = alone.readings
    np.testing.assert_allclose(split.figures.each, wanted, rtol=1e-5)
    assert whole.figures.sigma_max == pytest.approx(top(b @ a), rel=1e-5)


def test_updates_of_convolutions_in_groups(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    down, up = torch.nn.Conv2d(4, 6, 3), torch.nn.Conv2d(6, 8, 1, groups=2)
    parts = {"c.lora_A.weight": down.weight, "c.lora_B.weight": up.weight}
    (row,) = rows(
        tmp_path, {k: v.detach().numpy() for k, v in parts.items()}, input_size=5
    ).values()
    with torch.no_grad():
        down.bias.zero_()
        up.bias.zero_()
        images = torch.eye(100).reshape(100, 4, 5, 5)
        padded = torch.nn.functional.pad(images, (1, 1, 1, 1))
        wanted = top(up(down(padded)).flatten(1).numpy())
    assert row.figures.sigma_max == pytest.approx(wanted, rel=1e-5)


def test_parts_of_other_adapters_are_no_maps(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "VERA"}', encoding="utf-8")
    tensors = {"base_model.vera_A": A, "q.vera_lambda_d": normal(3), "lm_head.weight": normal(5, 4)}
    found = specops.inspect(written(tmp_path / "m.safetensors", tensors, format="pt"))
    assert [w.name for w in found.measured] == ["lm_head.weight"]
    (problem,) = found.problems
    assert "vera_lambda_d" in problem
    assert "merge_and_unload" in problem


def test_updates_of_convolutions(tmp_path: Path) -> None:
    up = normal(6, 3, 1, 1)
    kernel = np.tensordot(up[:, :, 0, 0], K, axes=1)
    (row,) = rows(tmp_path, {"c.lora_down.weight": K, "c.lora_up.weight": up}).values()
    geometry = Conv((8, 8), boundary="circular")
    sized = rows(
        tmp_path,
        {"c.lora_down.weight": K, "c.lora_up.weight": up},
        input_size=8,
        boundary="circular",
    )
    wanted = float(specops.spectral_norm(kernel.astype(float), geometry))
    assert sized["c (update)"].figures.sigma_max == pytest.approx(wanted, rel=1e-6)
    assert row.shape == kernel.shape


def test_differences_of_updates_are_products_too(tmp_path: Path) -> None:
    from specops.inspection import compare, differences

    paths = []
    for i, scale in enumerate((1.0, 3.0)):
        folder = tmp_path / str(i)
        folder.mkdir()
        tensors = {
            "q.lora_A.weight": A,
            "q.lora_B.weight": np.float32(scale) * B,
            "w": normal(3, 4),
        }
        paths.append(written(folder / "m.safetensors", tensors))
    one, other = map(specops.inspect, paths)
    found = differences(compare(one, other), *paths)
    assert found["q (update)"].sigma_max == pytest.approx(2 * top(B @ A), rel=1e-5)
    assert set(found) == {"q (update)", "w"}


def test_tied_weights_are_measured_once(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    head, table = torch.nn.Linear(4, 9, bias=False), torch.nn.Embedding(9, 4)
    head.weight = table.weight
    model = torch.nn.ModuleDict({"table": table, "head": head})
    torch.save({**model.state_dict(), "part": table.weight.detach()[:5]}, tmp_path / "m.pt")
    found = {w.name: w for w in specops.inspect(tmp_path / "m.pt").weights}
    assert found["table.weight"].figures is not None
    assert found["head.weight"].skipped == "tied: the same tensor as table.weight"
    assert found["part"].figures is not None


def test_hints_are_obeyed_or_refused(tmp_path: Path) -> None:
    path = written(tmp_path / "m.safetensors", {"fc.weight": normal(4, 5), "c.weight": K})
    found = specops.inspect(path, stride={"*": 2, "fc*": 2})
    (problem,) = found.problems
    assert problem.startswith("--stride fc*: refused, 'fc.weight' is no convolution")
    assert {w.name: w.geometry for w in found.measured}["c.weight"].endswith("stride 2")
    only = written(tmp_path / "n.safetensors", {"fc.weight": normal(4, 5)})
    assert specops.inspect(only, groups=4).problems == [
        "--groups: refused, the file has no convolution"
    ]
    (problem,) = specops.inspect(path, input_size={"c*": (8, 8, 8)}).problems
    assert "--input-size 8×8×8 has 3 axes, the kernel 2 spatial ones" in problem
    vector = {"ln.weight": normal(4), "c.weight": K}
    found = specops.inspect(written(tmp_path / "v.safetensors", vector), groups={"ln*": 2})
    assert "'ln.weight' is no convolution (1-d" in found.problems[0]
    excluded = specops.inspect(path, exclude=["fc*"])
    assert [w.name for w in excluded.measured] == ["c.weight"]
    with pytest.raises(ValueError, match="no tensor matches 'nothing'"):
        specops.inspect(path, exclude=["nothing"])


def test_ambiguous_rows_have_both_values(tmp_path: Path) -> None:
    w = normal(6, 5, 3)
    (row,) = rows(tmp_path, {"w": w}).values()
    assert row.geometry.startswith("ambiguous: conv any size, zeros / dense, stacked")
    kernel, stack = row.readings
    assert stack.figures.sigma_max == pytest.approx(max(map(top, w)), rel=1e-6)
    low, high = row.figures.sigma_max
    assert low == pytest.approx(min(kernel.figures.sigma_max[0], stack.figures.sigma_max))
    assert high == pytest.approx(max(kernel.figures.sigma_max[1], stack.figures.sigma_max))


def test_what_would_decide_is_said(tmp_path: Path) -> None:
    tensors = {"a.qkv.weight": normal(12, 4), "w": normal(6, 5, 3)}
    found = specops.inspect(written(tmp_path / "m.safetensors", tensors, format="pt"))
    by_hints, by_settings = (note for note in found.notes if note.startswith("ambiguous, 1"))
    assert by_hints.endswith("--input-size decide: w")
    assert by_settings.endswith("decides: a.qkv.weight")
    assert "configuration" in by_settings
