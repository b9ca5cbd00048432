"""Layers that are inserted, taken out, swapped or tied while an attachment acts."""

from __future__ import annotations

from typing import Any

import pytest

import specops
from specops import ClipSpectralNorm, Plan, SpectralNormalization, TrainableScale
from tests.torch_adapter.models import top

torch = pytest.importorskip("torch")
from torch import nn  # noqa: E402

TRAINED = SpectralNormalization(norm="reshaped", scale=TrainableScale(1.5))


def test_scales_stay_with_their_layers_where_layers_come_and_go() -> None:
    """As a discriminator grows at its front: the layers behind have other names since."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    attachment = specops.attach(optimizer, model, TRAINED)
    first, second = model
    with torch.no_grad():
        for value, scale in zip((2.0, 3.0), attachment.scales.values(), strict=True):
            scale.fill_(value)

    def scales() -> list[float]:
        optimizer.zero_grad()
        optimizer.step()
        norms = [float(top(layer.weight.detach())) for layer in model]
        held = [attachment.scales[f"{i}.weight"] for i in range(len(model))]
        assert norms == pytest.approx([float(s.detach()) for s in held], rel=0.02)
        return [round(norm, 1) for norm in norms]

    assert scales() == [2.0, 3.0]
    model.insert(0, nn.Linear(4, 4))
    optimizer.add_param_group({"params": list(model[0].parameters())})
    assert scales() == [1.5, 2.0, 3.0]
    assert model[1] is first
    del model[0]
    optimizer.add_param_group({"params": nn.Parameter(torch.zeros(1))})
    assert scales() == [2.0, 3.0]
    model.append(nn.Linear(4, 4))
    optimizer.add_param_group({"params": list(model[2].parameters())})
    assert scales() == [2.0, 3.0, 1.5]
    assert model[1] is second


def test_layers_keep_their_rules_under_other_names() -> None:
    """Inserted, taken out, frozen and thawed: a layer goes on with its vectors."""
    model = nn.Sequential(*(nn.Linear(6, 6) for _ in range(3)))
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    rule = SpectralNormalization(norm="reshaped")
    attachment = specops.attach(optimizer, model, Plan([("*", rule)]))

    def stepped(new: nn.Module | None = None) -> set[str]:
        optimizer.add_param_group({"params": [*new.parameters()] if new else [torch.zeros(1)]})
        before = {
            id(c.location.module): c.in_use.state["u0"].clone() for c in attachment._constrained
        }
        train_plainly(model, optimizer)
        for c in attachment._constrained:
            known = before.get(id(c.location.module))
            if known is not None:
                assert abs(float(torch.dot(known, c.in_use.state["u0"]))) > 0.99
        assert all(float(top(m.weight.detach())) == pytest.approx(1.0, rel=0.02) for m in model)
        attachment.load_state_dict(attachment.state_dict())
        assert attachment.weights().keys() == attachment.geometries().keys()
        return set(attachment.weights())

    assert stepped() == {"0.weight", "1.weight", "2.weight"}
    del model[0]
    assert stepped() == {"0.weight", "1.weight"}
    model[0].requires_grad_(False)
    model.insert(0, nn.Linear(6, 6))
    assert stepped(model[0]) == {"0.weight", "1.weight", "2.weight"}
    model[1].requires_grad_(True)
    model[0], model[2] = model[2], model[0]
    assert stepped() == {"0.weight", "1.weight", "2.weight"}
    other = Plan([("0.*", rule), ("*", ClipSpectralNorm(2.0))])
    attachment.detach()
    attachment = specops.attach(optimizer, model, other)
    model[0], model[1] = model[1], model[0]
    optimizer.add_param_group({"params": [torch.zeros(1)]})
    train_plainly(model, optimizer)
    stages = {c.name: c.stage for c in attachment._constrained}
    assert stages == {"0.weight": "forward", "1.weight": "weights", "2.weight": "weights"}


@pytest.mark.parametrize("gone", [0, 2])
def test_the_scale_of_a_layer_that_was_taken_out_goes_with_it(gone: int) -> None:
    model = nn.Sequential(*(nn.Linear(6, 6) for _ in range(3)))
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    attachment = specops.attach(optimizer, model, TRAINED)
    train_plainly(model, optimizer)
    del model[gone]
    optimizer.add_param_group({"params": [torch.zeros(1)]})
    train_plainly(model, optimizer)
    assert attachment.scales.keys() == attachment.weights().keys() == {"0.weight", "1.weight"}
    state = attachment.state_dict()
    attachment.detach()
    assert all("name" not in group for group in optimizer.param_groups)
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert {id(p) for p in optimizer.state} <= held
    optimizer.state_dict()
    again = specops.attach(optimizer, model, TRAINED)
    again.load_state_dict(state)
    assert again.scales == attachment.scales


@pytest.mark.parametrize("how", ["swapped", "taken out", "parted", "joined"])
def test_layers_of_one_weight_may_move_apart(how: str) -> None:
    """Another of them may be the first that the model lists."""
    model = nn.Sequential(*(nn.Linear(6, 6) for _ in range(3)))
    for layer in model:
        nn.init.normal_(layer.weight)
    model[1].weight = model[0].weight
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    attachment = specops.attach(optimizer, model, SpectralNormalization(norm="reshaped"))
    train_plainly(model, optimizer)
    new = nn.Parameter(torch.randn(6, 6))
    if how == "swapped":
        model[0], model[1] = model[1], model[0]
    elif how == "taken out":
        del model[0]
    elif how == "parted":
        model[0]._parameters["weight"] = new
    else:
        model[2]._parameters["weight"] = model[0]._parameters["weight"]
    optimizer.add_param_group({"params": [new]})
    train_plainly(model, optimizer)
    distinct = {id(layer._parameters["weight"]) for layer in model}
    assert len(attachment.weights()) == len(distinct)
    assert all(float(top(m.weight.detach())) == pytest.approx(1.0, rel=0.02) for m in model)
    attachment.detach()
    assert all(type(layer) is nn.Linear for layer in model)


def test_a_convolution_that_was_tied_since_is_bounded_at_what_it_meets() -> None:
    first, second = (nn.Conv2d(2, 2, 3, padding=1, bias=False) for _ in range(2))
    model = nn.ModuleList([first, second])
    optimizer = torch.optim.SGD(model.parameters(), 0.0)
    attachment = specops.attach(optimizer, model, Plan([("0.*", ClipSpectralNorm(0.5))]))
    first(torch.zeros(1, 2, 4, 4))
    second.weight = first.weight
    optimizer.add_param_group({"params": [torch.zeros(1)]})
    optimizer.step()
    first(torch.zeros(1, 2, 4, 4))
    second(torch.zeros(1, 2, 9, 8))
    optimizer.step()
    assert attachment.geometries()["0.weight"].grid == (9, 8)
    second.weight = nn.Parameter(torch.zeros(2, 2, 3, 3))
    optimizer.add_param_group({"params": [torch.zeros(1)]})
    optimizer.step()
    assert not second._forward_hooks
    attachment.detach()
    assert not first._forward_hooks


def test_a_layer_that_was_parted_from_a_frozen_one_has_a_rule_of_its_own() -> None:
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
    model[1].weight = model[0].weight
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    attachment = specops.attach(optimizer, model, SpectralNormalization(norm="reshaped"))
    train_plainly(model, optimizer)
    model[0].weight.requires_grad_(False)
    new = nn.Parameter(torch.randn(6, 6))
    model[1]._parameters["weight"] = new
    optimizer.add_param_group({"params": [new]})
    train_plainly(model, optimizer)
    assert attachment.weights().keys() == {"0.weight", "1.weight"}
    assert all(float(top(m.weight.detach())) == pytest.approx(1.0, rel=0.02) for m in model)
    for layer in model:
        layer.requires_grad_(True)
        with pytest.raises(specops.errors.AdapterError, match="under a forward rule already"):
            specops.attach(None, layer, SpectralNormalization(norm="reshaped"))
    attachment.detach()
    assert all(type(layer) is nn.Linear for layer in model)


@pytest.mark.parametrize("frozen", [False, True])
def test_a_weight_that_was_replaced_is_measured_where_a_run_resumes(frozen: bool) -> None:
    layer = nn.Linear(6, 6)
    attachment = specops.attach(None, layer, SpectralNormalization(norm="reshaped"))
    layer.weight = nn.Parameter(torch.randn(6, 6), requires_grad=not frozen)
    assert float(top(layer.weight.detach())) == pytest.approx(1.0, rel=1e-3)
    attachment.load_state_dict(attachment.state_dict())
    assert float(top(layer.weight.detach())) == pytest.approx(1.0, rel=1e-3)


@pytest.mark.parametrize("every", [1, 4])
@pytest.mark.parametrize("how", ["assigned", "loaded", "alone"])
def test_a_weight_that_was_exchanged_is_measured_where_steps_are_called(
    how: str, every: int
) -> None:
    """Its vectors would turn from those of the old weight: 1.3 for 1 right after the step."""
    torch.manual_seed(0)
    layer = nn.Linear(12, 8, bias=False)
    rule = SpectralNormalization(norm="reshaped")
    attachment = specops.attach(None, layer, rule, every=every)
    layer.load_state_dict({"weight": torch.randn(8, 12)}, assign=how != "loaded")
    for _ in range(4):
        weight = dict(layer.named_parameters())["weight"]
        alone = (weight,) if how == "alone" else ()
        attachment.before_step(*alone)
        with torch.no_grad():
            weight.mul_(0.99)
        attachment.step(*alone)
        assert float(top(layer.weight.detach())) == pytest.approx(1.0, rel=1e-3)


def test_a_declared_map_stays_with_its_name() -> None:
    """Of a layer behind one that was inserted nobody has said a size: what it meets counts."""
    model = nn.Sequential(nn.Conv2d(2, 2, 3, padding=1, bias=False))
    optimizer = torch.optim.SGD(model.parameters(), 0.0)
    declared = specops.Conv((4, 4), padding=1)
    rule = ClipSpectralNorm(0.5)
    attachment = specops.attach(optimizer, model, rule, geometries={"0.*": declared})
    model.insert(0, nn.Conv2d(2, 2, 3, padding=1, bias=False))
    optimizer.add_param_group({"params": [model[0].weight]})
    optimizer.step()
    with pytest.warns(specops.errors.CautionWarning, match=r"^0\.weight was declared as conv 4×4"):
        model(torch.zeros(1, 2, 9, 9))
    optimizer.step()
    model(torch.zeros(1, 2, 9, 9))
    grids = {name: g.grid for name, g in attachment.geometries().items()}
    assert grids == {"0.weight": (4, 4), "1.weight": (9, 9)}


def test_an_error_on_the_way_leaves_rules_as_they_were() -> None:
    """Of a layer that comes to be under another rule, before one that is refused."""
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
    one, two = (SpectralNormalization(norm="reshaped", scale=s) for s in (1.0, 2.0))
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    plan = Plan([("0.*", one), ("1.*", two), ("*", Stageless())])
    specops.attach(optimizer, model, plan)
    model[0], model[1] = model[1], model[0]
    extra = nn.Linear(6, 6)
    model.append(extra)
    optimizer.add_param_group({"params": list(extra.parameters())})
    with pytest.raises(specops.errors.AdapterError, match="Stageless"):
        train_plainly(model, optimizer)
    norms = [float(top(layer.weight.detach())) for layer in model[:2]]
    assert norms == pytest.approx([2.0, 1.0], rel=0.05)


class Stageless:
    """A rule that no adapter runs."""

    stage: Any = "elsewhere"

    def init(self, weight: Any, geometry: Any, name: str) -> dict[str, Any]:
        return {}

    def update(self, weight: Any, geometry: Any, state: Any, **_: Any) -> Any:
        return weight, state, {}


def train_plainly(model: nn.Module, optimizer: Any) -> None:
    """One step."""
    optimizer.zero_grad()
    model(torch.ones(2, 6)).square().mean().backward()
    optimizer.step()
