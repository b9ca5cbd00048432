"""Runs that resume under another rule, and trainers that are copied as a whole."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import pytest

import specops
from specops import ClipSpectralNorm, SpectralNormalization, SpectralNormPenalty
from specops.errors import AdapterError, HookLostWarning
from tests.torch_adapter.models import top

torch = pytest.importorskip("torch")
from torch import nn  # noqa: E402

RESHAPED = SpectralNormalization(norm="reshaped", scale=0.7)
OPERATOR = SpectralNormalization(norm="operator", scale=0.7)
BOTH_WAYS = SpectralNormalization(norm="bidirectional", scale=0.7)
PENALTY = SpectralNormPenalty(0.01, norm="reshaped")


def trainer(rule: Any) -> Any:
    model = nn.Sequential(nn.Conv2d(1, 2, 3, padding=1), nn.Flatten(), nn.Linear(32, 3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    attachment = specops.attach(optimizer, model, rule)
    return SimpleNamespace(model=model, optimizer=optimizer, attachment=attachment)


def train(run: Any, steps: int = 3) -> None:
    for _ in range(steps):
        run.optimizer.zero_grad()
        run.model(torch.randn(4, 1, 4, 4)).square().mean().backward()
        run.optimizer.step()


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (RESHAPED, OPERATOR),
        (BOTH_WAYS, OPERATOR),
        (RESHAPED, BOTH_WAYS),
        (ClipSpectralNorm(0.4), OPERATOR),
        (ClipSpectralNorm(0.4), PENALTY),
        (OPERATOR, PENALTY),
    ],
)
def test_a_state_of_another_rule_is_refused_and_changes_nothing(old: Any, new: Any) -> None:
    """Before the first input there is no state to compare with."""
    before, run = trainer(old), trainer(new)
    train(before)
    with pytest.raises(AdapterError, match=r"0\.weight: the state has .* under another rule"):
        run.attachment.load_state_dict(before.attachment.state_dict())
    assert run.attachment.steps == 0
    train(run)
    assert all(record["step"] in (1, 2, 3) for record in run.attachment.history)


@pytest.mark.parametrize("rule", [ClipSpectralNorm(0.4), RESHAPED], ids=["weights", "forward"])
def test_a_trainer_copied_as_a_whole_says_that_no_step_reaches_it(rule: Any) -> None:
    run = trainer(rule)
    train(run)
    other = copy.deepcopy(run)
    train(other)
    with pytest.warns(HookLostWarning, match="no step reaches this attachment, .* step 3"):
        state = other.attachment.state_dict()
    run.attachment.state_dict()  # warnings are errors here
    other.attachment.detach()
    other.attachment = specops.attach(other.optimizer, other.model, rule)
    other.attachment.load_state_dict(state)
    train(other)
    train(run)
    for each in (other, run):
        assert each.attachment.steps == 6
        norm = float(top(each.model[2].weight.detach()))
        bound = 0.4 if rule.stage == "weights" else 0.7
        assert norm == pytest.approx(bound, rel=0.02)
