"""What rules bring to an optimizer: the gradients of penalties, and scales to train."""

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
    StableRankNormalization,
    TrainableScale,
    errors,
)
from tests.torch_adapter.models import (
    FORWARD,
    assert_relative,
    backward,
    batch,
    gradients,
    gradients_added,
    in_use,
    network,
    operator,
    penalty_of,
    sgd,
    state_of,
    top,
    train,
)

torch = pytest.importorskip("torch")
from torch import nn  # noqa: E402

PENALTY = SpectralNormPenalty(0.3, norm="reshaped")


def still(model: nn.Module) -> Any:
    """An optimizer that leaves every weight where it is."""
    return torch.optim.SGD(model.parameters(), lr=0.0)


# The gradient


@pytest.mark.parametrize("norm", ["reshaped", "operator", "bidirectional"])
@pytest.mark.parametrize("name", ["0", "2", "5"])
def test_the_gradient_is_that_of_half_the_squared_norm(norm: Any, name: str) -> None:
    model, plain = network().double(), network().double()
    optimizer = still(model)
    rule = SpectralNormPenalty(0.3, norm=norm, iterations=20)
    attachment = specops.attach(optimizer, model, Plan([(f"{name}.weight", rule)]))
    layer = plain.get_submodule(name)
    w = layer.weight
    sides = [top(w.flatten(1)), top(w.transpose(0, 1).flatten(1))]
    if isinstance(layer, nn.Linear):
        sigma = sides[0]
    elif norm == "operator":
        sigma = top(operator(layer, (4, 4), w))
    else:
        own = isinstance(layer, nn.ConvTranspose2d)
        sigma = sides[own] if norm == "reshaped" else sum(sides) / 2
    value = 0.15 * sigma**2
    value.backward()
    for _ in range(12):
        optimizer.zero_grad()
        backward(model, batch().double())
        with gradients_added(model, optimizer) as added:
            optimizer.step()
    for other, g in added.items():
        if other == f"{name}.weight":
            assert_relative(g, w.grad, 1e-6)
        else:
            assert not g.any()
    assert attachment.history[-1]["penalty"] == pytest.approx(float(value.detach()), rel=1e-8)
    assert attachment.history[-1]["norm"] == pytest.approx(float(sigma.detach()), rel=1e-8)


def test_gates_are_penalised_one_by_one() -> None:
    torch.manual_seed(0)
    model = nn.LSTM(4, 3).double()
    optimizer = still(model)
    rule = SpectralNormPenalty(0.3, norm="reshaped", iterations=200)
    specops.attach(optimizer, model, Plan([("weight_*", rule)]))
    model(torch.ones(2, 1, 4).double())[0].sum().backward()
    w = model.weight_ih_l0.detach().clone().requires_grad_()
    sum(0.15 * top(gate) ** 2 for gate in w.chunk(4)).backward()
    with gradients_added(model, optimizer) as added:
        optimizer.step()
    assert_relative(added["weight_ih_l0"], w.grad, 1e-6)


def test_schedules_and_intervals() -> None:
    model = nn.Sequential(nn.Linear(1, 1, bias=False))
    optimizer = still(model)
    seen = []

    def strength(step: int, name: str, geometry: Any) -> float:
        seen.append((step, name))
        return float(step)

    rule = SpectralNormPenalty(strength, norm="reshaped")
    specops.attach(optimizer, model, Plan([("*", rule)], every=2, stop=5))
    w = float(model[0].weight.detach())
    for step in range(1, 8):
        optimizer.zero_grad()
        model(torch.ones(1, 1)).sum().backward()
        with gradients_added(model, optimizer) as added:
            optimizer.step()
        expected = step * w if step in (2, 4) else 0.0
        assert float(added["0.weight"]) == pytest.approx(expected, rel=1e-5)
    assert set(seen) == {(2, "0.weight"), (4, "0.weight")}


def test_a_zero_weight_has_no_penalty() -> None:
    model = network()
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    optimizer = still(model)
    attachment = specops.attach(optimizer, model, PENALTY)
    backward(model, batch())
    with gradients_added(model, optimizer) as added:
        optimizer.step()
    assert not any(g.any() for g in added.values())
    assert attachment.history[-1]["penalty"] == 0.0


