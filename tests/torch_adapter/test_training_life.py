"""The life of models under rules: steps, copies, checkpoints, lost hooks, values not finite."""

from __future__ import annotations

import copy
import io
import warnings
from typing import Any

import pytest

import specops
from specops import (
    ClipSpectralNorm,
    Monitor,
    Plan,
    ProjectStableRank,
    SpectralNormalization,
    SpectralNormPenalty,
    TrainableScale,
    errors,
)
from tests.torch_adapter.models import (
    FORWARD,
    Decay,
    Halved,
    backward,
    batch,
    every_rule,
    hooks,
    in_use,
    network,
    raw,
    same,
    settle,
    sgd,
    state_of,
    taken_over,
    top,
    train,
)

torch = pytest.importorskip("torch")
from torch import nn  # noqa: E402
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn  # noqa: E402

SN = SpectralNormalization(norm="reshaped")
CLIP = ClipSpectralNorm(0.5)
PENALTY = SpectralNormPenalty(0.3, norm="reshaped")
LEARNT = SpectralNormalization(norm="reshaped", scale=TrainableScale(1.5))


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
    assert torch.equal(lstm._flat_weights[0], lstm.weight_ih_l0)
    assert torch.equal(model(x), y)


@every_rule
def test_folding_keeps_what_the_model_computes(rule: Any) -> None:
    model, x = network(), batch()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    attachment = specops.attach(optimizer, model, rule)
    train(model, optimizer, 2)
    y, before = model(x), raw(model, "0.weight").detach().clone()
    used = in_use(model, "0.weight", x)
    attachment.detach(fold=True)
    torch.testing.assert_close(model(x), y)
    torch.testing.assert_close(model[0].weight, used)
    assert not torch.allclose(model[0].weight, before)
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
    y = nn.functional.linear(model[:5](x), raw(model, "5.weight"))
    y.square().sum().backward()
    with pytest.raises(errors.AdapterError, match=r"5\.weight has a gradient.*Exclude it"):
        optimizer.step()
    assert attachment.steps == 2


def test_a_new_gradient_in_the_place_of_the_old_one_is_a_new_gradient() -> None:
    model = network()
    optimizer = sgd(model)
    specops.attach(optimizer, model, SN)
    train(model, optimizer)
    weight = raw(model, "5.weight")
    place, version, others = id(weight.grad), weight.grad._version, []
    optimizer.zero_grad()
    # Python gives an object the address of one that was freed.
    for _ in range(1000):
        others.append(torch.ones_like(weight))
        if id(others[-1]) == place:
            break
    else:
        pytest.skip("no object came to lie at the old address")
    weight.grad = others[-1]
    while weight.grad._version < version:
        weight.grad.add_(0.0)
    assert weight.grad._version == version
    with pytest.raises(errors.AdapterError, match=r"5\.weight has a gradient"):
        optimizer.step()


def test_layers_that_leave_freeze_and_come() -> None:
    model, x = network(), batch()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    attachment = specops.attach(optimizer, model, SN)
    train(model, optimizer)
    model[0].weight.requires_grad_(False)
    model[5] = nn.Linear(192, 2)
    frozen = state_of(attachment, "0.weight")
    with pytest.warns(errors.CautionWarning, match=r"5\.weight was replaced"):
        train(model, optimizer)
    now = state_of(attachment, "0.weight")
    assert all(torch.equal(now[key], value) for key, value in frozen.items())
    norm = top(in_use(model, "0.weight", x).flatten(1))
    assert float(norm) == pytest.approx(1.0, abs=1e-3)
    optimizer.add_param_group({"params": list(model[5].parameters())})
    train(model, optimizer)
    assert float(top(in_use(model, "5.weight", x))) == pytest.approx(1.0, abs=1e-3)
    assert attachment.report()["5.weight"].rule


def test_a_layer_that_was_replaced_is_let_go() -> None:
    model = network()
    optimizer = sgd(model)
    specops.attach(optimizer, model, SN)
    old, model[5] = model[5], nn.Linear(192, 2)
    optimizer.add_param_group({"params": list(model[5].parameters())})
    train(model, optimizer)
    assert type(model[5]) is not nn.Linear
    assert type(old) is nn.Linear
    assert not hooks(old)


