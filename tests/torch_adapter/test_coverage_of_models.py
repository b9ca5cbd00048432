"""Layers of other libraries, two attachments on one weight, reports of rules that wait."""

from __future__ import annotations

import warnings
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

import specops
from specops import Dense
from specops.errors import CautionWarning

torch = pytest.importorskip("torch")
from torch import nn  # noqa: E402

import specops_torch  # noqa: E402

CLIP = specops.ClipSpectralNorm(0.5)


class Conv1D(nn.Module):
    """As Hugging Face's: (inputs, outputs)."""

    def __init__(self, nf: int, nx: int) -> None:
        super().__init__()
        self.nf, self.weight = nf, nn.Parameter(torch.randn(nx, nf))

    def forward(self, x: Any) -> Any:
        return x @ self.weight


class TinyExperts(nn.Module):
    def __init__(self, turned: bool | None, hidden: int = 4, inner: int = 3) -> None:
        super().__init__()
        self.num_experts, self.hidden_dim = 2, hidden
        up, down = (2 * inner, hidden), (hidden, inner)
        if turned:
            up, down = up[::-1], down[::-1]
        self.gate_up_proj = nn.Parameter(torch.randn(2, *up))
        self.down_proj = nn.Parameter(torch.randn(2, *down))


class TinyRouter(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.num_experts, self.weight = 2, nn.Parameter(torch.randn(2, 4))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.c_attn, self.c_fc = Conv1D(12, 4), Conv1D(8, 4)
        self.c_proj = Conv1D(4, 4)
        self.experts, self.gate = TinyExperts(False), TinyRouter()


def test_of_transformers_are_constrained() -> None:
    model = nn.ModuleDict({"h": nn.ModuleList([Block()])})
    attachment = specops.attach(None, model, CLIP)
    maps = attachment.geometries()
    assert maps["h.0.c_attn.weight"] == Dense(out_axes=(-1,), splits=(4, 4, 4))
    assert maps["h.0.c_fc.weight"] == Dense(out_axes=(-1,))
    assert maps["h.0.experts.gate_up_proj"] == Dense((1,), batch_axes=(0,), splits=(3, 3))
    assert maps["h.0.gate.weight"] == Dense()
    assert len(maps) == 6
    attachment.enforce()
    block = model["h"][0]
    for part in block.c_attn.weight.detach().split(4, dim=1):
        assert torch.linalg.matrix_norm(part, 2) <= 0.5
    assert (torch.linalg.matrix_norm(block.experts.down_proj.detach(), 2) <= 0.5).all()


def test_which_axis_of_experts_is_that_of_outputs() -> None:
    last = Dense(out_axes=(2,), batch_axes=(0,))
    for name, splits in (("gate_up_proj", (3, 3)), ("down_proj", None)):
        found = specops_torch.geometry_of(TinyExperts(True), name)
        assert found == replace(last, splits=splits)
    square = TinyExperts(None, hidden=4, inner=4)
    assert specops_torch.geometry_of(square, "down_proj") == Dense((1,), batch_axes=(0,))
    del square.gate_up_proj
    with pytest.raises(specops.errors.SpecopsError, match="which axis"):
        specops_torch.geometry_of(square, "down_proj")
    square.is_transposed = True
    assert specops_torch.geometry_of(square, "down_proj") == last
    alternating = TinyExperts(True)
    alternating.is_concatenated = False
    found = specops_torch.geometry_of(alternating, "gate_up_proj")
    assert found == replace(last, splits=(1, 1), repeats=3)


class Attention(nn.Module):
    def __init__(self, **layers: tuple[int, int]) -> None:
        super().__init__()
        for name, (outputs, inputs) in layers.items():
            self.add_module(name, nn.Linear(inputs, outputs, bias=False))


def test_heads_are_counted_by_the_configuration_around_a_layer() -> None:
    heads = {"num_attention_heads": 2, "hidden_size": 6}
    model = nn.ModuleDict(
        {
            "neox": Attention(query_key_value=(18, 6)),
            "grouped": Attention(qkv_proj=(12, 6), o_proj=(6, 6)),
            "wrapped": Attention(c_attn=(18, 6), c_proj=(6, 6)),
        }
    )
    model["neox"].config = SimpleNamespace(model_type="gpt_neox", **heads)
    model["grouped"].config = {**heads, "num_key_value_heads": 1}
    model["wrapped"].c_attn = nn.DataParallel(model["wrapped"].c_attn)
    rule = specops.SpectralNormalization(norm="reshaped")
    attachment = specops.attach(None, model, specops.Plan([("*.c_proj.*", None), ("*", rule)]))
    maps = attachment.geometries()
    assert maps["neox.query_key_value.weight"] == Dense(splits=(3, 3, 3), repeats=2)
    assert maps["grouped.qkv_proj.weight"] == Dense(splits=(6, 3, 3))
    assert maps["wrapped.c_attn.weight"] == Dense(splits=(6, 6, 6))
    for _ in range(30):
        attachment.step()
    used = attachment.weights()["neox.query_key_value.weight"].detach()
    for i in range(3):
        block = used.reshape(2, 3, 3, 6)[:, i].reshape(6, 6)
        assert float(torch.linalg.matrix_norm(block, 2)) == pytest.approx(1.0, abs=1e-4)
    attachment.detach()
    weights, single = specops_torch.weights_and_geometries(model)
    first = weights["neox.query_key_value.weight[0]"]
    raw = model["neox"].query_key_value.weight.detach()
    assert torch.equal(first, raw.reshape(2, 3, 3, 6)[:, 0].reshape(6, 6))
    assert set(single.values()) == {Dense()}
    assert sum(name.startswith("grouped.qkv_proj") for name in weights) == 3


def test_what_no_configuration_tells_apart_is_said_once() -> None:
    layers = [Attention(query_key_value=(18, 6)) for _ in range(3)]
    model = nn.ModuleList(layers)
    name = "0.query_key_value.weight"
    with pytest.warns(CautionWarning, match=f"{name} and 2 more: .*one matrix") as seen:
        attachment = specops.attach(None, model, CLIP)
    assert len(seen) == 1
    assert attachment.geometries()[name] == Dense()
    assert "one matrix" in attachment.report()[name].geometry
    attachment.detach()
    with pytest.warns(CautionWarning, match="and 2 more"):
        specops_torch.weights_and_geometries(model)
    told = {"*": Dense(splits=(3, 3, 3), repeats=2)}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        specops.attach(None, model, CLIP, geometries=told).detach()
        specops_torch.weights_and_geometries(model, geometries=told)
        specops.attach(None, model, specops.Plan([("1.*", None), ("[02].*", None)]))


class Own(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Parameter(torch.eye(3))


def test_most_matrices_left_alone_are_said_once() -> None:
    model = nn.Sequential(nn.Linear(3, 3), Own(), Own())
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with pytest.warns(CautionWarning, match=r"only 1 of 3 .*'\*\.mix' \(3, 3\)") as seen:
        specops.attach(optimizer, model, CLIP)
    assert seen[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.step()


def test_what_no_map_stands_for_is_not_told_to_be_declared_a_matrix() -> None:
    layers = (nn.Conv2d(2, 2, 3, padding=1, padding_mode="reflect") for _ in range(2))
    model = nn.Sequential(*layers, nn.Conv2d(2, 2, 1))
    with pytest.warns(CautionWarning, match="only 1 of 3 ") as seen:
        specops.attach(None, model, CLIP)
    (said,) = (str(w.message) for w in seen)
    assert "'*.weight' (2, 2, 3, 3)" in said
    assert "boundary='reflect' is not supported" in said
    assert "Dense" not in said
    assert "('*.weight', None)" not in said  # which would exclude the third layer, too


@pytest.mark.slow
def test_two_attachments_on_one_weight_are_said() -> None:
    model = nn.Linear(3, 3)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    first = specops.attach(optimizer, model, CLIP)
    for attach in (specops.attach, specops_torch.attach):
        with pytest.warns(CautionWarning, match=r"weight is under ClipSpectralNorm.* already"):
            attach(optimizer, model, specops.ClipSpectralNorm(2.0)).detach()
    # Other stages, other weights, and what is detached, are no contradiction.
    specops.attach(optimizer, model, specops.SpectralNormPenalty(0.1, norm="reshaped"))
    specops.project(model, CLIP)
    first.detach()
    specops.attach(optimizer, model, specops.ClipSpectralNorm(2.0))


def test_a_rule_that_has_not_acted_says_when_it_will() -> None:
    model = nn.Linear(3, 3)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    attachment = specops.attach(optimizer, model, CLIP, every=2)
    assert attachment.report()["weight"].waits is None
    optimizer.step()
    report = attachment.report()
    assert report["weight"].waits == 2
    assert "not before step 2" in str(report)
    optimizer.step()
    assert attachment.report()["weight"].waits is None


def test_what_is_printed_after_enforcing_is_inside_the_bound() -> None:
    torch.manual_seed(0)
    layers = (nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1, padding_mode="circular"))
    model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(512, 9))
    attachment = specops.attach(None, model, specops.ClipSpectralNorm(1.0))
    model(torch.randn(1, 8, 8, 8))
    attachment.enforce()
    assert all(row.norm <= 1.0 for row in attachment.report().constrained)


def test_queries_keys_and_values_of_a_convolution_are_said_to_be_one_map() -> None:
    model = nn.ModuleDict({"qkv": nn.Conv2d(4, 12, 1), "proj_out": nn.Conv2d(4, 4, 1)})
    with pytest.warns(CautionWarning, match=r"qkv\.weight: query, key and value .* one map"):
        attachment = specops.attach(None, model, CLIP)
    assert "one map" in attachment.report()["qkv.weight"].geometry
    assert "one map" not in attachment.report()["proj_out.weight"].geometry