def test_weights_without_gradients_are_left_alone() -> None:
    model = nn.ModuleDict({"used": nn.Linear(3, 3), "idle": nn.Linear(3, 3)})
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    attachment = specops.attach(optimizer, model, PENALTY)
    idle = model["idle"].weight.detach().clone()
    model["used"](torch.ones(1, 3)).sum().backward()
    optimizer.step()
    assert torch.equal(model["idle"].weight, idle)
    assert model["idle"].weight.grad is None
    skipped = {r["name"]: r.get("skipped") for r in attachment.history}
    assert skipped == {"used.weight": None, "idle.weight": "no gradient"}
    model["used"].weight.requires_grad_(False)
    with gradients_added(model, optimizer) as added:
        optimizer.step()
    assert not added["used.weight"].any()


@pytest.mark.parametrize("kind", [nn.Embedding, nn.EmbeddingBag])
def test_sparse_layers_under_forward_rules_are_refused_when_attached(kind: Any) -> None:
    model = nn.Sequential(kind(5, 3, sparse=True), nn.Linear(3, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    rule = SpectralNormalization(norm="reshaped")
    with pytest.raises(errors.AdapterError, match=r"0\.weight: .*sparse=True.*sparse=False"):
        specops.attach(optimizer, model, Plan([("0.weight", rule), ("*", rule)]))
    assert type(model[1]) is nn.Linear
    assert type(model[0]) is kind
    specops.attach(optimizer, model, Plan([("0.weight", ClipSpectralNorm(1e-3))]))
    model[0](torch.tensor([[1, 2]])).sum().backward()
    optimizer.step()
    assert float(torch.linalg.matrix_norm(model[0].weight.detach(), 2)) <= 1e-3 * (1 + 1e-6)


def test_sparse_gradients_are_refused_by_name() -> None:
    model = nn.Sequential(nn.Embedding(5, 3, sparse=True))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    specops.attach(optimizer, model, Plan([("0.weight", PENALTY)]))
    model(torch.tensor([1])).sum().backward()
    with pytest.raises(errors.AdapterError, match=r"0\.weight has a sparse gradient"):
        optimizer.step()


def test_half_precision_gradients_keep_their_dtype() -> None:
    model = network().bfloat16()
    optimizer = still(model)
    specops.attach(optimizer, model, PENALTY)
    backward(model, batch().bfloat16())
    with gradients_added(model, optimizer) as added:
        optimizer.step()
    assert {g.dtype for g in added.values()} == {torch.bfloat16}
    penalty_of(plain := network()).backward()
    assert_relative(added["5.weight"], plain[5].weight.grad, 0.05)


def test_accumulated_gradients_get_one_penalty() -> None:
    model = network()
    optimizer = still(model)
    attachment = specops.attach(optimizer, model, PENALTY)
    settle_still(model, optimizer)
    optimizer.zero_grad()
    for seed in range(3):
        backward(model, batch(seed=seed))
    with gradients_added(model, optimizer) as added:
        optimizer.step()
    penalty_of(plain := network()).backward()
    for name, g in gradients(plain).items():
        assert_relative(added[name], g, 1e-4)
    assert len({r["step"] for r in attachment.history}) * 3 == len(attachment.history)


def settle_still(model: nn.Module, optimizer: Any) -> None:
    """Let the vectors converge."""
    for _ in range(100):
        optimizer.zero_grad()
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
        optimizer.step()


def test_a_group_added_later_is_penalised_at_its_first_step() -> None:
    model = network()
    optimizer = torch.optim.SGD(model[0].parameters(), lr=0.0)
    specops.attach(optimizer, model, PENALTY)
    optimizer.add_param_group({"params": list(model[5].parameters())})
    backward(model, batch())
    with gradients_added(model, optimizer) as added:
        optimizer.step()
    assert added["5.weight"].any()


# Scaled losses


OPTIMIZERS = {
    "SGD": lambda p, **o: torch.optim.SGD(p, lr=0.1, momentum=0.9, **o),
    "Adam": lambda p, **o: torch.optim.Adam(p, lr=0.01, **o),
}


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
@pytest.mark.parametrize("fused", [False, True], ids=["", "fused"])
@pytest.mark.parametrize("unscaled", [False, True], ids=["", "unscaled"])
def test_a_scaled_loss_gives_the_same_weights(make: Any, fused: bool, unscaled: bool) -> None:
    plain, model = network(), network()
    optimizer = make(plain.parameters())
    specops.attach(optimizer, plain, PENALTY)
    train(plain, optimizer, 4)
    optimizer = make(model.parameters(), fused=fused)
    attachment = specops.attach(optimizer, model, PENALTY)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for step in range(4):
        optimizer.zero_grad()
        scaler.scale(model(batch(seed=step)).square().mean()).backward()
        if unscaled:
            scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
    assert attachment.steps == 4
    for name, p in plain.named_parameters():
        torch.testing.assert_close(model.get_parameter(name), p, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
@pytest.mark.parametrize("fused", [False, True], ids=["", "fused"])
def test_overflows_are_no_steps(make: Any, fused: bool) -> None:
    model = network()
    optimizer = make(model.parameters(), fused=fused)
    attachment = specops.attach(
        optimizer, model, Plan([("5.*", ClipSpectralNorm(0.1)), ("*", PENALTY)])
    )
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    before = copy.deepcopy(model.state_dict())
    (model(batch()).square().mean() * float("inf")).backward()
    scaler.scale(torch.zeros((), requires_grad=True)).backward()
    scaler.step(optimizer)
    scaler.update()
    assert attachment.steps == 0
    assert not attachment.history
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])


# Closures


def test_a_closure_returns_the_penalised_loss() -> None:
    model = network().double()
    optimizer = still(model)
    specops.attach(optimizer, model, PENALTY)
    settle_still(model, optimizer)
    x = batch().double()

    def closure() -> Any:
        optimizer.zero_grad()
        return backward(model, x)

    plain = network().double()
    loss = backward(plain, x)
    penalty_of(plain).backward()
    expected = float(loss) + float(penalty_of(plain).detach())
    for value in (
        optimizer.step(closure),
        optimizer.step(closure=closure),
        optimizer.step(lambda: float(closure())),
    ):
        assert float(value) == pytest.approx(expected, rel=1e-8)
        for name, g in gradients(plain).items():
            assert_relative(model.get_parameter(name).grad, g, 1e-6)


def regression() -> tuple[nn.Linear, Any, Any]:
    """A model, inputs and targets whose best weight has one largest singular value."""
    torch.manual_seed(0)
    model, x = nn.Linear(4, 3).double(), torch.randn(30, 4).double()
    return model, x, x @ torch.diag(torch.tensor([3.0, 1.0, 0.5, 0.0]).double())[:, :3]


@pytest.mark.parametrize("search", [None, "strong_wolfe"])
def test_lbfgs_finds_the_penalised_optimum(search: Any) -> None:
    model, x, y = regression()
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=20, line_search_fn=search)
    attachment = specops.attach(optimizer, model, PENALTY)

    def closure() -> Any:
        optimizer.zero_grad()
        loss = (model(x) - y).square().mean()
        loss.backward()
        return loss

    plain = closure()
    slope = float(model.weight.grad.norm())
    for _ in range(80):
        # Its picture of the curvature is that of a function with other vectors.
        optimizer.state.clear()
        loss = optimizer.step(closure)
    assert attachment.steps == 80
    w = model.weight.detach().clone().requires_grad_()
    fit = (nn.functional.linear(x, w, model.bias.detach()) - y).square().mean()
    total = fit + 0.15 * top(w) ** 2
    total.backward()
    assert float(w.grad.norm()) < 1e-4 * slope
    # The step returns the loss before it, which has converged by now.
    assert float(loss) == pytest.approx(float(total.detach()), rel=1e-7)
    assert float(fit.detach()) < float(plain.detach())