def test_what_a_later_hook_adds_is_constrained_at_that_step() -> None:
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
    optimizer = torch.optim.SGD(model[0].parameters(), lr=0.1)
    specops.attach(optimizer, model, ClipSpectralNorm(0.1))

    def add(optimizer: Any, args: Any, kwargs: Any) -> None:
        if len(optimizer.param_groups) == 1:
            optimizer.add_param_group({"params": list(model[1].parameters())})

    optimizer.register_step_pre_hook(add)
    model(torch.randn(3, 6)).sum().backward()
    optimizer.step()
    assert [float(top(layer.weight.detach())) for layer in model] == pytest.approx(
        [0.1, 0.1], rel=1e-5
    )


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
@pytest.mark.parametrize("every", [1, 2])
@pytest.mark.parametrize("kind", ["SGD", "Adam", "double"])
def test_a_resumed_run_is_the_same_bit_by_bit(rule: Any, kind: str, every: int) -> None:
    def begun() -> tuple[Any, Any, Any]:
        model = network().double() if kind == "double" else network()
        adam = kind == "Adam"
        optimizer = torch.optim.Adam(model.parameters(), 0.01) if adam else sgd(model)
        return model, optimizer, specops.attach(optimizer, model, rule, every=every)

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


@pytest.mark.parametrize("rule", [CLIP, SN, PENALTY, LEARNT], ids=str)
def test_a_state_may_come_as_numpy_arrays(rule: Any) -> None:
    """As other tools store it."""
    runs = []
    for _ in range(2):
        model = network()
        optimizer = sgd(model)
        runs.append((model, optimizer, specops.attach(optimizer, model, rule)))
    (model, optimizer, attachment), again = runs
    train(model, optimizer, 3)
    again[0].load_state_dict(model.state_dict())
    again[1].load_state_dict(copy.deepcopy(optimizer.state_dict()))
    again[2].load_state_dict(arrays_of(attachment.state_dict()))
    for m, o, _ in runs:
        train(m, o, 2)
    assert same(model, again[0])


def arrays_of(state: Any) -> Any:
    if isinstance(state, dict):
        return {key: arrays_of(value) for key, value in state.items()}
    return state.numpy() if torch.is_tensor(state) else state


# Hooks that are lost


@pytest.mark.parametrize("how", ["new", "deepcopy", "pickle"])
@pytest.mark.parametrize("rule", [CLIP, SN, PENALTY], ids=["weights", "forward", "gradients"])
@pytest.mark.parametrize("ask", ["report", "enforce", "state_dict"])
def test_steps_of_another_optimizer_are_noticed(rule: Any, how: str, ask: str) -> None:
    model = network()
    optimizer = sgd(model)
    attachment = specops.attach(optimizer, model, rule)
    train(model, optimizer)
    train(model, taken_over(model, optimizer, how), 10)
    with pytest.warns(errors.HookLostWarning, match="changed 10 times since step 1") as said:
        getattr(attachment, ask)()
    assert said[0].filename == __file__


def test_a_lost_hook_is_noticed_with_a_frozen_layer() -> None:
    model = network()
    attachment = specops.attach(sgd(model), model, CLIP)
    model[0].weight.requires_grad_(False)
    train(model, sgd(model), 10)
    with pytest.warns(errors.HookLostWarning):
        attachment.report()


def test_a_detached_attachment_does_not_complain() -> None:
    """Warnings are errors here."""
    model = network()
    attachment = specops.attach(sgd(model), model, CLIP)
    attachment.detach()
    train(model, sgd(model), 10)
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
        for _ in range(4):
            # An average swapped in and out.
            model.load_state_dict({k: v + round_ for k, v in model.state_dict().items()})
            for attachment in attachments:
                attachment.report()


# Values that are not finite


def fire(attachment: Any) -> None:
    attachment.before_step()
    attachment.step()


def spoil(model: nn.Module) -> Any:
    """Put a NaN into the first weight; a copy of what it was."""
    good = model[0].weight.detach().clone()
    with torch.no_grad():
        model[0].weight[0, 0] = float("nan")
    return good


