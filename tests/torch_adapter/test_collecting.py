"""All weights of a model and their maps, for functions on arrays."""

from __future__ import annotations

import math
from typing import Any

import pytest

torch = pytest.importorskip("torch")
from torch import nn  # noqa: E402

import specops  # noqa: E402
from specops import Conv, Dense, measures  # noqa: E402
from specops.errors import AdapterError, CautionWarning, GeometryError  # noqa: E402
from specops_torch import weights_and_geometries  # noqa: E402
from tests.measures.test_torch import matrix_of  # noqa: E402


def test_complexities_of_a_model_are_those_of_its_matrices() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(2, 3, 3, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(3),
        nn.ReLU(),
        nn.ConvTranspose2d(3, 2, 2, bias=False),
        nn.Flatten(),
        nn.Linear(32, 3, bias=False),
    ).double()
    model[5].weight.requires_grad_(False)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    weights, maps = weights_and_geometries(model, torch.randn(4, 2, 6, 5, dtype=torch.float64))
    assert list(weights) == list(maps) == ["0.weight", "3.weight", "5.weight"]
    assert not any(w.requires_grad for w in weights.values())
    assert all(m.training for m in model.modules())
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    shapes = ((2, 6, 5), (3, 3, 3), (32,))
    matrices = [
        torch.from_numpy(matrix_of(model[i], s)) for i, s in zip((0, 3, 5), shapes, strict=True)
    ]
    for measure in (measures.log_spec_fro, measures.log_spec_l1):
        found = measure(weights, 0.5, maps)
        assert found == pytest.approx(measure(matrices, 0.5), rel=1e-6)
        reordered = {name: maps[name] for name in reversed(maps)}
        assert measure(weights, 0.5, reordered) == found
        assert measure(weights, 0.5, list(maps.values())) == found
    with pytest.raises(ValueError, match="different names"):
        measures.log_spec_fro(weights, 1.0, {**dict(list(maps.items())[1:]), "other": Dense()})
    with pytest.raises(ValueError, match="need weights by name"):
        measures.log_spec_fro(list(weights.values()), 1.0, maps)
    any_size = weights_and_geometries(model)[1]
    assert "any size" in any_size["0.weight"].describe()


def spectral(layer: nn.Module) -> nn.Module:
    return nn.utils.parametrizations.spectral_norm(layer)


@pytest.mark.parametrize("kind", ["rule", "weight norm", "spectral norm", "parametrization"])
@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
def test_weights_are_those_in_use(kind: str) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(6, 6, bias=False)
    model = nn.Sequential(layer).train()
    if kind == "rule":
        specops.attach(None, model, specops.SpectralNormalization(norm="operator"))
    elif kind == "weight norm":
        nn.utils.weight_norm(layer)
        layer.weight_g.data *= 10.0
    elif kind == "spectral norm":
        nn.utils.spectral_norm(layer)
        layer.weight_orig.data *= 4.0
    else:
        spectral(layer)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    weights, maps = weights_and_geometries(model)
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert (list(weights), maps) == (["0.weight"], {"0.weight": Dense()})
    with torch.no_grad():
        used = model.eval()(torch.eye(6)).T
    torch.testing.assert_close(weights["0.weight"], used)


class Language(nn.Module):
    """An embedding tied to the last layer, gates, attention, and an array that nobody knows."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(7, 4)
        self.mixing = nn.MultiheadAttention(4, 2)
        self.memory = nn.LSTM(4, 4)
        self.head = nn.Linear(4, 7, bias=False)
        self.head.weight = self.table.weight
        self.bilinear = nn.Parameter(torch.ones(2, 3, 4))


def test_fused_tied_and_unknown_weights() -> None:
    model = Language()
    with pytest.warns(CautionWarning, match=r"(?s)bilinear: no geometry.*table\.weight: an embed"):
        weights, maps = weights_and_geometries(model)
    names = [f"mixing.in_proj_weight[{i}]" for i in range(3)] + ["mixing.out_proj.weight"]
    names += [f"memory.weight_{kind}_l0[{i}]" for kind in ("ih", "hh") for i in range(4)]
    assert sorted(weights) == sorted([*names, "head.weight"])
    assert math.isfinite(measures.log_spec_fro(weights, 1.0, maps))
    torch.testing.assert_close(weights["memory.weight_hh_l0[1]"], model.memory.weight_hh_l0[4:8])
    given: dict[str, Any] = {"bili*": Dense((1,), (2,), (0,)), "table.*": Dense()}
    weights, maps = weights_and_geometries(model, geometries=given)
    assert maps["bilinear"] == given["bili*"]
    assert "table.weight" in weights
    assert "head.weight" not in weights
    with pytest.raises(AdapterError, match=r"names no weight: 'missing\.\*'"):
        weights_and_geometries(nn.Linear(2, 2), geometries={"missing.*": Dense()})
    with pytest.raises(AdapterError, match="lazy"):
        weights_and_geometries(nn.LazyLinear(2))
    for wrong in (Conv(None), Dense(batch_axes=(2,)), Dense(splits=(1, 2))):
        with pytest.raises(GeometryError, match="weight, geometries="):
            weights_and_geometries(nn.Linear(2, 2), geometries={"weight": wrong})
