"""What people do to a layer under a forward rule, and that its weight in use stays the rule's."""

from __future__ import annotations

import copy
import io
import pickle
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import specops
from specops import (
    Dense,
    Plan,
    SpectralNormalization,
    StableRankNormalization,
    TrainableScale,
    errors,
)
from tests.torch_adapter.models import Halved, new_compilers, raw, sgd, top

torch = pytest.importorskip("torch")
from torch import nn  # noqa: E402

import specops_torch  # noqa: E402
from specops_torch.fast_paths import advanced  # noqa: E402
from specops_torch.in_use import InUse  # noqa: E402

SN = SpectralNormalization(norm="reshaped")
SRN = StableRankNormalization(0.4, norm="reshaped")
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")


def linear(*shape: int, rule: Any = SN, **options: Any) -> tuple[nn.Linear, Any]:
    torch.manual_seed(0)
    layer = nn.Linear(shape[1], shape[0], bias=False)
    return layer, specops.attach(None, layer, rule, **options)


def used(layer: nn.Linear) -> float:
    """The norm of a linear layer without bias as it computes, in double precision."""
    y = layer(torch.eye(layer.in_features, dtype=raw(layer).dtype))
    return float(np.linalg.norm(y.detach().double().numpy(), 2))


# Written to from outside, in every way that torch counts


def load(layer: nn.Linear) -> None:
    layer.load_state_dict({"weight": 3 * torch.randn_like(raw(layer))})


def average(layer: nn.Linear) -> None:
    with torch.no_grad():
        raw(layer).lerp_(torch.randn_like(raw(layer)), 0.7)


