"""The life of models under rules: steps, copies, checkpoints, lost hooks, values not finite."""

from __future__ import annotations

import copy
import io
import pickle
import warnings
from typing import Any

import pytest

import specops
from specops import (
    ClipSpectralNorm,
    Conv,
    Monitor,
    Plan,
    ProjectStableRank,
    SpectralNormalization,
    SpectralNormPenalty,
    StableRankNormalization,
    TrainableScale,
    errors,
)
from tests.torch_adapter.models import (
    FORWARD,
    backward,
    batch,
    every_rule,
    in_use,
    network,
    settle,
    state_of,
    top,
    train,
)

torch = pytest.importorskip("torch")
from torch import nn  # noqa: E402
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn  # noqa: E402

SN = SpectralNormalization(norm="reshaped")
CLIP = ClipSpectralNorm(0.5)
PENALTY = SpectralNormPenalty(0.3, norm="reshaped")


def sgd(model: nn.Module, **options: Any) -> Any:
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, **options)


def same(a: nn.Module, b: nn.Module) -> bool:
    """Whether two models hold the same values, bit by bit."""
    pairs = zip(a.state_dict().values(), b.state_dict().values(), strict=True)
    return all(torch.equal(x, y) for x, y in pairs)


def hooks(model: nn.Module) -> list[Any]:
    return [
        h for m in model.modules() for h in (*m._forward_hooks.values(), *m._forward_pre_hooks)
    ]


# Models



@every_rule
@pytest.mark.parametrize("how", ["deepcopy", "save"])
def test_copies_compute_the_same_and_are_their_own(rule: Any, how: str) -> None:
    model, x = network(), batch()
    optimizer = sgd(model)
    specops.attach(optimizer, model, rule)
    train(model, optimizer, 2)
    if how == "deepcopy":
        twin = copy.deepcopy(model)
    else:
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        twin = torch.load(file, weights_only=False)
    y = model(x)
    torch.testing.assert_close(twin(x), y)
    train(model, optimizer, 2)
    torch.testing.assert_close(twin(x), y)
    assert not torch.allclose(model(x), y)


@every_rule
def test_names_and_values_are_the_plain_models(rule: Any) -> None:
    model, plain, x = network(), network(), batch()
    expected, names = plain.state_dict(), [n for n, _ in plain.named_parameters()]

    def check(*_: Any) -> None:
        assert [n for n, _ in model.named_parameters()] == names
        assert list(model.state_dict()) == list(expected)
        assert all(torch.equal(v, expected[n]) for n, v in model.state_dict().items())

    attachment = specops.attach(None, model, rule)
    inside = model[5].register_forward_pre_hook(check)
    check()
    assert not torch.allclose(model(x), plain(x))
    check()
    inside.remove()
    attachment.detach()
    check()
    assert torch.equal(model(x), plain(x))
    for a, b in zip(model.modules(), plain.modules(), strict=True):
        assert set(vars(a)) == set(vars(b))
        assert not a._forward_hooks
        assert not a._forward_pre_hooks