@pytest.mark.filterwarnings("default::specops.errors.NonFiniteWarning")
@pytest.mark.parametrize(
    "rule", [CLIP, PENALTY, *FORWARD.values()], ids=["clip", "penalty", *FORWARD]
)
@pytest.mark.parametrize("policy", ["raise", "skip", "warn"])
def test_weights_that_are_not_finite(rule: Any, policy: Any) -> None:
    """They are left alone, and once they are finite again all goes on."""
    model = network()
    attachment = specops.attach(None, model, rule, on_nonfinite=policy)
    backward(model, batch())
    fire(attachment)
    good = spoil(model)
    backward(model, batch())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if policy == "raise":
            with pytest.raises(errors.NonFiniteError, match=r"0\.weight holds NaN.* step 2"):
                fire(attachment)
        else:
            fire(attachment)
            assert {r["name"] for r in attachment.history if "skipped" in r} == {"0.weight"}
    assert [w.category for w in caught] == [errors.NonFiniteWarning] * (policy == "warn")
    assert all(w.filename == __file__ for w in caught)
    with torch.no_grad():
        model[0].weight.copy_(good)
    model.zero_grad()
    backward(model, batch())
    fire(attachment)
    assert all(p.isfinite().all() and p.grad.isfinite().all() for p in model.parameters())
    state = attachment.state_dict()["weights"]["0.weight"]["state"]
    assert all(v.isfinite().all() for v in (state or {}).values())
    assert "skipped" not in attachment.history[-3]


@pytest.mark.parametrize("last", [CLIP, SN], ids=["weights", "forward"])
def test_an_error_leaves_every_weight_and_vector_as_it_was(last: Any) -> None:
    model = network()
    plan = Plan([("0.*", SN), ("2.*", ClipSpectralNorm(0.1)), ("5.*", last)])
    attachment = specops.attach(None, model, plan)
    model(batch())
    with torch.no_grad():
        model[5].weight[0, 0] = float("inf")
        model[0].weight.add_(1.0)
    before, vectors = copy.deepcopy(model), state_of(attachment, "0.weight")
    with pytest.raises(errors.NonFiniteError, match=r"5\.weight"):
        attachment.step()
    assert same(model, before)
    now = state_of(attachment, "0.weight")
    assert all(torch.equal(now[key], value) for key, value in vectors.items())


def test_a_warning_in_an_optimizer_s_hook_points_at_the_step() -> None:
    model = network()
    optimizer = sgd(model)
    specops.attach(optimizer, model, CLIP, on_nonfinite="warn")
    backward(model, batch())
    spoil(model)
    with pytest.warns(errors.NonFiniteWarning, match=r"0\.weight holds NaN") as said:
        optimizer.step()
    assert [w.filename for w in said] == [__file__]


@pytest.mark.filterwarnings("ignore::specops.errors.NonFiniteWarning")
@pytest.mark.parametrize("name", ["reshaped", "operator"])
@pytest.mark.parametrize("policy", ["raise", "skip", "warn"])
def test_weights_that_are_not_finite_from_the_start(name: str, policy: Any) -> None:
    model, rule = network(), FORWARD[name]
    good = spoil(model)

    def begin() -> Any:
        attachment = specops.attach(None, model, rule, on_nonfinite=policy)
        model(batch())
        fire(attachment)
        return attachment

    if policy == "raise":
        with pytest.raises(errors.NonFiniteError, match=r"0\.weight.*NaN"):
            begin()
        return
    attachment = begin()
    with torch.no_grad():
        model[0].weight.copy_(good)
    fire(attachment)
    twin = network()
    specops.attach(None, twin, rule)
    torch.testing.assert_close(model(batch()), twin(batch()), rtol=1e-2, atol=1e-3)


# History and report

FIGURES = {
    "clip": (CLIP, {"norm_before", "norm_after"}),
    "stable rank": (
        ProjectStableRank(target=2, norm="reshaped"),
        {"rank_before", "rank_after", "distance"},
    ),
    "penalty": (PENALTY, {"norm", "penalty"}),
    "forward": (SN, {"norm"}),
    "monitor": (Monitor(), {"spectral_norm", "stable_rank"}),
}


