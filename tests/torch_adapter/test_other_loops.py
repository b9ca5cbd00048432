"""Loops that do to a model or an optimizer what the plain loop does not."""

from __future__ import annotations

import copy
from typing import Any

import pytest

import specops
from specops import (
    ClipSpectralNorm,
    Plan,
    SpectralNormalization,
    SpectralNormPenalty,
    TrainableScale,
    errors,
)
from tests.torch_adapter.models import FORWARD, backward, batch, network, same, sgd, top, train

torch = pytest.importorskip("torch")
from torch import nn  # noqa: E402

PENALTY = SpectralNormPenalty(0.3, norm="reshaped")
TRAINED = SpectralNormalization(norm="reshaped", scale=TrainableScale(1.5))


# Scales


def moved(attachment: Any, model: nn.Module, optimizer: Any) -> set[str]:
    """The scales that a step trains."""
    before = {name: float(s.detach()) for name, s in attachment.scales.items()}
    train(model, optimizer, 1)
    return {n for n, s in attachment.scales.items() if float(s.detach()) != before[n]}


@pytest.mark.parametrize("how", ["thawed", "added"])
def test_scales_are_trained_on_when_a_layer_comes_later(how: str) -> None:
    model = network()
    model[0].requires_grad_(how == "added")
    given = model.parameters() if how == "thawed" else model[2:].parameters()
    optimizer = torch.optim.Adam(given, 0.01)
    attachment = specops.attach(optimizer, model, TRAINED)
    assert moved(attachment, model, optimizer) == {"2.weight", "5.weight"}
    if how == "thawed":
        model[0].requires_grad_(True)
    else:
        optimizer.add_param_group({"params": list(model[0].parameters())})
    train(model, optimizer, 1)
    assert moved(attachment, model, optimizer) == {"0.weight", "2.weight", "5.weight"}
    attachment.detach()
    assert all("name" not in group for group in optimizer.param_groups)


def test_two_models_of_one_optimizer_have_scales_each() -> None:
    models = [network(), network()]
    optimizer = torch.optim.SGD([p for m in models for p in m.parameters()], lr=0.01)
    attachments = [specops.attach(optimizer, m, TRAINED) for m in models]
    for m in models:
        backward(m, batch())
    optimizer.step()
    assert all(float(s.detach()) != 1.5 for a in attachments for s in a.scales.values())


def test_a_copied_optimizer_can_be_saved_once_it_is_attached_to() -> None:
    model = network()
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    specops.attach(optimizer, model, TRAINED)
    train(model, optimizer, 1)
    twin, stepping = copy.deepcopy((model, optimizer))
    attachment = specops.attach(stepping, twin, TRAINED)
    train(twin, stepping, 1)
    assert len(stepping.state_dict()["state"]) == 6 + len(attachment.scales)


# Optimizers


class Within(torch.optim.SGD):
    """Steps by the step of the class that it extends."""

    fails = False

    def step(self, closure: Any = None) -> Any:
        if self.fails:
            raise ArithmeticError
        return super().step(closure)


class Wrapping(torch.optim.Optimizer):
    """As those of accelerate and of `torch.distributed.optim`: it is no optimizer of its own."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optim, self.param_groups = optimizer, optimizer.param_groups


@pytest.mark.parametrize("rule", [ClipSpectralNorm(1.0), FORWARD["reshaped"]])
def test_an_optimizer_around_another_is_refused_by_name(rule: Any) -> None:
    model = network()
    kinds = [type(module) for module in model.modules()]
    with pytest.raises(errors.AdapterError, match=r"Wrapping is no .*: pass the wrapped one"):
        specops.attach(Wrapping(sgd(model)), model, rule)
    assert [type(module) for module in model.modules()] == kinds


@pytest.mark.parametrize("rule", [ClipSpectralNorm(0.1), PENALTY, FORWARD["reshaped"]])
def test_a_step_that_makes_the_optimizer_s_state_is_none(rule: Any) -> None:
    checkpoint = pytest.importorskip("torch.distributed.checkpoint.state_dict")
    model = network()
    optimizer = torch.optim.AdamW(model.parameters())
    attachment = specops.attach(optimizer, model, rule)
    before = copy.deepcopy(model)
    checkpoint.get_optimizer_state_dict(model, optimizer)
    assert optimizer.state
    assert (attachment.steps, attachment.history) == (0, [])
    assert same(model, before)
    train(model, optimizer, 1)
    assert attachment.steps == 1


class Rateless(torch.optim.Optimizer):
    """Without a rate, as Adafactor with steps relative to the weights has none."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {"lr": None})

    def step(self, closure: Any = None) -> None:
        """Halve everything."""
        with torch.no_grad():
            for p in self.param_groups[0]["params"]:
                p.mul_(0.5)


