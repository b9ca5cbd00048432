"""What a report says of a reshaped kernel, and rules that wait for the size of an input."""

from __future__ import annotations

import warnings

import numpy as np
import pytest

import specops
from specops import (
    ClipAndCut,
    ClipSpectralNorm,
    Conv,
    NormalizeIfAbove,
    SpectralNormalization,
    errors,
)

torch = pytest.importorskip("torch")
from torch import nn  # noqa: E402

from tests import oracle  # noqa: E402


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.Flatten(), nn.Linear(8 * 36, 4))


def reshaped_norm(layer: nn.Conv2d) -> float:
    return float(torch.linalg.matrix_norm(layer.weight.detach().double().flatten(1), 2))


@pytest.mark.parametrize("kind", [ClipSpectralNorm, NormalizeIfAbove])
def test_reports_and_enforce_speak_of_the_reshaped_kernel(kind: type) -> None:
    model = network()
    attachment = specops.attach(None, model, kind(0.05, norm="reshaped"))
    row = attachment.report()["0.weight"]
    assert row.rule_norm == pytest.approx(reshaped_norm(model[0]), rel=1e-5)
    attachment.enforce()
    report = attachment.report()
    row = report["0.weight"]
    assert row.rule_norm == pytest.approx(0.05, rel=1e-5)
    assert reshaped_norm(model[0]) == pytest.approx(0.05, rel=1e-5)
    # The layer's own is another, and a matrix has one only.
    assert row.norm is not None
    assert row.norm > 1.2 * 0.05
    assert report["2.weight"].rule_norm is None
    assert "rule's norm" in str(report)
    assert "norm='reshaped'" in row.rule
    assert [r["norm_after"] for r in attachment.history] == pytest.approx([0.05] * 2, rel=1e-5)
    attachment.detach()
    plain = specops.attach(None, model, ClipSpectralNorm(0.05)).report()
    assert "rule's norm" not in str(plain)
    assert plain["0.weight"].rule_norm is None


def test_one_round_waits_for_an_input_and_says_so() -> None:
    model = network()
    before = model[0].weight.detach().clone()
    attachment = specops.attach(None, model, ClipAndCut(0.1))
    with pytest.warns(errors.CautionWarning, match=r"0\.weight is left as it is.*input_shape"):
        attachment.enforce()
    assert torch.equal(model[0].weight, before)
    report = attachment.report()
    assert [row.name for row in report if row.idle] == ["0.weight"]
    assert "– its layer has seen no input yet, under ClipAndCut" in str(report)
    matrix = model[2].weight.detach()
    assert float(torch.linalg.matrix_norm(matrix, 2)) == pytest.approx(0.1, rel=1e-5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        attachment.enforce()  # once is enough
        model(torch.ones(1, 3, 6, 6))
        attachment.enforce()
    assert not any(row.idle for row in attachment.report())
    torus = Conv((6, 6), boundary="circular")
    expected = specops.clip_singular_values(before.double(), 0.0, 0.1, torus)
    torch.testing.assert_close(model[0].weight.detach().double(), expected, atol=1e-6, rtol=0)
    last = attachment.history[-2]
    assert last["name"] == "0.weight"
    own = oracle.spectrum(np.asarray(expected), torus)[0]
    assert last["norm_after"] == pytest.approx(own, rel=1e-4)
    assert own > 0.1


def test_projecting_without_a_size_warns() -> None:
    model = network()
    with pytest.warns(errors.CautionWarning, match=r"0\.weight is left as it is"):
        specops.project(model, ClipAndCut(0.1))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        specops.project(model, ClipAndCut(0.1), geometries={"0.weight": Conv((6, 6), padding=1)})
        specops.project(model, ClipSpectralNorm(0.1))


@pytest.mark.parametrize("dynamic", [False, True])
def test_a_compiled_layer_that_meets_other_inputs_than_declared_says_so(dynamic: bool) -> None:
    """In one graph, which the warning does not break."""
    torch._dynamo.reset()
    layer = nn.Conv2d(2, 2, 3, padding=1)
    declared = {"weight": Conv((4, 4), padding=1)}
    specops.attach(None, layer, ClipSpectralNorm(1.0), geometries=declared)
    compiled = torch.compile(layer, backend="eager", fullgraph=True, dynamic=dynamic)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        compiled(torch.zeros(1, 2, 4, 4))
    x = torch.randn(1, 2, 9, 9)
    with pytest.warns(errors.CautionWarning, match=r"declared as conv 4×4.*of another size"):
        y = compiled(x)
    torch.testing.assert_close(y, layer(x))


@pytest.mark.parametrize("how", ["assigned", "loaded"])
def test_a_parameter_takes_the_place_of_one_whose_layer_has_not_run(how: str) -> None:
    """What the layer will use is not asked for: it depends on the size of an input."""
    layer = nn.Conv2d(2, 3, 3, padding=1, bias=False)
    specops.attach(None, layer, SpectralNormalization(norm="operator"))
    kernel = nn.Parameter(torch.randn(3, 2, 3, 3))
    if how == "assigned":
        layer.weight = kernel
    else:
        layer.load_state_dict({"weight": kernel}, assign=True)
    assert layer._parameters["weight"] is kernel
    layer(torch.zeros(1, 2, 6, 6))
    used = layer.weight.detach().double().numpy()
    assert specops.spectral_norm(used, Conv((6, 6), padding=1)) == pytest.approx(1.0, rel=1e-4)


@pytest.mark.parametrize("prepared", [False, True])
def test_a_step_before_the_layer_has_run_leaves_its_norm_to_its_first_input(prepared: bool) -> None:
    """As of a discriminator while the generator trains: its raw weight was in use afterwards."""
    torch.manual_seed(0)
    layer = nn.Conv2d(3, 4, 3, padding=1, bias=False)
    attachment = specops.attach(None, layer, SpectralNormalization(norm="operator"), every=5)
    if prepared:
        attachment.before_step()
    attachment.step()
    layer(torch.ones(1, 3, 6, 6))
    (geometry,) = attachment.geometries().values()
    kernel = np.asarray(layer.weight.detach())
    assert oracle.spectrum(kernel, geometry)[0] == pytest.approx(1.0, rel=1e-3)