def test_vectors_advance_once_however_often_a_closure_is_called() -> None:
    model, x, y = regression()
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=5)
    attachment = specops.attach(optimizer, model, PENALTY)
    states: list[Any] = []

    def closure() -> Any:
        optimizer.zero_grad()
        loss = (model(x) - y).square().mean()
        loss.backward()
        states.append(attachment._constrained[0].state)
        return loss

    optimizer.step(closure)
    before, weight = states[-1], model.weight.detach().clone()
    states.clear()
    optimizer.step(closure)
    once = PENALTY.update(weight, specops.Dense(), before)[1]
    assert len(states) > 1
    assert not torch.equal(before["u0"], once["u0"])
    for state in (*states, state_of(attachment, "weight")):
        torch.testing.assert_close(state["u0"], once["u0"])


def test_closures_may_return_nothing() -> None:
    model, x, y = regression()
    optimizer = still(model)
    specops.attach(optimizer, model, PENALTY)
    assert optimizer.step(lambda: (model(x) - y).square().mean().backward()) is None
    before = model.weight.grad.clone()
    (model(x) - y).square().mean().backward()
    assert not torch.allclose(model.weight.grad, 2 * before)


def closure_of(model: nn.Module, optimizer: Any) -> Any:
    def closure() -> Any:
        optimizer.zero_grad()
        return backward(model, batch())

    return closure