def test_an_optimizer_without_a_rate_takes_steps() -> None:
    model = network()
    optimizer = Rateless(model.parameters())
    attachment = specops.attach(optimizer, model, ClipSpectralNorm(0.1))
    optimizer.step(closure=None)
    assert attachment.steps == 1


@pytest.mark.parametrize("closed", [False, True], ids=["", "closure"])
def test_a_step_within_a_step_is_one(closed: bool) -> None:
    sgd(network())  # torch hooks a class when the first of its optimizers is made
    ends = []
    for kind in (torch.optim.SGD, Within):
        model = network()
        optimizer = kind(model.parameters(), lr=0.1)
        attachment = specops.attach(
            optimizer, model, Plan([("5.*", ClipSpectralNorm(0.1)), ("*", PENALTY)]), every=2
        )
        if kind is Within:
            optimizer.fails = True
            with pytest.raises(ArithmeticError):
                optimizer.step()
            optimizer.fails = False

        def closure() -> Any:
            optimizer.zero_grad()  # noqa: B023
            return backward(model, batch())  # noqa: B023

        for _ in range(4):
            closure()
            optimizer.step(closure) if closed else optimizer.step()
        assert attachment.steps == 4
        ends.append(model)
    assert same(*ends)


@pytest.mark.parametrize("how", ["", "closure", "channels last"])
def test_what_is_maximised_is_penalised_too(how: str) -> None:
    ends = []
    for sign in (1.0, -1.0):
        model = network()
        if how == "channels last":
            model.to(memory_format=torch.channels_last)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, maximize=sign < 0)
        specops.attach(optimizer, model, PENALTY)
        losses = []

        def closure() -> Any:
            optimizer.zero_grad()  # noqa: B023
            value = sign * model(batch()).square().mean()  # noqa: B023
            value.backward()
            return value

        for _ in range(3):
            if how == "closure":
                losses.append(sign * float(optimizer.step(closure).detach()))
            else:
                closure()
                optimizer.step()
        ends.append((model, losses))
    assert same(ends[0][0], ends[1][0])
    assert ends[0][1] == ends[1][1]


@pytest.mark.parametrize("default", [False, True])
def test_scales_go_the_way_of_their_weights(default: bool) -> None:
    ends = []
    for up in (False, True):
        model = network()
        group = {"params": list(model.parameters()), "maximize": up}
        optimizer = torch.optim.SGD([group], lr=0.1, maximize=default)
        attachment = specops.attach(optimizer, model, TRAINED)
        for _ in range(3):
            optimizer.zero_grad()
            ((-1.0 if up else 1.0) * model(batch()).square().mean()).backward()
            optimizer.step()
        ends.append([float(s.detach()) for s in attachment.scales.values()])
    assert ends[0] == ends[1]
    assert ends[0] != [1.5] * len(ends[0])


