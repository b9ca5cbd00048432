"""Layers of other libraries, two attachments on one weight, reports of rules that wait."""

from __future__ import annotations

import warnings
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
        self.experts, self.gate = TinyExperts(False), TinyRouter()


def test_of_transformers_are_constrained() -> None:
    model = nn.ModuleDict({"h": nn.ModuleList([Block()])})
    attachment = specops.attach(None, model, CLIP)
    maps = attachment.geometries()
    assert maps["h.0.c_attn.weight"] == Dense(out_axes=(-1,), splits=(4, 4, 4))
    assert maps["h.0.c_fc.weight"] == Dense(out_axes=(-1,))
    assert maps["h.0.experts.gate_up_proj"] == Dense(out_axes=(1,), batch_axes=(0,))
    assert maps["h.0.gate.weight"] == Dense()
    assert len(maps) == 5
    attachment.enforce()
    block = model["h"][0]
    for part in block.c_attn.weight.detach().split(4, dim=1):
        assert torch.linalg.matrix_norm(part, 2) <= 0.5
    assert (torch.linalg.matrix_norm(block.experts.down_proj.detach(), 2) <= 0.5).all()


def test_which_axis_of_experts_is_that_of_outputs() -> None:
    last = Dense(out_axes=(2,), batch_axes=(0,))
    for name in ("gate_up_proj", "down_proj"):
        assert specops_torch.geometry_of(TinyExperts(True), name) == last
        with pytest.raises(specops.errors.SpecopsError, match="which axis"):
            specops_torch.geometry_of(TinyExperts(None, hidden=4, inner=4), "down_proj")
    said = TinyExperts(None, hidden=4, inner=4)
    said.is_transposed = True
    assert specops_torch.geometry_of(said, "down_proj") == last


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