def test_closures_are_in_the_history_too() -> None:
    histories = []
    for closed in (False, True):
        model = network()
        optimizer = still(model)
        attachment = specops.attach(optimizer, model, PENALTY)
        if closed:
            optimizer.step(closure_of(model, optimizer))
        else:
            train(model, optimizer)
        histories.append([(r["name"], pytest.approx(r["penalty"])) for r in attachment.history])
    assert histories[1] == histories[0]


def test_closures_follow_the_policy_for_weights_that_are_not_finite() -> None:
    model = network()
    optimizer = still(model)
    specops.attach(optimizer, model, PENALTY)
    with torch.no_grad():
        model[5].weight[0, 0] = float("nan")
    with pytest.raises(errors.NonFiniteError, match=r"5\.weight holds NaN or infinity at step 1"):
        optimizer.step(closure_of(model, optimizer))


def test_closures_that_fail_name_the_layer() -> None:
    model = network()
    optimizer = still(model)
    specops.attach(optimizer, model, SpectralNormPenalty(lambda *_: 1 / 0, norm="reshaped"))
    with pytest.raises(ZeroDivisionError) as raised:
        optimizer.step(closure_of(model, optimizer))
    assert "0.weight at step 1" in raised.value.__notes__[0]


# Without an optimizer


@pytest.mark.parametrize("plan", [PENALTY, Plan([("5.*", ClipSpectralNorm(0.1)), ("*", PENALTY)])])
def test_optimizers_that_step_in_backward_give_the_same_weights(plan: Any) -> None:
    plain, model = network(), network()
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.1)
    specops.attach(optimizer, plain, plan)
    train(plain, optimizer, 3)
    attachment = specops.attach(None, model, plan)
    optimizers = {p: torch.optim.SGD([p], lr=0.1) for p in model.parameters()}

    def step(p: Any) -> None:
        attachment.before_step(p)
        optimizers[p].step()
        attachment.step(p)
        optimizers[p].zero_grad()

    hooks = [p.register_post_accumulate_grad_hook(step) for p in model.parameters()]
    for seed in range(3):
        backward(model, batch(seed=seed))
    assert attachment.steps == 3
    assert {(r["step"], r["name"]) for r in attachment.history} == {
        (s, f"{n}.weight") for s in (1, 2, 3) for n in (0, 2, 5)
    }
    for name, p in plain.named_parameters():
        torch.testing.assert_close(model.get_parameter(name), p, rtol=1e-4, atol=1e-6)
    for hook in hooks:
        hook.remove()


# Scales