class Uncounted(torch.optim.SGD):
    """Writes as torch does not count it."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                p.data.add_(p.grad.data, alpha=-group["lr"])


@pytest.mark.parametrize("rule", [FORWARD["reshaped"], FORWARD["operator"]])
def test_a_resumed_run_of_uncounted_writes_is_the_same(rule: Any) -> None:
    def begun() -> tuple[Any, Any, Any]:
        model = network()
        optimizer = Uncounted(model.parameters(), lr=0.1)
        return model, optimizer, specops.attach(optimizer, model, rule, every=3)

    run, again = begun(), begun()
    train(*run[:2], steps=5)
    states = copy.deepcopy([part.state_dict() for part in run])
    for part, state in zip(again, states, strict=True):
        part.load_state_dict(state)
    train(*run[:2], steps=3, first=5)
    train(*again[:2], steps=3, first=5)
    assert same(run[0], again[0])


@pytest.mark.parametrize("steps", [0, 2])
def test_a_run_resumes_with_what_was_loaded_right_before_it_was_saved(steps: int) -> None:
    runs = []
    for _ in range(2):
        model = network()
        optimizer = sgd(model)
        rule = SpectralNormalization(norm="reshaped")
        runs.append((model, optimizer, specops.attach(optimizer, model, rule, every=10)))
    train(*runs[0][:2], steps=steps)
    runs[0][0].load_state_dict({k: torch.randn_like(w) for k, w in network().state_dict().items()})
    for part, saved in zip(runs[1], runs[0], strict=True):
        part.load_state_dict(copy.deepcopy(saved.state_dict()))
    used, resumed = (attachment.weights() for _, _, attachment in runs)
    for name, weight in used.items():
        torch.testing.assert_close(resumed[name], weight, rtol=1e-5, atol=1e-6)


# Layers


def test_a_state_from_before_the_first_input_leaves_the_norm_to_it() -> None:
    rule = SpectralNormalization(norm="operator", scale=0.5)
    states = []
    for loads in (False, True):
        model = network().eval()
        attachment = specops.attach(sgd(model), model, rule)
        if loads:
            attachment.load_state_dict(states[0])
        states.append(attachment.state_dict())
        assert states[-1]["weights"]["0.weight"]["state"] is None
        model(batch())
        norm = specops.spectral_norm(
            attachment.weights()["0.weight"].detach(), attachment.geometries()["0.weight"]
        )
        assert float(norm) == pytest.approx(0.5, rel=1e-3)


@pytest.mark.parametrize("rule", [ClipSpectralNorm(0.3), FORWARD["reshaped"]])
def test_blocks_grow_with_their_layer(rule: Any) -> None:
    torch.manual_seed(0)
    layer = nn.MultiheadAttention(4, 2)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.01)
    attachment = specops.attach(optimizer, layer, rule)

    def step(size: int) -> None:
        x = torch.randn(3, 5, size)
        optimizer.zero_grad()
        layer(x, x, x)[0].square().mean().backward()
        optimizer.step()

    step(4)
    layer.embed_dim = layer.kdim = layer.vdim = 8
    layer.head_dim = 4
    layer.in_proj_weight = nn.Parameter(torch.randn(24, 8))
    layer.in_proj_bias = nn.Parameter(torch.zeros(24))
    layer.out_proj = type(layer.out_proj)(8, 8)
    optimizer.param_groups[0]["params"] = list(layer.parameters())
    step(8)
    step(8)
    bound = 0.3 if isinstance(rule, ClipSpectralNorm) else 1.0
    blocks = attachment.weights()["in_proj_weight"].detach().chunk(3)
    assert [float(top(b)) for b in blocks] == pytest.approx([bound] * 3, rel=1e-3)


def test_a_scheduler_that_was_made_before_trained_scales_is_said() -> None:
    model = nn.Linear(4, 3)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5)
    with pytest.warns(errors.CautionWarning, match="learning rate scheduler.*Attach before"):
        specops.attach(optimizer, model, TRAINED).detach()
    fixed = SpectralNormalization(norm="reshaped", scale=1.5)
    specops.attach(optimizer, model, fixed).detach()


def test_a_scheduler_that_is_made_after_them_steps_trained_scales() -> None:
    model = nn.Linear(4, 3)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    specops.attach(optimizer, model, TRAINED)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5)
    model(torch.ones(2, 4)).sum().backward()
    optimizer.step()
    scheduler.step()
    assert [group["lr"] for group in optimizer.param_groups] == [0.05, 0.05]
