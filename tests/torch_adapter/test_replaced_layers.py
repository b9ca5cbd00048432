"""Layers that are replaced, added, unfrozen or freed of another tool while an attachment acts."""

from __future__ import annotations

from typing import Any

import pytest

import specops
from specops import ClipSpectralNorm, SpectralNormalization
from specops.errors import AdapterError, CautionWarning
from tests.torch_adapter.models import top

torch = pytest.importorskip("torch")
from torch import nn  # noqa: E402
from torch.nn.utils import parametrizations, prune  # noqa: E402

RULES = [ClipSpectralNorm(0.4), SpectralNormalization(norm="reshaped", scale=0.4)]


def norm_in_use(layer: Any) -> float:
    return float(top(layer.weight.detach()))


class Run:
    """A network whose steps an attachment follows, by an optimizer's hooks or by hand."""

    def __init__(self, rule: Any, *, by_hand: bool = False) -> None:
        self.model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8))
        for layer in self.model[::2]:
            nn.init.orthogonal_(layer.weight, 2.0)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.01)
        self.attachment = specops.attach(None if by_hand else self.optimizer, self.model, rule)
        self.by_hand = by_hand

    def step(self) -> None:
        self.optimizer.zero_grad()
        self.model(torch.randn(5, 6)).square().mean().backward()
        self.optimizer.step()
        if self.by_hand:
            self.attachment.step()


@pytest.mark.parametrize("rule", RULES, ids=["weights", "forward"])
def test_a_new_head_outside_the_optimizer_is_said_and_the_old_one_is_not_reported(
    rule: Any,
) -> None:
    run = Run(rule)
    run.step()
    run.model[2] = nn.Linear(8, 3)
    with pytest.warns(CautionWarning, match=r"2\.weight was replaced.*add_param_group") as said:
        run.step()
    assert len(said) == 1
    assert said[0].filename == __file__
    run.step()  # said once: warnings are errors here
    assert run.attachment.report()["2.weight"].reason == "not in this optimizer"
    assert run.attachment.weights().keys() == {"0.weight"}
    assert run.attachment.state_dict()["weights"].keys() == {"0.weight"}
    run.optimizer.add_param_group({"params": list(run.model[2].parameters())})
    run.step()
    assert norm_in_use(run.model[2]) == pytest.approx(0.4, rel=0.02)


@pytest.mark.parametrize("rule", RULES, ids=["weights", "forward"])
def test_steps_by_hand_find_layers_that_are_new(rule: Any) -> None:
    run = Run(rule, by_hand=True)
    run.step()
    run.model[2] = nn.Linear(8, 8)
    run.model.append(nn.Linear(8, 3))
    for layer in run.model[2:]:
        nn.init.orthogonal_(layer.weight, 2.0)
    run.step()
    assert [norm_in_use(layer) for layer in run.model[2:]] == pytest.approx([0.4, 0.4], rel=0.02)
    assert run.attachment.weights()["2.weight"].shape == (8, 8)
    run.attachment.load_state_dict(run.attachment.state_dict())


@pytest.mark.parametrize("by_hand", [True, False])
def test_layers_that_are_unfrozen_are_not_called_frozen(by_hand: bool) -> None:
    rule = RULES[0]
    model = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 8))
    model[0].requires_grad_(False)
    optimizer = torch.optim.SGD(model[1].parameters(), lr=0.01)
    attachment = specops.attach(None if by_hand else optimizer, model, rule)
    model[0].requires_grad_(True)
    optimizer.step()
    if by_hand:
        attachment.step()
    row = attachment.report()["0.weight"]
    assert row.reason == ("" if by_hand else "not in this optimizer")
    assert (norm_in_use(model[0]) <= 0.4001) == by_hand


@pytest.mark.parametrize("rule", RULES, ids=["weights", "forward"])
def test_a_pruned_layer_comes_under_the_rule_when_pruning_is_made_permanent(rule: Any) -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 8))
    prune.l1_unstructured(model[1], "weight", 0.5)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    attachment = specops.attach(optimizer, model, rule)
    optimizer.step()
    assert "reparametrised" in attachment.report()["1.weight_orig"].reason
    prune.remove(model[1], "weight")
    optimizer.step()
    assert attachment.report()["1.weight"].rule
    assert norm_in_use(model[1]) == pytest.approx(0.4, rel=0.02)


@pytest.mark.parametrize("rule", RULES, ids=["weights", "forward"])
@pytest.mark.parametrize("by_hand", [True, False])
def test_a_weight_that_was_reparametrised_is_still_an_error(rule: Any, by_hand: bool) -> None:
    run = Run(rule, by_hand=by_hand)
    run.step()
    parametrizations.weight_norm(run.model[2])
    run.optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(1))]})
    with pytest.raises(AdapterError, match=r"2\.weight is no parameter any more"):
        run.step()


@pytest.mark.parametrize("rule", RULES, ids=["weights", "forward"])
@pytest.mark.parametrize("by_hand", [True, False])
def test_layers_that_are_frozen_in_turns_keep_their_rules_and_states(
    rule: Any, by_hand: bool
) -> None:
    """As the two networks of a GAN are: a state that is saved at any time can be loaded."""
    run = Run(rule, by_hand=by_hand)
    run.step()
    for frozen, trained in ((0, 2), (2, 0)) * 2:
        run.model[frozen].requires_grad_(False)
        run.model[trained].requires_grad_(True)
        run.step()
        assert run.attachment.state_dict()["weights"].keys() == {"0.weight", "2.weight"}
        assert all(run.attachment.report()[f"{i}.weight"].rule for i in (0, 2))
        assert norm_in_use(run.model[trained]) == pytest.approx(0.4, rel=0.02)


def test_modules_without_parameters_may_come_with_each_forward_pass(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run = Run(RULES[0])
    run.step()
    decided: list[bool] = []
    monkeypatch.setattr(run.attachment, "assign", lambda: decided.append(True))
    for _ in range(2):
        run.model[1] = nn.Tanh()
        run.step()
    assert not decided
    run.model[2] = nn.Linear(8, 3)
    run.step()
    assert decided


class Walked(dict[str, Any]):
    """The children of a module, which are not asked for without end."""

    asked = 0

    def values(self) -> Any:
        self.asked += 1
        assert self.asked < 50, "the same module was walked through again and again"
        return super().values()


def test_a_layer_may_come_to_hold_the_model_that_holds_it() -> None:
    run = Run(RULES[0])
    run.model[2].owner = run.model
    run.model._modules = Walked(run.model._modules)
    for _ in range(2):
        run.step()
    assert [norm_in_use(run.model[i]) for i in (0, 2)] == pytest.approx([0.4, 0.4], rel=0.02)


@pytest.mark.parametrize("rule", RULES, ids=["weights", "forward"])
def test_a_layer_that_was_taken_out_is_not_reported(rule: Any) -> None:
    run = Run(rule)
    run.step()
    run.model[2] = nn.Linear(8, 3).requires_grad_(False)
    run.step()
    assert run.attachment.report()["2.weight"].reason.startswith("frozen")
    del run.model[2]
    run.step()
    assert run.attachment.weights().keys() == {"0.weight"}
    with pytest.raises(KeyError):
        run.attachment.report()["2.weight"]