@pytest.mark.parametrize("shared", [False, True], ids=["", "shared"])
@pytest.mark.parametrize("named", [False, True], ids=["", "named"])
@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW], ids=["SGD", "AdamW"])
def test_trainable_scales_are_in_a_group_of_their_own(kind: Any, named: bool, shared: bool) -> None:
    if named and tuple(map(int, torch.__version__.split(".")[:2])) < (2, 6):
        pytest.skip("optimizers take no named parameters yet")
    model, x = network(), batch()
    given = list(model.named_parameters() if named else model.parameters())
    groups = [{"params": given[:2]}, {"params": given[2:]}]
    optimizer = kind(groups, lr=0.01, weight_decay=0.5)
    plain = optimizer.state_dict()
    rule = SpectralNormalization(norm="reshaped", scale=TrainableScale(1.5, shared=shared))
    attachment = specops.attach(optimizer, model, rule)
    names = ["shared"] if shared else ["0.weight", "2.weight", "5.weight"]
    assert sorted(attachment.scales) == names
    group = optimizer.param_groups[-1]
    assert [id(p) for p in group["params"]] == [id(p) for p in attachment.scales.values()]
    assert group["weight_decay"] == 0.0
    for p in (*model.parameters(), *attachment.scales.values()):
        p.grad = torch.zeros_like(p)
    w = model[5].weight.detach().clone()
    optimizer.step()
    assert all(float(s.detach()) == 1.5 for s in attachment.scales.values())
    assert not torch.equal(model[5].weight, w)
    optimizer.zero_grad()
    backward(model, x)
    optimizer.step()
    scales = {n: float(s.detach()) for n, s in attachment.scales.items()}
    assert all(s != 1.5 for s in scales.values())
    model.zero_grad()
    used = top(in_use(model, "5.weight", x))
    assert float(used) == pytest.approx(scales["shared" if shared else "5.weight"], rel=1e-2)
    attachment.detach()
    now = optimizer.state_dict()
    assert now["param_groups"] == plain["param_groups"]
    assert set(now["state"]) <= set(range(6))


@pytest.mark.parametrize("to_none", [True, False], ids=["", "zeros"])
def test_gradients_of_scales_do_not_add_up_where_only_the_model_is_reset(to_none: bool) -> None:
    scales = []
    for reset_by_model in (False, True):
        model = network()
        optimizer = sgd(model)
        attachment = specops.attach(optimizer, model, FORWARD["trained"])
        for seed in range(3):
            (model if reset_by_model else optimizer).zero_grad(set_to_none=to_none)
            backward(model, batch(seed=seed))
            optimizer.step()
            backward(model, batch(seed=seed))  # of a generator, which others train
        scales.append([float(s.detach()) for s in attachment.scales.values()])
    assert scales[0] == scales[1]


def test_groups_without_parameters_survive_a_scale() -> None:
    model = network()
    optimizer = torch.optim.SGD([{"params": model.parameters()}, {"params": []}], lr=0.1)
    specops.attach(optimizer, model, FORWARD["trained"]).detach()
    assert len(optimizer.param_groups) == 2


@pytest.mark.parametrize(("lr", "every"), [(0.0, 2), (0.01, 1)])
def test_schedules_of_scales_are_followed(lr: float, every: int) -> None:
    model, x, seen = network(), batch(), []

    def scale(step: int, name: str, geometry: Any) -> float:
        seen.append(name)
        return 1.0 + step

    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    rule = SpectralNormalization(norm="reshaped", scale=scale, iterations=5)
    specops.attach(optimizer, model, rule, every=every)
    for step in range(1, 5):
        assert float(top(in_use(model, "5.weight", x))) == pytest.approx(1.0 + step, rel=0.02)
        train(model, optimizer)
    assert set(seen) == {"0.weight", "2.weight", "5.weight"}


def test_schedules_of_ranks_are_followed_and_checked() -> None:
    model, x = network().double(), batch().double()
    ratios = [0.4, 0.5, 0.6, 1.5]
    rule = StableRankNormalization(lambda step, *_: ratios[step - 1], norm="reshaped")
    optimizer = still(model)
    specops.attach(optimizer, model, Plan([("2.weight", rule)]))
    for ratio in ratios[:3]:
        used = in_use(model, "2.weight", x).transpose(0, 1).flatten(1)
        values = torch.linalg.svdvals(used)
        assert float(values.square().sum() / values[0] ** 2) == pytest.approx(3 * ratio, rel=1e-3)
        backward(model, x)
        if ratio < 0.6:
            optimizer.step()
    with pytest.raises(ValueError, match="ratio must be"):
        optimizer.step()


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan")])
@pytest.mark.parametrize("bad", [1, 3])
def test_schedules_of_scales_are_checked(value: float, bad: int) -> None:
    model = network()
    rule = SpectralNormalization(norm="reshaped", scale=lambda s, *_: value if s == bad else 1.0)

    def run() -> None:
        optimizer = sgd(model)
        specops.attach(optimizer, model, rule)
        train(model, optimizer, 3)

    with pytest.raises(ValueError, match="scale"):
        run()
