"""Forward rules: what a layer computes with, and how little else changes."""

from __future__ import annotations

import copy
import subprocess
import sys
from typing import Any

import pytest

import specops
from specops import (
    ClipSpectralNorm,
    Dense,
    Plan,
    SpectralNormalization,
    SpectralNormPenalty,
    StableRankNormalization,
)
from tests.torch_adapter.models import (
    FORWARD,
    KINDS,
    assert_relative,
    backward,
    batch,
    divided,
    every_rule,
    gradients,
    in_use,
    network,
    new_compilers,
    operator,
    parts,
    raw,
    replaced,
    settle,
    state_of,
    top,
    train,
)

torch = pytest.importorskip("torch")
from torch import nn  # noqa: E402
from torch.func import functional_call  # noqa: E402
from torch.nn.utils import parametrizations  # noqa: E402
from torch.utils.checkpoint import checkpoint  # noqa: E402

SN = SpectralNormalization(norm="reshaped")
SRN = StableRankNormalization(0.4, norm="reshaped")
PENALTY = SpectralNormPenalty(0.3, norm="reshaped")


# What it computes


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(
    ("layer", "size"),
    [
        (nn.Linear(7, 5), (7,)),
        (nn.Conv1d(3, 4, 3), (3, 6)),
        (nn.Conv2d(4, 6, 3, padding=1, groups=2), (4, 5, 5)),
        (nn.ConvTranspose2d(3, 4, 3, stride=2), (3, 4, 4)),
    ],
    ids=lambda v: type(v).__name__,
)
def test_reshaped_norm_is_that_of_torchs_parametrization(
    layer: Any, size: tuple[int, ...], dtype: Any
) -> None:
    torch.manual_seed(3)
    for p in layer.parameters():
        nn.init.normal_(p)
    ours, theirs = (copy.deepcopy(layer).to(dtype) for _ in range(2))
    parametrizations.spectral_norm(theirs, n_power_iterations=400)
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1) for m in (ours, theirs)]
    rule = SpectralNormalization(norm="reshaped", iterations=400)
    attachment = specops.attach(optimizers[0], ours, Plan([("weight", rule)]))
    settle(attachment, 1)
    x = torch.randn(6, *size, dtype=dtype)
    for _ in range(3):
        outputs = [m(x) for m in (ours, theirs)]
        for optimizer, y in zip(optimizers, outputs, strict=True):
            optimizer.zero_grad()
            y.square().mean().backward()
        original = theirs.parametrizations.weight.original
        assert_relative(outputs[0], outputs[1], 1e-5)
        assert_relative(raw(ours), original, 1e-5)
        assert_relative(raw(ours).grad, original.grad, 1e-5)
        for optimizer in optimizers:
            optimizer.step()


@pytest.mark.slow
@pytest.mark.parametrize("norm", ["reshaped", "operator", "bidirectional"])
@pytest.mark.parametrize("scale", [1.0, 0.7])
@pytest.mark.parametrize(
    "layer",
    [nn.Conv2d(2, 3, 3, padding=1), nn.ConvTranspose2d(2, 4, 3, stride=2, groups=2)],
    ids=lambda v: type(v).__name__,
)
def test_norms_are_their_definitions(layer: Any, norm: Any, scale: float) -> None:
    torch.manual_seed(1)
    layer = copy.deepcopy(layer).double()
    for p in layer.parameters():
        nn.init.normal_(p)
    x = torch.randn(3, 2, 4, 4, dtype=torch.float64)
    w = layer.weight.detach().clone().requires_grad_()
    first, second = top(w.flatten(1)), top(w.transpose(0, 1).flatten(1))
    sigma = {
        "reshaped": second if isinstance(layer, nn.ConvTranspose2d) else first,
        "operator": top(operator(layer, (4, 4), w)),
        "bidirectional": (first + second) / 2,
    }[norm]
    expected = functional_call(layer, {"weight": scale * w / sigma}, (x,))
    expected.square().mean().backward()
    rule = SpectralNormalization(norm=norm, scale=scale)
    attachment = specops.attach(None, layer, Plan([("weight", rule)]))
    layer(x)
    settle(attachment)
    y = layer(x)
    y.square().mean().backward()
    assert_relative(y, expected, 1e-6)
    assert_relative(layer.weight.grad, w.grad, 1e-6)