def test_errors_in_forward_leave_no_shadow(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = network(), batch()
    lstm = nn.LSTM(3, 4)
    for m in (model, lstm):
        specops.attach(None, m, SN)
    y = model(x)
    hook = model[5].register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model(x)
    hook.remove()
    with monkeypatch.context() as patch:
        patch.setattr(model[0], "forward", lambda _: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            model(x)
    with pytest.raises(RuntimeError, match="input"):
        lstm(torch.randn(2, 2, 5))
    assert all("weight" not in vars(m) for m in model)
    assert lstm._flat_weights[0] is lstm.weight_ih_l0 is lstm._parameters["weight_ih_l0"]
    assert torch.equal(model(x), y)


@every_rule
def test_folding_keeps_what_the_model_computes(rule: Any) -> None:
    model, x = network(), batch()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    attachment = specops.attach(optimizer, model, rule)
    train(model, optimizer, 2)
    y, raw = model(x), model[0].weight.detach().clone()
    used = in_use(model, "0.weight", x)
    attachment.detach(fold=True)
    torch.testing.assert_close(model(x), y)
    torch.testing.assert_close(model[0].weight, used)
    assert not torch.allclose(model[0].weight, raw)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert not optimizer._optimizer_step_post_hooks
    assert not optimizer._optimizer_step_pre_hooks
    assert len(optimizer.param_groups) == 1
    copy.deepcopy(model)


@pytest.mark.parametrize("rule", [SN, FORWARD["trained"]], ids=["fixed", "trained"])
def test_a_weight_used_without_its_layer_is_an_error(rule: Any) -> None:
    model, x = network(), batch()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    attachment = specops.attach(optimizer, model, rule)
    train(model, optimizer, 2)
    optimizer.zero_grad()
    y = nn.functional.linear(model[:5](x), model[5].weight)
    y.square().sum().backward()
    with pytest.raises(errors.AdapterError, match=r"5\.weight has a gradient.*\(\"5\.weight\", None"):
        optimizer.step()
    assert attachment.steps == 2


def test_layers_that_leave_freeze_and_come() -> None:
    model, x = network(), batch()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    attachment = specops.attach(optimizer, model, SN)
    train(model, optimizer)
    model[0].weight.requires_grad_(False)
    old, model[5] = model[5], nn.Linear(192, 2)
    frozen = state_of(attachment, "0.weight")
    train(model, optimizer)
    now = state_of(attachment, "0.weight")
    assert all(torch.equal(now[key], value) for key, value in frozen.items())
    norm = top(in_use(model, "0.weight", x).flatten(1))
    assert float(norm) == pytest.approx(1.0, abs=1e-3)
    optimizer.add_param_group({"params": list(model[5].parameters())})
    train(model, optimizer)
    assert float(top(in_use(model, "5.weight", x))) == pytest.approx(1.0, abs=1e-3)
    assert not old._forward_hooks
    assert not old._forward_pre_hooks
    assert attachment.report()["0.weight"].norm is not None



# Checkpoints

RESUMED = {
    "clip": CLIP,
    "clip, screened": ClipSpectralNorm(5.0),
    "stable rank": ProjectStableRank(ratio=0.3, norm="reshaped"),
    "penalty": PENALTY,
    "penalty of the operator": SpectralNormPenalty(0.3, norm="operator"),
    "operator": FORWARD["operator"],
    "rank": FORWARD["rank"],
    "trained": SpectralNormalization(norm="operator", scale=TrainableScale(1.5)),
    "trained, shared": SpectralNormalization(norm="reshaped", scale=TrainableScale(1.5, True)),
    "scheduled": SpectralNormalization(norm="reshaped", scale=lambda step, *_: 1 + 0.1 * step),
}


@pytest.mark.parametrize("rule", RESUMED.values(), ids=RESUMED)
@pytest.mark.parametrize("kind", ["SGD", "Adam", "double"])
def test_a_resumed_run_is_the_same_bit_by_bit(rule: Any, kind: str) -> None:
    def begun() -> tuple[Any, Any, Any]:
        model = network().double() if kind == "double" else network()
        adam = kind == "Adam"
        optimizer = torch.optim.Adam(model.parameters(), 0.01) if adam else sgd(model)
        return model, optimizer, specops.attach(optimizer, model, rule, every=2)

    run = begun()
    train(*run[:2], steps=3)
    file = io.BytesIO()
    torch.save([part.state_dict() for part in run], file)
    train(*run[:2], steps=4, first=3)
    file.seek(0)
    again = begun()
    for part, state in zip(again, torch.load(file, weights_only=True), strict=True):
        part.load_state_dict(state)
    train(*again[:2], steps=4, first=3)
    assert again[2].steps == 7
    assert same(run[0], again[0])
    for name, scale in run[2].scales.items():
        assert torch.equal(scale, again[2].scales[name])


# Hooks that are lost


def taken_over(model: nn.Module, optimizer: Any, how: str) -> Any:
    """An optimizer of the model's parameters made from another one."""
    if how == "new":
        other = sgd(model)
        other.load_state_dict(optimizer.state_dict())
        return other
    if how == "deepcopy":
        return copy.deepcopy(optimizer, {id(p): p for p in model.parameters()})
    other = pickle.loads(pickle.dumps(optimizer))
    other.param_groups[0]["params"] = list(model.parameters())
    other.state.clear()
    return other


@pytest.mark.parametrize("how", ["new", "deepcopy", "pickle"])
@pytest.mark.parametrize("rule", [CLIP, SN, PENALTY], ids=["weights", "forward", "gradients"])
@pytest.mark.parametrize("ask", ["report", "enforce", "state_dict"])
def test_steps_of_another_optimizer_are_noticed(rule: Any, how: str, ask: str) -> None:
    model = network()
    optimizer = sgd(model)
    attachment = specops.attach(optimizer, model, rule)
    train(model, optimizer)
    train(model, taken_over(model, optimizer, how), 4)
    with pytest.warns(errors.HookLostWarning, match="changed 4 times since step 1"):
        getattr(attachment, ask)()


def test_a_lost_hook_is_noticed_with_a_frozen_layer() -> None:
    model = network()
    attachment = specops.attach(sgd(model), model, CLIP)
    model[0].weight.requires_grad_(False)
    train(model, sgd(model), 5)
    with pytest.warns(errors.HookLostWarning):
        attachment.report()


def test_a_detached_attachment_does_not_complain() -> None:
    model = network()
    attachment = specops.attach(sgd(model), model, CLIP)
    attachment.detach()
    train(model, sgd(model), 5)
    attachment.report()


@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.SGD(p, lr=0.1, fused=True),
        lambda p: torch.optim.NAdam(p, lr=0.01, weight_decay=0.1, foreach=False),
        lambda p: torch.optim.Adam(p, lr=0.01, amsgrad=True, foreach=True),
    ],
    ids=["SGD", "NAdam", "Adam"],
)
def test_ordinary_training_raises_no_alarm(make: Any) -> None:
    """Warnings are errors here."""
    model = network()
    optimizer = make(model.parameters())
    attachments = [specops.attach(optimizer, model, r, every=4) for r in (CLIP, SN, PENALTY)]
    for round_ in range(2):
        train(model, optimizer, 5)
        for attachment in attachments:
            attachment.report()
            attachment.load_state_dict(attachment.state_dict())
            attachment.enforce()
            attachment.report()
        model.load_state_dict({k: v + round_ for k, v in model.state_dict().items()})
        for attachment in attachments:
            attachment.report()


