"""Networks of many kinds without their code: no value that differs from the layer's in silence."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import specops
from specops.inspection import WeightFigures

torch = pytest.importorskip("torch")
nn = torch.nn
Conv, Up, Norm = nn.Conv2d, nn.ConvTranspose2d, nn.BatchNorm2d


def named(**layers: Any) -> Any:
    return nn.ModuleDict(layers)


def densely(channels: int) -> Any:
    return named(norm=Norm(channels), conv=Conv(channels, 8, 1))


MODELS = {
    "densely connected": lambda: named(
        conv0=Conv(3, 16, 3), dense=nn.Sequential(densely(16), densely(24), densely(32))
    ),
    "U-Net, grey": lambda: named(
        inc=Conv(1, 8, 3), down=Conv(8, 16, 3), up=Up(16, 8, 2), merge=Conv(16, 8, 3),
        outc=Conv(8, 1, 1),
    ),
    "ResNeXt": lambda: named(
        conv1=Conv(3, 16, 3),
        layer1=nn.Sequential(
            named(conv1=Conv(16, 32, 1), conv2=Conv(32, 32, 3, groups=8), conv3=Conv(32, 16, 1))
        ),
    ),
    "generator, grey": lambda: nn.Sequential(
        Up(20, 8, 4, bias=False), Norm(8), Up(8, 4, 4, bias=False), Norm(4), Up(4, 1, 4, bias=False)
    ),
    "discriminator, grey": lambda: nn.Sequential(
        Conv(1, 8, 4, bias=False), Conv(8, 16, 4, bias=False), Norm(16), Conv(16, 1, 4, bias=False)
    ),
    "depthwise, grey": lambda: nn.Sequential(
        Conv(1, 8, 3), Conv(8, 8, 3, groups=8, bias=False), Conv(8, 16, 1),
        Conv(16, 16, 3, groups=16), Conv(16, 4, 1),
    ),
    "depthwise, coloured": lambda: nn.Sequential(
        Conv(3, 8, 3), Conv(8, 8, 3, groups=8), Conv(8, 16, 1)
    ),
    "grouped and transposed": lambda: nn.Sequential(
        Conv(3, 8, 3), Up(8, 8, 3, groups=8), Up(8, 4, 3, groups=2)
    ),
    "a multiplier": lambda: nn.Sequential(Conv(3, 8, 3), Conv(8, 16, 3, groups=8)),
    "a depthwise layer alone": lambda: nn.Sequential(Conv(8, 8, 3, groups=8)),
    "grouped 1×1": lambda: nn.Sequential(
        Conv(3, 12, 3), Conv(12, 12, 1, groups=3, bias=False), Conv(12, 12, 3, groups=12)
    ),
    "gated": lambda: named(
        start=nn.Conv1d(3, 8, 5), layers=nn.ModuleList(nn.Conv1d(8, 16, 3) for _ in range(2))
    ),
    "overlapping patches": lambda: named(patch_embed=named(proj=Conv(3, 8, 7, 4))),
    "audio": lambda: nn.Sequential(
        nn.Conv1d(1, 8, 40, 4), nn.BatchNorm1d(8), nn.Conv1d(8, 8, 3), nn.Conv1d(8, 12, 3)
    ),
    "video, grey": lambda: nn.Sequential(nn.Conv3d(1, 4, 2), nn.Conv3d(4, 4, 2, groups=4)),
    "autoencoder, grey": lambda: named(
        encoder=nn.Sequential(Conv(1, 8, 3), Conv(8, 4, 3)),
        decoder=nn.Sequential(Up(4, 8, 2), Up(8, 1, 2)),
    ),
}  # fmt: skip


def truth(model: Any, name: str) -> tuple[float, bool]:
    """(the layer's norm over all sizes, whether it has a stride)."""
    from specops_torch import geometry_of

    stem, _, last = name.rpartition(".")
    layer = model.get_submodule(stem)
    w = model.get_parameter(name).detach().double().numpy()
    plain = replace(
        geometry_of(layer, last),  # type: ignore[type-var]
        input_shape=None,
        padding="same",
        output_padding=0,
    )
    value = float(specops.spectral_norm_bounds(w, plain, rtol=1e-6).upper)
    return value, set(layer.stride) != {1}


def agrees(row: WeightFigures, value: float, strided: bool) -> None:
    assert row.figures is not None, row.skipped
    low, high = row.figures.ends
    assert value <= high * (1 + 1e-4), row.why
    assumed = ("stride 1 assumed" in row.why and strided) or "group assumed" in row.why
    assert value >= low * (1 - 1e-4) or assumed, row.why
    assert row.readings or high <= low * 1.01


@pytest.mark.parametrize("ordered", [True, False])
@pytest.mark.parametrize("kind", MODELS)
def test_values_are_those_of_the_layers(kind: str, ordered: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = MODELS[kind]()
    state = model.state_dict()
    if ordered:
        torch.save(state, tmp_path / "m")
    else:
        save = pytest.importorskip("safetensors.torch").save_file
        save(state, tmp_path / "m", metadata={"format": "pt"})
    rows = {w.name: w for w in specops.inspect(tmp_path / "m").weights}
    unsure = 0
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1:
            agrees(rows[name], *truth(model, name))
            unsure += bool(rows[name].readings) or "group assumed" in rows[name].why
    assert unsure <= (1 if ordered else 2)


@pytest.mark.parametrize(("taps", "stride"), [(3, 1), (3, 2), (5, 3), (4, 2), (2, 2)])
def test_transposed_layers_at_a_size_are_torchs(taps: int, stride: int, tmp_path: Path) -> None:
    padding, more = (taps // 2, stride - 1) if taps % 2 else ((taps - stride) // 2, 0)
    layer = Up(3, 2, taps, stride, padding, output_padding=more).double()
    torch.save({f"up.{name}": value for name, value in layer.state_dict().items()}, tmp_path / "m")
    row = specops.inspect(tmp_path / "m", input_size=5, stride=stride).measured[0]
    units = torch.eye(75).double().reshape(75, 3, 5, 5)
    with torch.no_grad():
        matrix = (layer(units) - layer(0 * units)).reshape(75, -1).numpy()
    assert row.figures is not None
    np.testing.assert_allclose(row.figures.spectrum, np.linalg.svd(matrix)[1], atol=1e-9)
    assert "padding" in row.why
    assert "assumed" in row.why


@pytest.mark.parametrize(("stride", "given"), [(2, 0), (2, 2), (1, 0)])
def test_two_sizes_imply_the_stride(stride: int, given: int, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    state = {"c1.weight": rng.normal(size=(4, 3, 3, 3)), "c2.weight": rng.normal(size=(4, 4, 3, 3))}
    torch.save({k: torch.from_numpy(v) for k, v in state.items()}, tmp_path / "m")
    sizes = {"c1*": (8, 8), "c2*": (8 // stride, 8 // stride)}
    found = specops.inspect(
        tmp_path / "m", input_size=sizes, stride={"c1*": given} if given else None
    )
    row = next(w for w in found.measured if w.name == "c1.weight")
    layer = specops.Conv((8, 8), stride=stride, padding=1)
    wanted = float(specops.spectral_norm(state["c1.weight"], layer))
    decided = given or stride == 1
    assert bool(row.readings) is not bool(decided)
    figures = row.figures if decided else row.readings[0].figures
    assert figures is not None
    assert figures.sigma_max == pytest.approx(wanted, rel=1e-6)
    assert f"stride {stride}" in row.geometry


def test_what_feeds_a_stem_is_no_layer_of_another_tower(tmp_path: Path) -> None:
    save = pytest.importorskip("safetensors.torch").save_file
    audio = nn.Sequential(Conv(1, 16, 3), Conv(16, 16, 3, groups=16))
    model = named(embed=named(audio=named(conv=audio), image=named(proj=Conv(3, 16, 4))))
    save(model.state_dict(), tmp_path / "m", metadata={"format": "pt"})
    rows = {w.name: w for w in specops.inspect(tmp_path / "m").measured}
    stem = rows["embed.audio.conv.0.weight"]
    agrees(stem, *truth(model, stem.name))
    assert stem.readings