@pytest.mark.parametrize(("rule", "figures"), FIGURES.values(), ids=FIGURES)
def test_figures_go_to_the_history_and_to_listeners(rule: Any, figures: set[str]) -> None:
    class Writer:
        told: list[Any] = []  # noqa: RUF012

        def add_scalar(self, tag: str, value: float, step: int) -> None:
            self.told.append((tag, value, step))

    told: list[Any] = []
    model, writer = network(), Writer()
    optimizer = sgd(model)
    attachment = specops.attach(optimizer, model, rule, every=2, history=4, log=told.append)
    attachment.log_to(writer)
    train(model, optimizer, 5)
    assert [(r["step"], r["name"]) for r in told] == [
        (step, f"{n}.weight") for step in (2, 4) for n in (0, 2, 5)
    ]
    assert attachment.history == told[-4:]
    for record in told:
        assert set(record) == {"step", "name"} | figures
        assert all(isinstance(record[key], float) for key in figures)
    assert writer.told == [
        (f"specops/{r['name']}/{key}", r[key], r["step"])
        for r in told
        for key in r
        if key in figures
    ]
    norm = next((k for k in ("norm", "norm_after", "spectral_norm") if k in figures), None)
    if norm and rule is not PENALTY:
        model.zero_grad()
        settle(attachment, 2)
        measured = float(top(raw(model, "5.weight").detach()))
        assert attachment.history[-1][norm] == pytest.approx(measured, rel=1e-2)
    with pytest.raises(TypeError, match="callable"):
        attachment.log_to(3)


def test_listeners_get_the_largest_of_several_norms() -> None:
    told: list[Any] = []

    class Writer:
        add_scalar = staticmethod(lambda *record: told.append(record))

    model = nn.LSTM(3, 4)
    attachment = specops.attach(None, model, Plan([("weight_ih*", SN)]), log=Writer())
    attachment.step()
    gates = raw(model, "weight_ih_l0").detach().chunk(4)
    assert told == [
        ("specops/weight_ih_l0/norm", pytest.approx(max(float(top(g)) for g in gates)), 1)
    ]


def test_a_report_measures_the_weight_in_use() -> None:
    model = network()
    attachment = specops.attach(None, model, SpectralNormalization(norm="reshaped", scale=3.0))
    row = attachment.report()["5.weight"]
    assert row.norm == pytest.approx(3.0, rel=1e-3)
    assert row.norm_is == "exact"


# Several at work


def test_screens_and_enforce_see_what_grows_elsewhere() -> None:
    for enforce in (False, True):
        model = nn.Linear(2, 2, bias=False)
        with torch.no_grad():
            model.weight.copy_(torch.diag(torch.tensor([0.5, 0.1])))
        attachment = specops.attach(None, model, ClipSpectralNorm(1.0))
        attachment.step()
        with torch.no_grad():
            model.weight[1, 1] = 2.0
        (attachment.enforce if enforce else attachment.step)()
        assert attachment.history[-1]["norm_before"] == pytest.approx(2.0)
        assert float(top(model.weight.detach())) == pytest.approx(1.0, abs=1e-5)


@pytest.mark.parametrize("order", [(CLIP, SN), (SN, CLIP)], ids=["clip first", "clip last"])
def test_a_projection_and_a_normalisation_of_the_same_weights(order: Any) -> None:
    model = network()
    optimizer = sgd(model)
    first, second = (specops.attach(optimizer, model, rule) for rule in order)
    train(model, optimizer, 4)
    assert float(top(raw(model, "5.weight").detach())) <= 0.5 * (1 + 1e-5)
    assert float(top(in_use(model, "5.weight", batch()))) == pytest.approx(1.0, rel=1e-3)
    assert (first.steps, second.steps) == (4, 4)
    (first if order[0] is SN else second).detach()
    assert not model[5]._forward_pre_hooks
    assert float(top(in_use(model, "5.weight", batch()))) <= 0.5 * (1 + 1e-5)