# Values that are not finite


@pytest.mark.parametrize("rule", [CLIP, PENALTY, *FORWARD.values()], ids=["clip", "penalty", *FORWARD])
@pytest.mark.parametrize("policy", ["raise", "skip", "warn"])
@pytest.mark.parametrize("first", [True, False], ids=["from the start", "later"])
def test_weights_that_are_not_finite(rule: Any, policy: Any, first: bool) -> None:
    """They are left alone, and when they are finite again all goes on as if nothing had been."""
    model, other = network(), network()
    good = model[0].weight.detach().clone()

    def spoil() -> None:
        with torch.no_grad():
            model[0].weight[0, 0] = float("nan")

    if first:
        spoil()
    attachment = specops.attach(sgd(model), model, rule, on_nonfinite=policy)
    if not first:
        model(batch())
        backward(model, batch())
        attachment.before_step()
        attachment.step()
        spoil()
    backward(model, batch())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if policy == "raise":
            with pytest.raises(errors.NonFiniteError, match=r"0\.weight holds NaN or infinity"):
                fire(attachment)
        else:
            fire(attachment)
            skipped = {r["name"] for r in attachment.history if "skipped" in r}
            assert skipped == {"0.weight"}
    assert [w.category for w in caught] == [errors.NonFiniteWarning] * (policy == "warn")
    with torch.no_grad():
        model[0].weight.copy_(good)
    model.zero_grad()
    settle(attachment, 3)
    backward(model, batch())
    fire(attachment)
    assert all(p.isfinite().all() for p in model.parameters())
    assert all(p.grad.isfinite().all() for p in model.parameters())
    assert model(batch()).isfinite().all()
    state = attachment.state_dict()["weights"]["0.weight"]["state"]
    assert all(v.isfinite().all() for v in (state or {}).values() if v.is_floating_point())
    assert same(model, other) == (rule is not CLIP)


def fire(attachment: Any) -> None:
    attachment.before_step()
    attachment.step()


# History