@pytest.mark.parametrize("ratio", [0.1, 0.4, 1.0])
def test_stable_rank_normalization_is_its_algorithm(ratio: float) -> None:
    model = network().double()
    attachment = specops.attach(None, model, StableRankNormalization(ratio, norm="reshaped"))
    settle(attachment)
    w = raw(model, "5.weight").detach().clone().requires_grad_()
    u, _, vh = torch.linalg.svd(w.detach(), full_matrices=False)
    lead = torch.outer(u[:, 0], vh[0])
    rest = w / (w * lead).sum() - lead
    room = (max(1.0, ratio * 2) - 1.0) ** 0.5
    used = lead + rest * min(1.0, room / torch.linalg.matrix_norm(rest))
    x = torch.randn(4, 192, dtype=torch.float64)
    (x @ used.T).square().sum().backward()
    model[5].bias.detach().zero_()
    model[5](x).square().sum().backward()
    assert_relative(in_use(model, "5.weight", batch().double()), used.detach(), 1e-6)
    assert_relative(model[5].weight.grad, w.grad, 1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("ratio", [0.05, 0.2])
def test_stable_rank_of_the_operator_in_use(ratio: float) -> None:
    model, plain, x = network().double(), network().double()[0], batch().double()
    rule = StableRankNormalization(ratio, norm="operator")
    attachment = specops.attach(None, model, Plan([("0.weight", rule)]))
    model(x)
    settle(attachment)
    w = raw(model, "0.weight").detach().clone().requires_grad_()
    plainly = torch.linalg.svdvals(operator(plain, (4, 4), w))
    (axis,) = torch.autograd.grad(plainly[0], w)
    # How often each tap meets the grid; the least squared norm with ⟨K, axis⟩ = 1.
    often = torch.tensor([[9.0, 12.0, 9.0], [12.0, 16.0, 12.0], [9.0, 12.0, 9.0]])
    least = float(1 / (axis.square() / often).sum())
    rank = max(ratio * 32, least)
    assert float(plainly.detach().square().sum() / plainly[0].detach() ** 2) > 1.5 * rank
    used = in_use(model, "0.weight", x)
    assert float((used * axis).sum()) == pytest.approx(1.0, rel=1e-6)
    values = torch.linalg.svdvals(operator(plain, (4, 4), used))
    assert float(values.square().sum()) == pytest.approx(rank, rel=1e-5)


@every_rule
def test_penalties_on_gradients_have_the_slopes_of_finite_differences(rule: Any) -> None:
    """On gradients by the input, as GANs have them, and by the weights."""
    model, x = network(3).double(), batch(3).double().requires_grad_()
    attachment = specops.attach(None, model, rule)
    variables = [*model.parameters(), *attachment.scales.values()]

    def penalty() -> Any:
        y = model(x)
        slope, *others = torch.autograd.grad(y.square().sum(), [x, *variables], create_graph=True)
        return (slope.flatten(1).norm(dim=1) - 1).square().mean() + sum(
            (g * g).sum() for g in others
        )

    penalty().backward()
    direction = [torch.randn_like(p) for p in variables]
    assert all(p.grad is not None for p in variables)
    slope = sum((p.grad * d).sum() for p, d in zip(variables, direction, strict=True))

    def moved(by: float) -> float:
        with torch.no_grad():
            for p, d in zip(variables, direction, strict=True):
                p.add_(by * d)
        return float(penalty().detach())

    for constrained in attachment._constrained:
        constrained.in_use.searching = True  # of one function, whose vectors stay
    step = 1e-6
    after, before = moved(step), moved(-2 * step)
    assert float(slope) == pytest.approx((after - before) / (2 * step), rel=1e-6)


# Nothing else changes


@every_rule
def test_forward_passes_change_nothing(rule: Any) -> None:
    model, x = network(), batch()
    attachment = specops.attach(None, model, rule)
    model(x)
    names = ("0.weight", "2.weight", "5.weight")
    before = [state_of(attachment, n) for n in names]
    versions = [p._version for p in model.parameters()]
    outputs = [model(x), model(x), model.eval()(x), model.train()(x)]
    with torch.no_grad():
        outputs.append(model(x))
    assert all(torch.equal(y, outputs[0]) for y in outputs)
    for name, state in zip(names, before, strict=True):
        assert all(torch.equal(v, state_of(attachment, name)[k]) for k, v in state.items())
    assert versions == [p._version for p in model.parameters()]
    assert not list(model.buffers())


@every_rule
@pytest.mark.parametrize("every", [1, 2])
def test_vectors_advance_once_per_firing(rule: Any, every: int) -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    attachment = specops.attach(optimizer, model, rule, every=every)
    model(batch())
    geometries = {n: attachment._constrained[i].geometry for i, n in enumerate(("0", "2", "5"))}
    for step in range(1, 4):
        before = {n: state_of(attachment, f"{n}.weight") for n in geometries}
        model(batch())
        train(model, optimizer)
        for name, geometry in geometries.items():
            expected = before[name]
            if step % every == 0:
                w = raw(model, f"{name}.weight").detach()
                expected = rule.update(w, geometry, expected, step=step)[1]
            now = state_of(attachment, f"{name}.weight")
            assert all(torch.allclose(now[k], v, rtol=1e-5, atol=1e-6) for k, v in expected.items())


def test_a_discriminator_called_twice_has_the_gradient_of_one_function() -> None:
    model, real, fake = network(), batch(seed=1), batch(seed=2)
    expected = copy.deepcopy(model)
    attachment = specops.attach(None, model, SN)
    settle(attachment)

    def normalised(name: str, w: Any) -> Any:
        if w.ndim < 2:
            return w
        a = w.transpose(0, 1).flatten(1) if name.startswith("2.") else w.flatten(1)
        return w / top(a)

    (model(real).mean() - model(fake).mean()).backward()
    loss = replaced(expected, normalised, real).mean() - replaced(expected, normalised, fake).mean()
    loss.backward()
    for name, g in gradients(model).items():
        assert_relative(g, raw(expected, name).grad, 1e-4)


@every_rule
@pytest.mark.parametrize("reentrant", [False, True], ids=["", "reentrant"])
def test_checkpointing_gives_the_same_gradients(rule: Any, reentrant: bool) -> None:
    model, x = network(), batch().requires_grad_()
    specops.attach(None, model, rule)
    backward(model, x)
    expected = gradients(model)
    model.zero_grad()
    checkpoint(model, x, use_reentrant=reentrant).square().mean().backward()
    assert expected.keys() == gradients(model).keys()
    assert all(torch.equal(g, expected[n]) for n, g in gradients(model).items())


@every_rule
@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_evaluation_may_come_first(rule: Any, context: Any) -> None:
    model, other, x = network(), network(), batch()
    for m in (model, other):
        optimizer = torch.optim.SGD(m.parameters(), lr=0.1)
        specops.attach(optimizer, m, rule)
        if m is model:
            with context():
                m.eval()(x)
        train(m.train(), optimizer, 2)
    assert torch.allclose(model(x), other(x), atol=1e-6)


# Precisions, layouts, transformations


@every_rule
def test_functional_calls_and_vmap(rule: Any) -> None:
    model, x = network(), batch()
    specops.attach(None, model, rule)
    backward(model, x)
    parameters = dict(model.named_parameters())

    def loss(given: dict[str, Any]) -> Any:
        return functional_call(model, given, (x,)).square().mean()

    for name, g in torch.func.grad(loss)(parameters).items():
        torch.testing.assert_close(g, parameters[name].grad)
    # Weights that differ by a factor have one normalised weight, and the same vectors.
    stacked = {
        n: torch.stack([p, 2 * p if p.ndim > 1 else p]).detach() for n, p in parameters.items()
    }
    expected = loss(parameters).detach()
    torch.testing.assert_close(torch.vmap(loss)(stacked), torch.stack([expected, expected]))


@every_rule
def test_channels_last(rule: Any) -> None:
    plain, model = network(), network().to(memory_format=torch.channels_last)
    for m in (plain, model):
        specops.attach(None, m, rule)
        backward(m, batch().to(memory_format=torch.channels_last))
    for name, g in gradients(plain).items():
        torch.testing.assert_close(raw(model, name).grad, g)
    y = model[0](batch().to(memory_format=torch.channels_last))
    assert y.is_contiguous(memory_format=torch.channels_last)


@every_rule
def test_autocast_leaves_weights_and_gradients_in_single_precision(rule: Any) -> None:
    model, plain, x = network(), network(), batch()
    for m in (model, plain):
        specops.attach(None, m, rule)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        used = in_use(model, "5.weight", x)
        y = model(x)
        y.float().square().mean().backward()
    assert y.dtype == torch.bfloat16
    assert torch.equal(used, in_use(plain, "5.weight", x))
    backward(plain, x)
    for name, g in gradients(model).items():
        assert g.dtype == torch.float32
        assert_relative(g, raw(plain, name).grad, 0.1)


@every_rule
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_other_precisions(rule: Any, dtype: Any) -> None:
    plain, model, x = network(), network().to(dtype), batch()
    specops.attach(None, plain, rule)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    specops.attach(optimizer, model, rule)
    y = model(x.to(dtype))
    assert y.dtype == dtype
    assert_relative(y, plain(x), 2e-2 if dtype == torch.bfloat16 else 1e-3)
    train(model, optimizer, 3)
    assert {p.dtype for p in model.parameters()} == {dtype}


def test_double_precision_converges_to_it() -> None:
    model, x = network().double(), batch().double()
    rule = SpectralNormalization(norm="reshaped", scale=lambda *_: 0.1)
    settle(specops.attach(None, model, rule))
    norm = top(in_use(model, "0.weight", x).flatten(1))
    assert float(norm) == pytest.approx(0.1, rel=1e-12)


@pytest.mark.parametrize("name", ["reshaped", "operator", "rank"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_models_may_be_cast_after_attaching(name: str, dtype: Any) -> None:
    model, x = network(), batch()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    attachment = specops.attach(optimizer, model, FORWARD[name])
    y = model(x)
    model.to(dtype)
    assert_relative(model(x.to(dtype)), y, 2e-2)
    train(model, optimizer, 2)
    attachment.load_state_dict(attachment.state_dict())
    train(model, optimizer, 2)


# Kinds of layers


@pytest.mark.filterwarnings("ignore:LSTM with projections", "ignore:The PyTorch API of nested")
@pytest.mark.parametrize(("build", "blocks"), KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_every_use_of_a_weight_is_normalised(build: Any, blocks: Any, training: bool) -> None:
    """Where evaluation takes another path, as it does in attention, there too."""
    torch.manual_seed(2)
    model, inputs, options = build()
    model.train(training)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(2)
    with torch.set_grad_enabled(training):
        wanted = replaced(model, divided(blocks), *inputs, **options)
    if training:
        sum(t.square().sum() for t in parts(wanted)).backward()
    expected = gradients(model)
    model.zero_grad()
    attachment = specops.attach(None, model, Plan([("*bias*", None), ("*weight*", SN)]))
    with torch.set_grad_enabled(training):
        output = model(*inputs, **options)
    for a, b in zip(parts(output), parts(wanted), strict=True):
        torch.testing.assert_close(a, b.detach(), rtol=1e-4, atol=1e-5)
    if training:
        sum(t.square().sum() for t in parts(output)).backward()
        assert gradients(model).keys() == expected.keys()
        for name, g in gradients(model).items():
            torch.testing.assert_close(g, expected[name], rtol=1e-3, atol=1e-5)
    attachment.detach(fold=True)
    with torch.no_grad():
        for a, b in zip(parts(model(*inputs, **options)), parts(wanted), strict=True):
            torch.testing.assert_close(a, b.detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", [SN, SRN, PENALTY], ids=["forward", "rank", "penalty"])
@pytest.mark.parametrize("odd", ["", "frozen", "idle", "nan"])
def test_weights_of_one_shape_are_treated_each_for_itself(kind: Any, odd: str) -> None:
    models, states = [], []
    for plans in ([Plan([("*", kind)])], [Plan([(f"{i}.weight", kind)]) for i in (0, 1, 2)]):
        torch.manual_seed(0)
        model = nn.Sequential(*(nn.Linear(6, 6) for _ in range(3)))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        made = [specops.attach(optimizer, model, plan, on_nonfinite="skip") for plan in plans]
        for step in range(3):
            optimizer.zero_grad()
            model(torch.eye(6)).square().sum().backward()
            if step == 1 and odd == "frozen":
                model[1].weight.requires_grad_(False)
            elif step == 1 and odd == "idle":
                model[1].weight.grad = None
            elif step == 1 and odd == "nan":
                model[1].weight.data.fill_(float("nan"))
            optimizer.step()
        models.append(model)
        states.append({k: v for a in made for k, v in a.state_dict()["weights"].items()})
    torch.testing.assert_close(*(m.state_dict() for m in models), equal_nan=True)
    torch.testing.assert_close(
        *({n: dict(w["state"]) for n, w in state.items()} for state in states)
    )


@pytest.mark.parametrize("kind", [SpectralNormalization, StableRankNormalization])
def test_larger_inputs_later_are_noticed(kind: Any) -> None:
    first = {"ratio": 0.2} if kind is StableRankNormalization else {}
    rule = kind(**first, norm="operator", iterations=50)
    model = nn.Sequential(nn.Conv2d(2, 3, 3, padding=1, bias=False)).double()
    plain, fresh = copy.deepcopy(model[0]), copy.deepcopy(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    specops.attach(optimizer, model, rule)
    for size in (3, 6):
        for _ in range(4):
            x = torch.randn(1, 2, size, size).double()
            backward(model, x)
            optimizer.step()
        used = in_use(model, "0.weight", x)
        if kind is SpectralNormalization:
            assert float(top(operator(plain, (size, size), used))) == pytest.approx(1.0, rel=1e-6)
    attachment = specops.attach(None, fresh, rule)
    fresh(x)
    settle(attachment, 4)
    torch.testing.assert_close(used, in_use(fresh, "0.weight", x), rtol=1e-5, atol=1e-6)


def test_a_layer_that_turns_out_not_to_fit_is_skipped_by_a_bare_rule() -> None:
    layer = nn.Conv2d(1, 2, 4, stride=2, padding=1, padding_mode="circular", bias=False)
    model = nn.Sequential(layer, nn.Flatten(), nn.Linear(18, 2))
    plain, x = copy.deepcopy(model), torch.randn(1, 1, 7, 7)
    attachment = specops.attach(None, model, SpectralNormalization(norm="operator"))
    assert torch.equal(model[:2](x), plain[:2](x))
    attachment.step()
    assert "3 outputs" in attachment.report()["0.weight"].reason


def test_a_report_may_come_before_the_first_input() -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Linear(4, 4))
    attachment = specops.attach(None, model, SpectralNormalization(norm="operator", scale=2.0))
    report = attachment.report()
    assert report["0.weight"].rule
    assert report["0.weight"].norm is None
    assert "no input yet" in str(report)
    assert report["1.weight"].norm == pytest.approx(2.0)
    with pytest.raises(specops.errors.GeometryError) as raised:
        attachment.detach(fold=True)
    assert str(raised.value).count("0.weight") == 1
    model(torch.zeros(1, 1, 6, 6))
    assert attachment.report()["0.weight"].norm == pytest.approx(2.0, rel=0.02)
    assert "no input yet" not in str(attachment.report())


def test_a_layer_that_turns_out_not_to_fit_is_named() -> None:
    layer = nn.Conv1d(3, 4, 4, stride=2, padding=1, padding_mode="circular")
    model = nn.Sequential(layer)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    rule = SpectralNormalization(norm="operator")
    specops.attach(optimizer, model, specops.Plan([("0.weight", rule)]))
    with pytest.raises(specops.errors.GeometryError, match=r"^0\.weight: .* gives 2 outputs"):
        model(torch.zeros(1, 3, 5))


def test_a_shared_module_is_normalised_in_both_places() -> None:
    layer, x = nn.Linear(4, 4, bias=False), torch.randn(3, 4)
    model = nn.Sequential(layer, nn.Tanh(), nn.Sequential(layer))
    w = layer.weight.detach().clone().requires_grad_()
    expected = (x @ (w / top(w)).T).tanh() @ (w / top(w)).T
    expected.square().sum().backward()
    specops.attach(None, model, SN)
    y = model(x)
    y.square().sum().backward()
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(layer.weight.grad, w.grad)


def test_one_module_may_hold_a_weight_under_two_names() -> None:
    model, x = nn.Module(), torch.randn(3, 4)
    model.first = model.second = nn.Parameter(2 * torch.eye(4))
    model.forward = lambda x: x @ model.first @ model.second
    specops.attach(None, model, SN, geometries={"first": Dense()})
    torch.testing.assert_close(model(x), x)


def test_attention_layers_may_share_their_output_projection() -> None:
    torch.manual_seed(0)
    layers = [nn.MultiheadAttention(4, 2) for _ in range(2)]
    layers[1].out_proj = layers[0].out_proj
    attachment = specops.attach(None, nn.ModuleList(layers), SN)
    q = torch.randn(3, 1, 4)
    before = [layer(q, q, q)[0] for layer in layers]
    attachment.detach(fold=True)
    for layer, y in zip(layers, before, strict=True):
        torch.testing.assert_close(layer(q, q, q)[0], y)


def test_a_layer_may_share_the_weight_of_an_output_projection() -> None:
    attention, layer = nn.MultiheadAttention(4, 2), nn.Linear(4, 4, bias=False)
    layer.weight = attention.out_proj.weight
    specops.attach(None, nn.ModuleList([attention, layer]), SN)
    w = layer.weight.detach().clone()
    torch.testing.assert_close(layer(torch.eye(4)), (w / top(w)).T)


# Subclasses of the library's rules


class _Doubled:
    def apply(self, *given: Any, **options: Any) -> Any:
        return 2.0 * super().apply(*given, **options)  # type: ignore[misc]


class DoubledByMixin(_Doubled, SpectralNormalization):
    pass


class GrowingScale(SpectralNormalization):
    def fixed_scale(self, step: int, name: str, geometry: Any) -> Any:
        return float(step)


class TimesStep(SpectralNormalization):
    def apply(
        self, weight: Any, geometry: Any, state: Any, *, step: int = 1, name: str = "", **_: Any
    ) -> Any:
        return step * super().apply(weight, geometry, state, name=name)


@pytest.mark.parametrize(
    ("kind", "norms"),
    [(DoubledByMixin, (2, 2, 2)), (GrowingScale, (1, 2, 3)), (TimesStep, (1, 2, 3))],
)
def test_subclasses_of_the_rules_are_asked_at_every_step(kind: Any, norms: Any) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(4, 4)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.0)
    specops.attach(optimizer, layer, kind(norm="reshaped"))
    for norm in norms:
        assert top(layer.weight.detach()) == pytest.approx(norm, rel=1e-4)
        layer(torch.ones(1, 4)).sum().backward()
        optimizer.step()


# Compiled

COMPILED = {
    **FORWARD,
    "scheduled": SpectralNormalization(norm="bidirectional", scale=lambda s, *_: 1 + 0.1 * s),
    "scheduled rank": StableRankNormalization(lambda s, *_: 0.9 - 0.1 * s, norm="reshaped"),
}


quietly = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")


@pytest.mark.slow
@quietly
@pytest.mark.parametrize("rule", COMPILED.values(), ids=COMPILED)
@new_compilers
def test_compiled_models_give_the_same_numbers_without_recompiling(rule: Any) -> None:
    losses, graphs = [], []
    # Its tables stay with the interpreter.
    whole = rule is not FORWARD["rank of operator"]

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    for compiled in (False, True):
        model = network()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        specops.attach(optimizer, model, rule)
        model(batch())
        f = torch.compile(model, backend=backend, fullgraph=whole) if compiled else model
        losses.append(train(f, optimizer, 2))
        compilations = len(graphs)
        losses[-1] += train(f, optimizer, 4, first=2)
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    assert len(graphs) == compilations
    assert compilations == 1 or not whole


MINIMAL = """
import torch
import specops

class Halved:
    stage = "forward"

    def init(self, weight, geometry, name):
        return {}

    def update(self, weight, geometry, state, *, step=1, name=""):
        return weight, state, {}

    def apply(self, weight, geometry, state, *, step=1, name=""):
        return 0.5 * weight

layer = torch.nn.Linear(3, 2, bias=False)
raw = layer.weight.detach().clone()
optimizer = torch.optim.SGD(layer.parameters(), lr=0.0)
specops.attach(optimizer, layer, Halved())
compiled = torch.compile(layer, backend="eager", fullgraph=True)
for _ in range(3):
    y = compiled(torch.eye(3))
    y.sum().backward()
    optimizer.step()
assert torch.equal(y, 0.5 * raw.T), (y, raw)
"""


@pytest.mark.slow
@new_compilers
def test_a_minimal_rule_of_others_compiles_whole() -> None:
    command = [sys.executable, "-c", MINIMAL]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
@quietly
@new_compilers
def test_compiled_attention() -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0)
    specops.attach(None, model, SN)
    x = torch.randn(2, 5, 8)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), model(x))


@pytest.mark.slow
@quietly
@new_compilers
def test_compiled_steps() -> None:
    torch._dynamo.reset()
    models = [network(), network()]
    for i, model in enumerate(models):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        rules = (SN, ClipSpectralNorm(0.5), SpectralNormPenalty(0.3, norm="reshaped"))
        attachments = [specops.attach(optimizer, model, rule) for rule in rules]
        step = torch.compile(optimizer.step, backend="eager") if i else optimizer.step
        for seed in range(4):
            optimizer.zero_grad()
            backward(model, batch(seed=seed))
            step()
        assert [a.steps for a in attachments] == [4, 4, 4]
    for a, b in zip(*(m.parameters() for m in models), strict=True):
        torch.testing.assert_close(a, b)