def rows(layer: nn.Linear) -> None:
    with torch.no_grad():
        layer.weight[len(raw(layer)) // 2 :] = 5.0 * torch.randn(1, layer.in_features)


def through_a_view(layer: nn.Linear) -> None:
    with torch.no_grad():
        raw(layer).view(-1)[::2] *= -7.0


def replaced(layer: nn.Linear) -> None:
    layer.weight = nn.Parameter(torch.randn_like(raw(layer)))


def assigned(layer: nn.Linear) -> None:
    layer.load_state_dict({"weight": torch.randn_like(raw(layer))}, assign=True)


def moved(layer: nn.Linear) -> None:
    raw(layer).data = torch.randn_like(raw(layer))


WRITES = {
    "load_state_dict": load,
    "an average": average,
    "new rows": rows,
    "through a view": through_a_view,
    "another parameter": replaced,
    "assign=True": assigned,
    "another memory": moved,
    "reset_parameters": lambda layer: layer.reset_parameters(),
    "an initialiser": lambda layer: nn.init.normal_(layer.weight, std=3.0),
    "copy_ of the attribute": lambda layer: layer.weight.detach_().copy_(
        torch.randn_like(raw(layer))
    ),
    "bf16 and back": lambda layer: layer.bfloat16().float(),
}


@pytest.mark.parametrize("name", list(WRITES))
@pytest.mark.parametrize("rule", [SN, SRN, SpectralNormalization(norm="reshaped", scale=2.0)])
def test_writes_are_seen_at_the_next_use(rule: Any, name: str) -> None:
    layer, attachment = linear(12, 16, rule=rule, every=10)
    scale = getattr(rule, "scale", 1.0)
    used(layer)
    WRITES[name](layer)
    assert used(layer) == pytest.approx(scale, rel=1e-3)
    assert attachment.report()["weight"].norm == pytest.approx(scale, rel=1e-3)
    (weight,) = attachment.weights().values()
    assert float(top(weight.detach())) == pytest.approx(scale, rel=1e-3)
    attachment.detach(fold=True)
    assert float(top(layer.weight.detach())) == pytest.approx(scale, rel=1e-3)


def test_what_is_written_to_the_attribute_reaches_the_parameter() -> None:
    layer, _ = linear(6, 8)
    weight = raw(layer)
    with torch.no_grad():
        layer.weight.copy_(torch.arange(48.0).view(6, 8))
        layer.weight[0] = -1.0
        layer.weight *= 2.0
    assert raw(layer) is weight
    assert torch.equal(weight[0], torch.full((8,), -2.0))
    assert float(weight[1, 0].detach()) == 16.0
    layer.weight.grad = torch.ones(6, 8)
    layer.weight.grad[2, 3] = 5.0
    assert float(weight.grad[2, 3]) == 5.0
    layer.weight.requires_grad = False
    assert not weight.requires_grad
    assert not layer.weight.requires_grad
    layer.weight.requires_grad_()
    assert weight.requires_grad
    layer.weight.data = torch.eye(6, 8)
    assert torch.equal(weight.detach(), torch.eye(6, 8))
    nn.init.constant_(layer.weight, 3.0)
    assert torch.equal(weight.detach(), torch.full((6, 8), 3.0))
    # What is read from it are plain tensors with the numbers in use.
    assert type(layer.weight + 0) is torch.Tensor
    for made in (copy.deepcopy(layer.weight), pickle.loads(pickle.dumps(layer.weight))):
        assert type(made) is torch.Tensor
        assert float(torch.linalg.matrix_norm(made, 2)) == pytest.approx(1.0, rel=1e-5)


def test_what_others_write_while_a_step_is_measured_is_seen(monkeypatch: Any) -> None:
    """Threads that train one model; the same for the first look at a weight."""
    layer = nn.Linear(6, 6, bias=False)
    optimizer = torch.optim.SGD(layer.parameters(), 0.01)

    def racing(find: Any) -> Any:
        def found(*args: Any) -> Any:
            result = find(*args)
            with torch.no_grad():
                raw(layer).mul_(3.0)
            return result

        return found

    def norm() -> float:
        return float(torch.linalg.matrix_norm(layer.weight.detach(), 2))

    monkeypatch.setattr("specops_torch.in_use.InUse._measured", racing(InUse._measured))
    specops.attach(optimizer, layer, SpectralNormalization(norm="reshaped"))
    monkeypatch.undo()
    assert norm() == pytest.approx(1.0, rel=0.02)
    monkeypatch.setattr("specops_torch.constrained.advanced", racing(advanced))
    layer(torch.ones(2, 6)).square().mean().backward()
    optimizer.step()
    assert norm() == pytest.approx(1.0, rel=0.02)


def test_writes_that_torch_does_not_count_need_a_refresh() -> None:
    layer, attachment = linear(6, 8)
    used(layer)
    w = raw(layer).detach().numpy()
    w[3:] = 40.0 * np.random.default_rng(0).standard_normal((3, 8))
    attachment.refresh()
    assert used(layer) == pytest.approx(1.0, rel=1e-4)


@pytest.mark.parametrize("rule", [SN, SRN, SpectralNormalization(norm="operator")])
def test_whole_writes_that_torch_does_not_count_are_seen_in_a_sample(rule: Any) -> None:
    """As evolution strategies write, whose memory is often that of the tensor before."""
    layer, _ = linear(6, 8, rule=rule)
    for seed in range(6):
        for scale in (1.0, 50.0):
            vector = scale * torch.randn(48, generator=torch.Generator().manual_seed(seed))
            nn.utils.vector_to_parameters(vector, layer.parameters())
        assert used(layer) == pytest.approx(1.0, rel=1e-4)
        raw(layer).data.copy_(torch.randn(6, 8))
        assert used(layer) == pytest.approx(1.0, rel=1e-4)


@pytest.mark.parametrize("recorded", [True, False], ids=["", "no_grad"])
@pytest.mark.parametrize("rule", [SN, SRN], ids=["", "rank"])
def test_lost_writes_are_said(rule: Any, recorded: bool) -> None:
    layer, _ = linear(8, 8, rule=rule)
    before = raw(layer).detach().clone()
    for write in (
        lambda: nn.init.orthogonal_(layer.weight),
        lambda: nn.init.eye_(layer.weight),
    ):
        with (
            pytest.warns(errors.CautionWarning, match="are lost"),
            torch.set_grad_enabled(recorded),
        ):
            write()
    assert torch.equal(raw(layer).detach(), before)
    # Views that are only read say nothing, with gradients or without.
    with torch.no_grad():
        assert float(layer.weight[0].norm()) > 0
    layer.weight.view(-1).sum().backward()


def test_an_attribute_error_of_a_rule_is_not_taken_for_a_missing_weight() -> None:
    class Typo(Halved):
        def apply(self, weight: Any, geometry: Any, state: Any, **_: Any) -> Any:
            return weight * self.missing  # type: ignore[attr-defined]

    layer = nn.Linear(4, 4)
    specops.attach(None, layer, Typo())
    with pytest.raises(errors.AdapterError, match="missing"):
        layer(torch.ones(1, 4))


def test_gradient_hooks_stay() -> None:
    layer, _ = linear(4, 4)
    seen: list[int] = []
    layer.weight.register_hook(lambda g: seen.append(1))
    layer(torch.ones(1, 4)).sum().backward()
    assert seen == [1]


@pytest.mark.parametrize("how", ["frozen", "group"])
def test_a_frozen_layer_goes_on_as_it_was(how: str) -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    attachment = specops.attach(optimizer, model, SN)
    model[0].requires_grad_(False)
    x = torch.randn(2, 8)
    wanted = model(x).detach()
    head = nn.Linear(8, 1)
    if how == "group":
        optimizer.add_param_group({"params": list(head.parameters())})
    else:
        model[1].requires_grad_(False)
        optimizer.step()
        model[1].requires_grad_()
    head(model(x)).sum().backward()
    optimizer.step()
    torch.testing.assert_close(model(x), wanted)
    model[0].requires_grad_()
    model(x).sum().backward()
    optimizer.step()
    torch.testing.assert_close(model(x), wanted)
    attachment.detach()
    assert type(model[0]) is nn.Linear


@pytest.mark.parametrize("rule", [SN, specops.ClipSpectralNorm(1.0, norm="reshaped")])
@pytest.mark.parametrize("how", ["frozen", "taken out"])
@pytest.mark.parametrize("declared", [False, True], ids=["", "declared"])
def test_a_pattern_may_lose_its_last_layer(rule: Any, how: str, declared: bool) -> None:
    """Which is no reason to stop a run when a group is added."""
    model = nn.ModuleList([nn.Linear(4, 4, bias=False) for _ in range(2)])
    optimizer = torch.optim.SGD(model[0].parameters(), 1e-3)
    attachment = specops.attach(
        optimizer,
        model,
        Plan([("0.weight", rule), ("*", SN)]),
        geometries={"0.weight": Dense(splits=(2, 2))} if declared else None,
    )
    model[0].weight.requires_grad_(False)
    if how == "taken out":
        model[0] = nn.Identity()
    optimizer.add_param_group({"params": list(model[1].parameters())})
    for _ in range(2):
        model[1](torch.ones(2, 4)).square().sum().backward()
        optimizer.step()
        assert used(model[1]) == pytest.approx(1.0, rel=1e-3)
    assert attachment.report()["1.weight"].norm == pytest.approx(1.0, rel=1e-3)


def test_a_map_may_be_declared_of_a_frozen_layer() -> None:
    """Which scripts declare for every layer, whatever is frozen today."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[0].weight.requires_grad_(False)
    maps = {"0.weight": Dense(splits=(2, 2)), "1.weight": Dense(splits=(2, 2))}
    report = specops.attach(None, model, SN, geometries=maps).report()
    assert [row.name for row in report.constrained] == ["1.weight"]
    with pytest.raises(errors.PlanError, match=r"'0.bias', which no matrix matches"):
        specops.attach(None, model, SN, geometries={"0.bias": Dense()})


def test_a_layer_that_was_frozen_within_a_run_is_named_where_it_resumes() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    optimizer = torch.optim.SGD(model.parameters(), 1e-3)
    attachment = specops.attach(optimizer, model, SN)
    model[0].weight.requires_grad_(False)
    model(torch.ones(2, 4)).sum().backward()
    optimizer.step()
    saved, wanted = attachment.state_dict(), model(torch.ones(2, 4))
    attachment.detach()
    attachment = specops.attach(None, model, SN)
    with pytest.raises(errors.AdapterError, match=r"0\.weight had a rule .*frozen.* first, then"):
        attachment.load_state_dict(saved)
    attachment.detach()
    model[0].weight.requires_grad_(True)
    attachment = specops.attach(None, model, SN)
    attachment.load_state_dict(saved)
    model[0].weight.requires_grad_(False)
    torch.testing.assert_close(model(torch.ones(2, 4)), wanted)


def test_a_group_that_a_rule_cannot_take_on_leaves_the_others_as_they_were() -> None:
    class Fails(Halved):
        def init(self, weight: Any, geometry: Any, name: str) -> Any:
            raise errors.StateError("no state")

    model = nn.Sequential(nn.Linear(8, 8, bias=False), nn.Linear(8, 8))
    optimizer = torch.optim.SGD(model[0].parameters(), lr=0.1)
    plan = Plan([("0.weight", SN), ("1.*", Fails())])
    with pytest.raises(errors.PlanError):
        specops.attach(optimizer, model, plan)
    attachment = specops.attach(optimizer, model, Plan([("0.weight", SN), ("*", Fails())]))
    optimizer.add_param_group({"params": list(model[1].parameters())})
    for _ in range(2):
        model(torch.randn(2, 8)).sum().backward()
        with pytest.raises(errors.StateError, match=r"1\.weight: no state"):
            optimizer.step()
        assert used(model[0]) == pytest.approx(1.0, rel=1e-4)
    assert [row.name for row in attachment.report().constrained] == ["0.weight"]
    attachment.detach()
    assert [type(layer) for layer in model] == [nn.Linear, nn.Linear]


def test_a_copy_of_a_copy_has_vectors_of_its_own_weight() -> None:
    layer, _ = linear(16, 16)
    twin = copy.deepcopy(layer)
    first = {k: v.clone() for k, v in twin.state_dict().items()}
    load(twin)
    twin(torch.randn(2, 16))
    twin.load_state_dict(first)
    assert used(copy.deepcopy(twin)) == pytest.approx(1.0, rel=1e-3)


def test_large_stacks_under_vmap_and_swapped_parameters() -> None:
    layer, _ = linear(100, 100)
    stacked = {"weight": torch.stack([raw(layer).detach(), 2 * torch.randn(100, 100)])}
    y = torch.vmap(lambda p: torch.func.functional_call(layer, p, (torch.eye(100),)))(stacked)
    for one in y:
        assert float(top(one.detach())) == pytest.approx(1.0, rel=1e-3)
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        layer.double()
        assert used(layer) == pytest.approx(1.0, rel=1e-3)
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)


def test_scales_of_another_optimizer_are_trained() -> None:
    layer = nn.Linear(4, 4)
    rule = SpectralNormalization(norm="reshaped", scale=TrainableScale())
    attachment = specops.attach(None, layer, rule)
    ours = torch.optim.SGD(layer.parameters(), lr=0.1)
    theirs = torch.optim.SGD(attachment.scales.values(), lr=0.1)
    layer(torch.ones(2, 4)).square().sum().backward()
    ours.step()
    attachment.step()
    theirs.step()
    assert float(next(iter(attachment.scales.values())).detach()) != 1.0


# Random lives


@st.composite
def lives(draw: Any) -> dict[str, Any]:
    act = st.sampled_from(
        ["step", "step", "step", "load", "average", "freeze", "cast", "copy", "thread", "rows"]
    )
    return {
        "shape": (draw(st.integers(2, 24)), draw(st.integers(2, 24))),
        "every": draw(st.integers(1, 10)),
        "seed": draw(st.integers(0, 2**16)),
        "size": draw(st.sampled_from([1e-3, 1.0, 1e3])),
        "acts": draw(st.lists(act, min_size=3, max_size=25)),
    }


@pytest.mark.parametrize(
    "rule", [SN, StableRankNormalization(0.6, norm="reshaped")], ids=["normalised", "limited"]
)
def test_the_norm_in_use_is_the_rules_through_any_life(rule: Any) -> None:
    """Within 2 % after anything that happens, against singular values in double precision."""

    @settings(max_examples=60)
    @given(lives())
    def run(life: dict[str, Any]) -> None:
        torch.manual_seed(life["seed"])
        rows_, columns = life["shape"]
        layer = nn.Linear(columns, rows_, bias=False)
        with torch.no_grad():
            layer.weight.mul_(life["size"])
        optimizer = torch.optim.SGD(layer.parameters(), lr=0.02)
        attachment = specops.attach(optimizer, layer, rule, every=life["every"])
        for act in life["acts"]:
            if act == "step":
                optimizer.zero_grad()
                y = layer(torch.randn(8, columns))
                if not y.requires_grad:
                    continue
                y.square().mean().backward()
                with torch.no_grad():
                    g = raw(layer).grad
                    if g is not None:
                        # Of a twentieth of the weight: large for training.
                        length = float(g.norm()) or 1.0
                        g.mul_(0.05 / 0.02 * float(raw(layer).norm()) / length)
                optimizer.step()
            elif act == "load":
                load(layer)
            elif act == "average":
                average(layer)
            elif act == "rows":
                rows(layer)
            elif act == "freeze":
                layer.weight.requires_grad = not raw(layer).requires_grad
            elif act == "cast":
                layer.bfloat16().float()
            elif act == "copy":
                twin = copy.deepcopy(layer)
                assert abs(used(twin) - used(layer)) <= 1e-3
                load(twin)
                assert abs(used(twin) - 1.0) <= 0.02
            else:
                norms: list[float] = []
                workers = [
                    threading.Thread(target=lambda n=norms: n.append(used(layer))) for _ in range(3)
                ]
                for worker in workers:
                    worker.start()
                for worker in workers:
                    worker.join()
                assert max(norms) - min(norms) <= 1e-6
            assert abs(used(layer) - 1.0) <= 0.02, act
        attachment.detach()

    run()


class Uncounted(torch.optim.Optimizer):
    """Writes as old optimizers do, which torch does not count."""

    def __init__(self, parameters: Any, lr: float) -> None:
        super().__init__(parameters, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                p.data.add_(p.grad, alpha=-group["lr"])


@pytest.mark.parametrize("rule", [SN, SRN, SpectralNormalization(norm="operator")])
@pytest.mark.parametrize("every", [1, 4])
@pytest.mark.parametrize("how", ["step", "closure", "by hand", "not counted"])
def test_a_weight_that_was_zero_has_no_directions_yet(rule: Any, every: int, how: str) -> None:
    """A head that starts at zero: the first steps away from it, before vectors are due."""
    torch.manual_seed(0)
    layer = nn.Linear(12, 8, bias=False)
    nn.init.zeros_(layer.weight)
    kind = Uncounted if how == "not counted" else torch.optim.SGD
    optimizer: Any = kind(layer.parameters(), lr=0.01)
    attachment = specops.attach(None if how == "by hand" else optimizer, layer, rule, every=every)
    x, y = torch.randn(32, 12), torch.randn(32, 8)

    def loss() -> Any:
        optimizer.zero_grad()
        value = (layer(x) - y).square().mean()
        value.backward()
        with torch.no_grad():
            raw(layer).grad = -0.01 * (x.T @ y).T  # of a zero weight in use there is none
        return value

    for _ in range(3):
        optimizer.step(loss) if how == "closure" else (loss(), optimizer.step())
        if how == "by hand":
            attachment.step()
        assert used(layer) == pytest.approx(1.0, rel=0.02)


@pytest.mark.parametrize("norm", ["reshaped", "operator", "bidirectional"])
@pytest.mark.parametrize("how", ["resumed", "data"])
def test_a_kernel_that_was_zero_is_measured_when_it_is_none(norm: Any, how: str) -> None:
    """By a run that resumes after the first step away from zero, or by a write not counted."""

    def begun() -> tuple[nn.Conv2d, Any]:
        torch.manual_seed(0)
        layer = nn.Conv2d(3, 4, 3, padding=1, bias=False)
        nn.init.zeros_(layer.weight)
        attachment = specops.attach(None, layer, SpectralNormalization(norm=norm), every=4)
        layer(torch.zeros(1, 3, 6, 6))
        return layer, attachment

    layer, attachment = begun()
    kernel = torch.randn(4, 3, 3, 3)
    if how == "resumed":
        with torch.no_grad():
            raw(layer).copy_(kernel)
        attachment.step()
        saved = copy.deepcopy(layer.state_dict()), attachment.state_dict()
        layer, attachment = begun()
        layer.load_state_dict(saved[0])
        attachment.load_state_dict(saved[1])
    else:
        raw(layer).data.copy_(kernel)
    (geometry,) = attachment.geometries().values()
    reference = SpectralNormalization(norm=norm)
    wanted = reference.apply(kernel, geometry, reference.init(kernel, geometry, "weight"))
    torch.testing.assert_close(layer.weight.detach().as_subclass(torch.Tensor), wanted)


def test_a_step_that_leaves_zeros_on_a_device_finds_no_directions_either() -> None:
    """A warmup from a rate of zero: whether a weight is zero a device is asked while it is."""

    class Elsewhere(nn.Parameter):
        is_cpu = False

    in_use = InUse(SN, "weight", Dense(), None)
    weight = Elsewhere(torch.zeros(4, 3))
    in_use.measure(weight)
    assert in_use.forgotten
    in_use.take(SN.init(weight.detach(), Dense(), "weight"), weight)
    assert in_use.forgotten
    weight.data.fill_(1.0)
    in_use.take(SN.init(weight.detach(), Dense(), "weight"), weight)
    assert not in_use.forgotten


# Copies, replicas, functional calls


def test_replicas_of_data_parallel_use_their_own_tensors() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.LSTM(6, 3))
    specops.attach(None, model, SN)
    x = torch.randn(5, 4)
    wanted = model(x)[0]
    replicas = [m._replicate_for_data_parallel() for m in model.modules()]
    _, first, _, recurrent = replicas
    for replica, module in ((first, model[0]), (recurrent, model[2])):
        for name, p in module._parameters.items():
            setattr(replica, name, 3.0 * p if p.ndim > 1 else p.clone())
    torch.testing.assert_close(recurrent(torch.relu(first(x)))[0], wanted)


@pytest.mark.parametrize("norm", ["reshaped", "operator"])
def test_a_weight_written_to_is_first_met_in_a_transform(norm: Any) -> None:
    """By a closure, where the parameter itself is mapped or differentiated by nothing."""
    layer, x = nn.Conv2d(3, 4, 3, padding=1, bias=False), torch.randn(2, 3, 6, 6)
    specops.attach(None, layer, SpectralNormalization(norm=norm))
    with torch.no_grad():
        y = layer(x)
    calls: list[Any] = [
        lambda: torch.func.grad_and_value(lambda x: layer(x).square().sum())(x)[1].sqrt(),
        lambda: torch.vmap(lambda x: layer(x[None]))(x).flatten().norm(),
        lambda: torch.func.jvp(layer, (x,), (x,))[1].norm(),
    ]
    for call in calls:
        with torch.no_grad():
            raw(layer).mul_(5.0)
        torch.testing.assert_close(call().detach(), y.norm(), rtol=1e-3, atol=0.0)


def test_an_ensemble_under_vmap_normalises_each() -> None:
    models = [linear(8, 8)[0] for _ in range(3)]
    for k, model in enumerate(models):
        with torch.no_grad():
            raw(model).copy_(torch.randn(8, 8) * 10.0**k)
    parameters, buffers = torch.func.stack_module_state(models)
    base = copy.deepcopy(models[0])
    y = torch.vmap(lambda p, b: torch.func.functional_call(base, (p, b), (torch.eye(8),)))(
        parameters, buffers
    )
    for one in y:
        assert float(top(one.detach())) == pytest.approx(1.0, rel=1e-2)


def test_functional_calls_do_not_disturb_the_layers_own_vectors() -> None:
    layer, attachment = linear(8, 8)
    before = attachment.state_dict()["weights"]["weight"]["state"]
    other = {"weight": nn.Parameter(torch.randn(8, 8))}
    y = torch.func.functional_call(layer, other, (torch.eye(8),))
    assert float(top(y.detach())) == pytest.approx(1.0, rel=1e-4)
    after = attachment.state_dict()["weights"]["weight"]["state"]
    assert all(torch.equal(before[key], after[key]) for key in before)


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "save"])
def test_copies_of_every_kind_of_layer(how: str) -> None:
    model = nn.ModuleList(
        [nn.Linear(4, 4), nn.Conv2d(2, 3, 3), nn.LSTM(3, 4, 2), nn.MultiheadAttention(8, 2)]
    )
    inputs = [
        (torch.randn(2, 4),),
        (torch.randn(1, 2, 5, 5),),
        (torch.randn(3, 2, 3),),
        (torch.randn(3, 1, 8),) * 3,
    ]
    specops.attach(None, model, SN)
    if how == "deepcopy":
        twin = copy.deepcopy(model)
    elif how == "pickle":
        twin = pickle.loads(pickle.dumps(model))
    else:
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        twin = torch.load(file, weights_only=False)
    for ours, theirs, x in zip(model, twin, inputs, strict=True):
        a, b = ours(*x), theirs(*x)
        torch.testing.assert_close(*(y[0] if isinstance(y, tuple) else y for y in (a, b)))
        assert type(ours).__name__ == type(theirs).__name__


@pytest.mark.parametrize(
    "layer", [nn.LSTM(6, 6), nn.GRU(6, 6), nn.Linear(6, 6)], ids=["LSTM", "GRU", "linear"]
)
def test_threads_share_a_module(layer: Any) -> None:
    layer, x = copy.deepcopy(layer).eval(), torch.randn(5, 3, 6)
    specops.attach(None, layer, SN)
    wrong: list[int] = []

    def output() -> Any:
        y = layer(x)
        return y[0] if isinstance(y, tuple) else y

    with torch.no_grad():
        wanted = output()

    def work() -> None:
        with torch.no_grad():
            wrong.extend(1 for _ in range(40) if not torch.allclose(output(), wanted, atol=1e-6))

    workers = [threading.Thread(target=work) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong


def test_while_a_parameter_is_assigned_others_see_the_weight_in_use() -> None:
    """Other threads, and copies that are made meanwhile, which kept the raw weight for ever."""
    layer, _ = linear(6, 8)
    found: list[float] = []

    def look(module: nn.Module, name: str, parameter: Any) -> None:
        thread = threading.Thread(target=lambda: found.append(used(layer)))
        thread.start()
        thread.join()
        found.append(used(copy.deepcopy(layer)))

    hook = nn.modules.module.register_module_parameter_registration_hook(look)
    try:
        layer.weight = nn.Parameter(3 * torch.randn(6, 8))
    finally:
        hook.remove()
    assert [*found, used(layer)] == pytest.approx([1.0] * 3, rel=1e-3)


def test_script_says_what_to_do() -> None:
    model = nn.Sequential(nn.Linear(3, 3))
    attachment = specops.attach(None, model, SN)
    with pytest.raises(errors.AdapterError, match=r"0\.weight.*detach\(fold=True\)"):
        torch.jit.script(model)
    attachment.detach(fold=True)
    torch.jit.script(model)(torch.ones(1, 3))


@new_compilers
def test_export_and_forward_mode() -> None:
    model, x = (
        nn.Sequential(nn.Conv2d(2, 3, 3), nn.Flatten(), nn.Linear(27, 2)),
        torch.ones(1, 2, 5, 5),
    )
    specops.attach(None, model, SN)
    wanted = model(x)
    torch.testing.assert_close(torch.export.export(model, (x,)).module()(x), wanted)
    tangent = torch.func.jvp(model, (x,), (torch.ones_like(x),))[1]
    step = 1e-3
    slope = (model(x + step) - model(x - step)) / (2 * step)
    torch.testing.assert_close(tangent, slope, rtol=1e-2, atol=1e-3)


@pytest.fixture
def mesh(tmp_path: Any) -> Iterator[Any]:
    """A mesh of one rank on the CPU."""
    if tuple(map(int, torch.__version__.split(".")[:2])) < (2, 13):
        pytest.skip("older fully_shard needs streams of a device")
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1
    )
    try:
        yield torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
    finally:
        torch.distributed.destroy_process_group()


def test_fully_shard(mesh: Any) -> None:
    """Before or after: the whole weight is normalised in each forward; after, a step is refused."""
    fully_shard = getattr(pytest.importorskip("torch.distributed.fsdp"), "fully_shard", None)
    if fully_shard is None:
        pytest.skip("this torch has no fully_shard")
    sharded = nn.Sequential(nn.Linear(4, 4, bias=False))
    fully_shard(sharded, mesh=mesh)
    attachment = specops.attach(None, sharded, SN)
    assert float(top(sharded(torch.eye(4)).detach())) == pytest.approx(1.0, rel=1e-3)
    attachment.step()
    model = nn.Sequential(nn.Linear(4, 4, bias=False))
    attachment = specops.attach(None, model, SN)
    fully_shard(model, mesh=mesh)
    assert float(top(model(torch.eye(4)).detach())) == pytest.approx(1.0, rel=1e-3)
    model(torch.eye(4)).square().sum().backward()
    optimizer = torch.optim.SGD(model.parameters(), lr=10.0)
    optimizer.step()
    assert float(top(model(torch.eye(4)).detach())) == pytest.approx(1.0, rel=1e-3)
    with pytest.raises(errors.AdapterError, match=r"0\.weight is sharded"):
        attachment.step()


@pytest.mark.parametrize("how", ["saved", "loaded", "zero"])
def test_a_sharded_weight_that_was_written_to_is_measured(mesh: Any, how: str) -> None:
    """By others, before a state was saved or after one was loaded, or by a step not counted."""
    model = nn.Sequential(nn.Linear(4, 4, bias=False))
    torch.distributed.fsdp.fully_shard(model, mesh=mesh)
    attachment = specops.attach(None, model, SN, every=5)
    (parameter,) = model.parameters()
    part = parameter.detach().to_local()
    new = torch.randn(4, 4)
    if how == "zero":
        part.zero_()
    model(torch.eye(4))
    model.reshard()
    if how == "zero":
        part.data.copy_(new)
    else:
        with torch.no_grad():
            parameter.mul_(1.01)
    attachment.step()
    if how == "saved":
        with torch.no_grad():
            parameter.to_local().copy_(new)
    if how != "zero":
        state = attachment.state_dict()
        attachment.detach()
        attachment = specops.attach(None, model, SN, every=5)
        attachment.load_state_dict(state)
    if how == "loaded":
        with torch.no_grad():
            parameter.to_local().copy_(new)
    assert float(top(model(torch.eye(4)).detach())) == pytest.approx(1.0, rel=1e-3)


# Edges


def test_zero_weights_stay_zero_and_learn() -> None:
    for layer, x in (
        (nn.Linear(6, 4), torch.ones(1, 6)),
        (nn.Conv2d(2, 3, 3), torch.ones(1, 2, 5, 5)),
    ):
        for rule in (SN, SRN, SpectralNormalization(norm="operator")):
            layer = copy.deepcopy(layer)
            nn.init.zeros_(layer.weight)
            optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
            attachment = specops.attach(optimizer, layer, rule)
            layer(x).sum().backward()
            assert not layer.weight.detach().any()
            optimizer.step()
            assert torch.isfinite(raw(layer)).all()
            assert raw(layer).any()
            layer(x)
            attachment.detach()


@pytest.mark.parametrize("size", [1e-39, 1e-30, 1e30, 1e37])
@pytest.mark.parametrize("rule", [SN, SRN], ids=["normalised", "limited"])
def test_no_scale_is_special(rule: Any, size: float) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(40, 30, bias=False)
    values = torch.randn(30, 40) * size
    layer.weight.data = values
    specops.attach(None, layer, rule)
    assert used(layer) == pytest.approx(1.0, rel=1e-2)
    plain = nn.Linear(40, 30, bias=False)
    plain.weight.data = torch.randn(30, 40)
    specops.attach(None, plain, rule)


@pytest.mark.parametrize("shape", [(1, 16), (16, 1), (1, 1)])
def test_stable_rank_of_a_single_row_or_column_is_the_quotient(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(shape[1], shape[0], bias=False).double()
    w = layer.weight.detach().clone().requires_grad_()
    x = torch.randn(32, shape[1]).double()
    (x @ (w / w.norm()).T).sin().square().mean().backward()
    specops.attach(None, layer, StableRankNormalization(1.0, norm="reshaped"))
    layer(x).sin().square().mean().backward()
    torch.testing.assert_close(raw(layer).grad, w.grad, rtol=1e-6, atol=1e-9)


def test_a_rank_that_leaves_no_derivative_is_said() -> None:
    layer = nn.Linear(16, 8)
    rule = StableRankNormalization(0.1, norm="reshaped")
    for attach in (specops.attach, specops_torch.attach):
        with pytest.warns(errors.CautionWarning, match="does not learn") as said:
            attachment = attach(None, layer, rule)
        assert [warning.filename for warning in said] == [__file__]
        attachment.detach()
    with pytest.warns(errors.CautionWarning):
        specops.attach(None, layer, rule)
    assert float(torch.linalg.matrix_rank(layer.weight.detach(), rtol=1e-4)) == 1


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("shared", [False, True])
def test_scales_get_the_gradients_that_their_weights_get(shared: bool, frozen: bool) -> None:
    def train(clear: Any) -> list[float]:
        torch.manual_seed(0)
        d, g = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 1)), nn.Linear(2, 4)
        od, og = torch.optim.SGD(d.parameters(), 0.1), torch.optim.SGD(g.parameters(), 0.1)
        rule = SpectralNormalization(norm="reshaped", scale=TrainableScale(1.5, shared=shared))
        attachment = specops.attach(od, d, rule)
        for _ in range(3):
            clear(d, od)
            # Two halves of a batch, whose gradients add up.
            for _ in range(2):
                d(torch.randn(8, 4)).mean().backward()
            od.step()
            og.zero_grad()
            d.requires_grad_(not frozen)
            d(g(torch.randn(8, 2))).mean().backward()
            if frozen:
                assert all(s.grad is None for s in attachment.scales.values())
            d.requires_grad_()
            og.step()
        return [s.item() for s in attachment.scales.values()]

    by_optimizer = train(lambda d, od: od.zero_grad())
    assert by_optimizer == train(lambda d, od: d.zero_grad())


# Public weights


def test_weights_in_use_are_public_and_differentiable() -> None:
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.Flatten(), nn.Linear(27, 2))
    plan = Plan([("0.weight", SN), ("2.weight", specops.ClipSpectralNorm(5.0))])
    attachment = specops.attach(sgd(model), model, plan)
    x = torch.randn(4, 2, 5, 5)
    y = model(x)
    weights, geometries = attachment.weights(), attachment.geometries()
    assert list(weights) == list(geometries) == ["0.weight", "2.weight"]
    assert geometries["0.weight"].grid == (5, 5)
    assert weights["2.weight"] is raw(model, "2.weight")
    bias = model[0].bias
    mine = nn.functional.linear(
        nn.functional.conv2d(x, weights["0.weight"], bias).flatten(1),
        weights["2.weight"],
        model[2].bias,
    )
    torch.testing.assert_close(mine, y)
    ours, theirs = (
        torch.autograd.grad(o.square().sum(), raw(model, "0.weight")) for o in (mine, y)
    )
    torch.testing.assert_close(ours, theirs)
    margins = specops.measures.margins(y.detach(), torch.zeros(4, dtype=torch.int64))
    value = specops.measures.log_spec_fro(
        [w.detach() for w in weights.values()], margins.abs() + 1.0, list(geometries.values())
    )
    assert torch.isfinite(value).all()


def test_history_and_report_show_the_stable_rank() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 12), nn.Linear(12, 8))
    optimizer = sgd(model)
    plan = Plan([("0.*", SRN), ("1.*", specops.ProjectStableRank(target=2.0, norm="reshaped"))])
    attachment = specops.attach(optimizer, model, plan)
    model(torch.randn(4, 16)).square().mean().backward()
    optimizer.step()
    record = next(r for r in attachment.history if r["name"] == "0.weight")
    w = raw(model, "0.weight").detach()
    assert record["rank_before"] == pytest.approx(float(specops.stable_rank(w)), rel=0.05)
    assert record["rank_after"] == pytest.approx(min(4.8, record["rank_before"]), rel=0.05)
    report = attachment.report()
    assert "stable rank" in str(report)
    in_use = attachment.weights()["0.weight"].detach()
    assert report["0.weight"].stable_rank == pytest.approx(float(specops.stable_rank(in_use)))
    assert report["1.weight"].stable_rank <= 2.0 * (1 + 1e-5)