@pytest.mark.parametrize("rule", [CLIP, PENALTY, SN], ids=["clip", "penalty", "forward"])
def test_steps_inside_autocast_are_taken_in_single_precision(rule: Any) -> None:
    models, histories = [network(), network()], []
    for model, autocast in zip(models, (False, True), strict=True):
        optimizer = sgd(model)
        attachment = specops.attach(optimizer, model, rule)
        for _ in range(2):
            optimizer.zero_grad()
            backward(model, batch())
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
                optimizer.step()
        histories.append(attachment.history)
    for a, b in zip(*histories, strict=True):
        assert b == {k: v if k == "name" else pytest.approx(v, rel=1e-5) for k, v in a.items()}
    for p, q in zip(*(m.parameters() for m in models), strict=True):
        torch.testing.assert_close(p, q)


def test_averages_of_projected_weights_stay_inside() -> None:
    model = network()
    optimizer = sgd(model)
    specops.attach(optimizer, model, CLIP)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.7))
    norms = []
    for step in range(6):
        train(model, optimizer, first=step)
        average.update_parameters(model)
        norms.append(float(top(average.module[5].weight.detach())))
    assert max(norms) <= 0.5 * (1 + 1e-5)
    assert len(set(norms)) > 1
    assert not torch.equal(average.module[5].weight, model[5].weight)


@every_rule
@pytest.mark.parametrize("how", ["loaded", "copied", "copied between firings"])
def test_other_weights_are_normalised_by_their_own_norm(rule: Any, how: str) -> None:
    """Also those that a checkpoint or an average brings, before any step."""
    model, fresh, x = network(), network(), batch()
    optimizer = sgd(model)
    specops.attach(optimizer, model, rule, every=10)
    if how == "copied between firings":
        train(model, optimizer)
    model(x)
    used = model if how == "loaded" else copy.deepcopy(model)
    for m in (used, fresh):
        torch.manual_seed(5)
        m.load_state_dict({n: torch.randn_like(p) for n, p in m.state_dict().items()})
    specops.attach(None, fresh, rule)
    for name in ("0.weight", "2.weight", "5.weight"):
        torch.testing.assert_close(
            in_use(used, name, x), in_use(fresh, name, x), rtol=0.02, atol=0.02
        )


def test_edits_through_data_are_noticed() -> None:
    model, x = network(), batch()
    specops.attach(None, model, SN)
    y = model(x)
    for p in (model[0].weight, model[5].weight):
        p.data.mul_(3)
    torch.testing.assert_close(model(x), y)


# Rules of others


@pytest.mark.parametrize("rule", [Halved(), Decay()], ids=["forward", "gradients"])
def test_rules_of_others_need_only_the_protocol(rule: Any) -> None:
    model, plain, x = network(), network(), batch()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    attachment = specops.attach(optimizer, model, Plan([("5.weight", rule)]))
    with torch.no_grad():
        w = plain[5].weight.clone()
        plain[5].weight.mul_(0.5 if rule.stage == "forward" else 1.0)
    torch.testing.assert_close(model(x), plain(x))
    backward(plain, x)
    g = plain[5].weight.grad
    change = 0.5 * g if rule.stage == "forward" else g + 0.5 * w
    backward(model, x)
    optimizer.step()
    torch.testing.assert_close(raw(model, "5.weight").detach(), w - 0.1 * change)
    attachment.load_state_dict(attachment.state_dict())
    train(model, optimizer)
    assert float(state_of(attachment, "5.weight")["count"]) == 2
    attachment.report()


@pytest.mark.parametrize("stage", ["forward", "gradients", "weights", "later"])
def test_incomplete_rules_are_refused(stage: str) -> None:
    class Incomplete:
        stage = "weights"

        def init(self, weight: Any, geometry: Any, name: str) -> dict[str, Any]:
            return {}

        def update(self, weight: Any, geometry: Any, state: Any, **_: Any) -> Any:
            return weight, state, {}

    rule = Incomplete()
    rule.stage = stage
    model = network()
    optimizer = sgd(model)
    if stage in ("weights", "gradients"):
        specops.attach(optimizer, model, rule).step()
        return
    needed = {"forward": "needs a method 'apply'", "later": "stage 'later'"}
    with pytest.raises(errors.AdapterError, match=needed[stage]):
        specops.attach(optimizer, model, Plan([("5.*", rule), ("*", SN)]))
    assert not hooks(model)
    assert not optimizer._optimizer_step_post_hooks
