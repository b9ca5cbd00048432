"""The life of an attachment in a torch training loop."""

from __future__ import annotations

import copy
import io
import pickle
import warnings
from typing import Any

import numpy as np
import pytest

import specops
from specops import ClipSpectralNorm, Conv, Dense, Monitor, Plan, SpectralNormalization, errors

torch = pytest.importorskip("torch")
from torch import nn  # noqa: E402
from torch.nn.utils import prune  # noqa: E402

from tests.torch_adapter.test_geometry import layer_matrix  # noqa: E402

CLIP = ClipSpectralNorm(0.5)


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 6, 3, padding=1),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.Conv2d(6, 4, 3, stride=2, padding=1, groups=2),
        nn.ReLU(),
        nn.ConvTranspose2d(4, 3, 4, stride=2, padding=1),
        nn.Flatten(),
        nn.Linear(3 * 8 * 8, 5),
    )


def optimizer_of(model: nn.Module, **options: Any) -> torch.optim.SGD:
    return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, **options)


def train(model: nn.Module, optimizer: Any, steps: int = 3, dtype: Any = torch.float32) -> None:
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        x = torch.randn(8, 2, 8, 8, generator=generator).to(dtype)
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()


def exact_norms(model: nn.Sequential) -> dict[str, float]:
    """Spectral norms of the layers as they compute, by brute force."""
    sizes: dict[str, tuple[int, ...]] = {}
    model = copy.deepcopy(model).double()
    hooks = [
        m.register_forward_hook(lambda _, a, __, n=n: sizes.update({n: tuple(a[0].shape[1:])}))
        for n, m in model.named_modules()
    ]
    model(torch.zeros(1, 2, 8, 8, dtype=torch.float64))
    for hook in hooks:
        hook.remove()
    result = {}
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d | nn.Linear):
            channels, *size = sizes[name]
            matrix = layer_matrix(layer, channels, tuple(size))
            result[name] = float(np.linalg.norm(matrix, 2))
    return result


def test_every_layer_is_constrained_as_it_computes() -> None:
    plain, model = network(), network()
    train(plain, optimizer_of(plain))
    optimizer = optimizer_of(model)
    attachment = specops.attach(optimizer, model, CLIP)
    assert attachment.is_attached
    train(model, optimizer)
    for name, norm in exact_norms(model).items():
        assert norm <= 0.5 * (1 + 1e-5), name
        assert norm > 0.35, name
    assert max(exact_norms(plain).values()) > 0.6
    report = attachment.report()
    assert [r.name for r in report.rows] == [n for n, _ in model.named_parameters()]
    assert all(row.norm <= 0.5 * (1 + 3e-5) for row in report.constrained)
    assert all(row.reason for row in report.skipped)
    assert attachment.history[-1]["norm_after"] <= 0.5 * (1 + 1e-5)
    assert {r["step"] for r in attachment.history} == {1, 2, 3}


def test_strides_and_identity_of_parameters_survive() -> None:
    model = network().to(memory_format=torch.channels_last)
    before = {n: (id(p), p.stride(), p.data_ptr()) for n, p in model.named_parameters()}
    optimizer = optimizer_of(model)
    specops.attach(optimizer, model, CLIP)
    train(model, optimizer, 2)
    assert before == {n: (id(p), p.stride(), p.data_ptr()) for n, p in model.named_parameters()}


def test_what_a_printed_report_cuts_is_said_to_be_whole_elsewhere() -> None:
    layer = nn.Linear(2, 3)
    layer.own = nn.Parameter(torch.ones(3, 4))
    report = specops.attach(None, layer, CLIP).report()
    assert "geometries=" in report["own"].reason
    assert "geometries=" not in str(report)
    assert str(report).endswith("is whole in report[name]: .geometry, .rule, .reason or .idle")
    assert "…" not in str(specops.attach(None, nn.Linear(2, 3), CLIP).report())


def test_after_detach_nothing_is_left() -> None:
    model, plain = network(), network()
    optimizer = optimizer_of(model)
    attachment = specops.attach(optimizer, model, CLIP, every=2)
    train(model, optimizer, 3)
    state = attachment.state_dict()
    attachment.detach()
    attachment.detach()
    assert not attachment.is_attached
    assert list(model.state_dict()) == list(plain.state_dict())
    assert not optimizer._optimizer_step_post_hooks
    for a, b in zip(model.modules(), plain.modules(), strict=True):
        assert set(vars(a)) == set(vars(b))
        assert not a._forward_hooks
        assert not a._forward_hooks_with_kwargs
    weights = copy.deepcopy(model.state_dict())
    for act in (
        attachment.step,
        attachment.before_step,
        attachment.enforce,
        lambda: attachment.detach(fold=True),
        lambda: attachment.load_state_dict(state),
    ):
        with pytest.raises(errors.AdapterError, match="detached"):
            act()
    assert all((weights[k] == v).all() for k, v in model.state_dict().items())
    train(model, optimizer, 1)
    assert attachment.steps == 3
    twin = pickle.loads(pickle.dumps(copy.deepcopy(model)))
    for key, value in twin.state_dict().items():
        torch.testing.assert_close(value, model.state_dict()[key])
    assert any((weights[k] != v).any() for k, v in model.state_dict().items())


def test_model_can_be_copied_and_pickled_while_attached() -> None:
    model = network()
    optimizer = optimizer_of(model)
    specops.attach(optimizer, model, CLIP)
    saved = io.BytesIO()
    torch.save(model, saved)
    saved.seek(0)
    for twin in (
        pickle.loads(pickle.dumps(copy.deepcopy(model))),
        torch.load(saved, weights_only=False),
    ):
        assert type(twin) is type(model)
        torch.testing.assert_close(twin.state_dict(), model.state_dict(), rtol=0, atol=0)


def test_every_start_and_enforce() -> None:
    model = network()
    optimizer = optimizer_of(model)
    plan = Plan([("7.weight", CLIP, 3), ("*", Monitor())], every=2, start=1)
    attachment = specops.attach(optimizer, model, plan)
    train(model, optimizer, 8)
    fired = [(r["step"], r["name"]) for r in attachment.history]
    assert [s for s, n in fired if n == "7.weight"] == [4, 7]
    assert [s for s, n in fired if n == "0.weight"] == [3, 5, 7]
    with torch.no_grad():
        model[7].weight.mul_(10)
    attachment.enforce()
    assert float(specops.spectral_norm(model[7].weight.detach())) <= 0.5
    assert attachment.steps == 8


def test_manual_steps_without_an_optimizer() -> None:
    model = network()
    attachment = specops.attach(None, model, CLIP)
    assert not attachment.is_attached
    attachment.step()
    assert attachment.steps == 1
    assert max(exact_norms(model).values()) <= 0.5 * (1 + 1e-5)


def test_layers_that_never_ran_are_constrained_for_every_size() -> None:
    model = network()
    report = specops.project(model, CLIP)
    assert max(exact_norms(model).values()) <= 0.5 * (1 + 1e-5)
    assert "any size" in report["0.weight"].geometry
    assert report["0.weight"].norm <= 0.5 * (1 + 1e-4)
    assert not any(m._forward_hooks for m in model.modules())


def test_state_resumes_exactly() -> None:
    def run(interrupt: bool) -> dict[str, Any]:
        model = network()
        optimizer = optimizer_of(model)
        attachment = specops.attach(optimizer, model, CLIP, every=2)
        train(model, optimizer, 3)
        if interrupt:
            saved = io.BytesIO()
            torch.save((model.state_dict(), optimizer.state_dict(), attachment.state_dict()), saved)
            saved.seek(0)
            states = torch.load(saved, weights_only=True)
            model = network()
            optimizer = optimizer_of(model)
            attachment = specops.attach(optimizer, model, CLIP, every=2)
            for holder, state in zip((model, optimizer, attachment), states, strict=True):
                holder.load_state_dict(state)
            assert attachment.report(measure=False)["0.weight"].geometry.startswith("conv 8×8")
        train(model, optimizer, 3)
        assert attachment.steps == 6
        return model.state_dict()

    for (key, a), b in zip(run(False).items(), run(True).values(), strict=True):
        assert torch.equal(a, b), key


def test_foreign_state_is_refused() -> None:
    model = network()
    attachment = specops.attach(None, model, CLIP)
    state = attachment.state_dict()
    with pytest.raises(errors.AdapterError, match="version"):
        attachment.load_state_dict({**state, "version": 99})
    state["weights"]["other"] = state["weights"].pop("0.weight")
    with pytest.raises(errors.AdapterError, match=r"missing \['0.weight'\].*other"):
        attachment.load_state_dict(state)


def test_a_damaged_state_is_refused_before_anything_is_taken_from_it() -> None:
    model = network()
    rule = SpectralNormalization(norm="reshaped", scale=specops.TrainableScale())
    attachment = specops.attach(None, model, rule)
    model(torch.randn(2, 2, 8, 8))
    for damage, match in (
        (lambda s: s["scales"].update({"0.weight": torch.ones(3)}), r"0\.weight of shape \(3,\)"),
        (lambda s: s["weights"]["0.weight"].update(sizes=7), r"0\.weight: .* sizes are damaged: 7"),
        (lambda s: s["weights"]["0.weight"]["sizes"].pop("varies"), "sizes are damaged"),
    ):
        state = copy.deepcopy(attachment.state_dict()) | {"steps": 5}
        damage(state)
        with pytest.raises(errors.AdapterError, match=match):
            attachment.load_state_dict(state)
        assert attachment.steps == 0


@pytest.mark.parametrize(
    "rule",
    [
        SpectralNormalization(norm="reshaped"),
        specops.SpectralNormPenalty(0.1, norm="operator"),
        specops.SpectralHammer(1.0, norm="operator"),
    ],
)
def test_a_state_that_holds_nan_is_refused(rule: Any) -> None:
    model = network()
    optimizer = optimizer_of(model)
    attachment = specops.attach(optimizer, model, rule)
    train(model, optimizer)
    state = copy.deepcopy(attachment.state_dict())
    kept = state["weights"]["7.weight"]["state"]
    state["weights"]["7.weight"]["state"] = {key: x * float("nan") for key, x in kept.items()}
    with pytest.raises(errors.StateError, match=r"7\.weight: the state holds NaN"):
        attachment.load_state_dict({**state, "steps": 9})
    assert attachment.steps == 3
    train(model, optimizer)
    assert all(torch.isfinite(p).all() for p in model.parameters())


@pytest.mark.parametrize("factor", [0.1, 30.0])
@pytest.mark.parametrize("norm", ["reshaped", "operator"])
def test_vectors_that_are_no_unit_vectors_are_not_believed(norm: Any, factor: float) -> None:
    """Whoever averages states, as of an EMA, shortens vectors, and σ with their squares."""
    model = network()
    optimizer = optimizer_of(model)
    attachment = specops.attach(optimizer, model, SpectralNormalization(norm=norm))
    train(model, optimizer)
    state = copy.deepcopy(attachment.state_dict())
    for kept in state["weights"].values():
        kept["state"] = {k: x * factor if x.ndim else x for k, x in kept["state"].items()}
    before = {name: weight.detach().clone() for name, weight in attachment.weights().items()}
    attachment.load_state_dict(state)
    for name, weight in attachment.weights().items():
        torch.testing.assert_close(weight.detach(), before[name], rtol=0.02, atol=0.0, msg=name)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_non_finite_weights(bad: float) -> None:
    def broken() -> nn.Sequential:
        model = network()
        with torch.no_grad():
            model[7].weight[0, 0] = bad
            model[0].weight.mul_(10)
        return model

    model = broken()
    before = copy.deepcopy(model.state_dict())
    attachment = specops.attach(None, model, CLIP)
    with pytest.raises(errors.NonFiniteError, match=r"7\.weight .* step 1.*wrote to no weight"):
        attachment.step()
    for key, value in model.state_dict().items():
        torch.testing.assert_close(value, before[key], equal_nan=True, rtol=0, atol=0)

    for policy in ("skip", "warn"):
        model = broken()
        attachment = specops.attach(None, model, CLIP, on_nonfinite=policy)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            attachment.step()
        assert len(caught) == (policy == "warn")
        assert not torch.isfinite(model[7].weight).all()
        assert float(specops.spectral_norm(model[0].weight.detach(), Conv((8, 8)))) <= 0.5
        assert attachment.history[-1]["skipped"] == "not finite"
    with pytest.raises(ValueError, match="on_nonfinite"):
        specops.attach(None, model, CLIP, on_nonfinite="ignore")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_precisions_hold_as_stored(dtype: Any) -> None:
    model = network().to(dtype)
    specops.project(model, CLIP)
    assert all(p.dtype == dtype for p in model.parameters())
    assert max(exact_norms(model).values()) <= 0.5 * (1 + 1e-5)


def test_what_is_left_alone_and_why() -> None:
    model = nn.ModuleDict(
        {
            "embed": nn.Embedding(7, 4),
            "frozen": nn.Linear(4, 4),
            "other": nn.Linear(4, 4),
            "tied": nn.Linear(4, 7, bias=False),
            "head": nn.Linear(4, 3),
            "reflect": nn.Conv1d(1, 1, 3, padding=1, padding_mode="reflect"),
            "bilinear": nn.Bilinear(2, 2, 2),
        }
    )
    model["frozen"].weight.requires_grad_(False)
    model["tied"].weight = model["embed"].weight
    model.register_parameter("scalar", nn.Parameter(torch.ones(())))
    normed = nn.utils.parametrizations.spectral_norm(nn.Linear(4, 4))
    model["normed"] = normed
    skip = {id(p) for p in model["other"].parameters()}
    optimizer = optimizer_of_list([p for p in model.parameters() if id(p) not in skip])
    with pytest.warns(errors.CautionWarning, match="only 2 of 5 matrices"):
        attachment = specops.attach(optimizer, model, CLIP)
    report = attachment.report(measure=False)
    reasons = {row.name: row.reason for row in report.rows}
    assert set(reasons) == {n for n, _ in model.named_parameters(remove_duplicate=False)}
    for name, reason in {
        "scalar": "0-d",
        "head.bias": "1-d",
        "frozen.weight": "frozen",
        "other.weight": "not in this optimizer",
        "embed.weight": "tied to tied.weight",
        "reflect.weight": "no convolution on a torus",
        "bilinear.weight": "no geometry is known",
        "normed.parametrizations.weight.original": "parametrization",
    }.items():
        assert reason in reasons[name], name
    assert [row.name for row in report.constrained] == ["tied.weight", "head.weight"]
    for pattern in ("reflect.*", "bilinear.weight", "normed.*"):
        with pytest.raises(errors.PlanError, match="cannot be constrained"):
            specops.attach(None, model, Plan([(pattern, CLIP)]))
    with pytest.raises(errors.PlanError, match="frozen"):
        specops.attach(None, model, Plan([("frozen.*", CLIP)]))


def optimizer_of_list(parameters: list[Any]) -> Any:
    return torch.optim.SGD(parameters, lr=0.1)


def test_bare_rule_spares_embeddings_and_a_named_one_does_not() -> None:
    model = nn.ModuleDict({"embed": nn.Embedding(7, 4), "head": nn.Linear(4, 3)})
    report = specops.attach(None, model, CLIP).report(measure=False)
    assert "embedding" in report["embed.weight"].reason
    attachment = specops.attach(None, model, Plan([("embed.*", CLIP)]))
    attachment.step()
    assert float(specops.spectral_norm(model["embed"].weight.detach())) <= 0.5


def test_tied_convolutions_are_constrained_once_for_the_larger_grid() -> None:
    first, second = (nn.Conv2d(2, 2, 3, padding=1, bias=False) for _ in range(2))
    second.weight = first.weight
    model = nn.Sequential(first, nn.AvgPool2d(2), second)
    attachment = specops.attach(None, model, CLIP)
    model(torch.zeros(1, 2, 8, 6))
    attachment.step()
    report = attachment.report()
    assert report["0.weight"].geometry.startswith("conv 8×6")
    assert report["2.weight"].reason == "tied to 0.weight"
    assert len(attachment.history) == 1
    different = nn.Sequential(first, nn.Conv2d(2, 2, 3, stride=2, padding=1, bias=False))
    different[1].weight = first.weight
    with pytest.raises(errors.PlanError, match="same tensor but different maps"):
        specops.attach(None, different, Plan([("0.*", CLIP)]))


def test_geometries_can_be_overridden() -> None:
    model = nn.ModuleDict({"bilinear": nn.Bilinear(2, 3, 4)})
    geometry = Dense(out_axes=(0,), in_axes=(1, 2))
    attachment = specops.attach(None, model, CLIP, geometries={"bilinear.weight": geometry})
    attachment.step()
    assert float(specops.spectral_norm(model["bilinear"].weight.detach(), geometry)) <= 0.5


def test_gates_and_fused_projections_are_blocks() -> None:
    torch.manual_seed(0)
    model = nn.ModuleDict({"lstm": nn.LSTM(5, 4), "attention": nn.MultiheadAttention(4, 2)})
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(3)
    specops.project(model, CLIP)
    for gate in model["lstm"].weight_ih_l0.detach().chunk(4):
        assert float(torch.linalg.matrix_norm(gate, 2)) <= 0.5
    for block in model["attention"].in_proj_weight.detach().chunk(3):
        assert float(torch.linalg.matrix_norm(block, 2)) == pytest.approx(0.5, rel=1e-5)
    assert float(torch.linalg.matrix_norm(model["attention"].out_proj.weight.detach(), 2)) <= 0.5


def test_lazy_and_meta_parameters_say_what_to_do() -> None:
    with pytest.raises(errors.UnsupportedArrayError, match=r"0\.weight is a lazy.*run one forward"):
        specops.attach(None, nn.Sequential(nn.LazyLinear(3)), CLIP)
    with pytest.raises(errors.UnsupportedArrayError, match=r"meta device.*materialise"):
        specops.attach(None, nn.Sequential(nn.Linear(2, 3, device="meta")), CLIP)


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_names_are_those_of_the_plain_model() -> None:
    model = network()
    compiled = torch.compile(model)
    for wrapped in (nn.DataParallel(model), compiled, nn.DataParallel(compiled)):
        report = specops.attach(None, wrapped, CLIP).report(measure=False)
        assert [r.name for r in report.rows] == [n for n, _ in model.named_parameters()]
    own = nn.Sequential()
    own.module = nn.Linear(2, 2)
    report = specops.attach(None, own, CLIP).report(measure=False)
    assert [r.name for r in report.rows] == ["module.weight", "module.bias"]


def test_replaced_parameters_are_found_again() -> None:
    model = network()
    attachment = specops.attach(None, model, CLIP)
    model.load_state_dict({k: 4 * v for k, v in model.state_dict().items()}, assign=True)
    attachment.step()
    assert max(exact_norms(model).values()) <= 0.5 * (1 + 1e-5)


def test_overflow_under_a_fused_scaler_does_not_count() -> None:
    for fused in (True, False):
        model = network()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, fused=fused)
        attachment = specops.attach(optimizer, model, CLIP)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
        for factor, steps in ((float("inf"), 0), (1.0, 1)):
            optimizer.zero_grad()
            loss = model(torch.linspace(-1, 1, 512).reshape(4, 2, 8, 8)).square().mean() * factor
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            assert attachment.steps == steps


def test_errors_name_the_layer() -> None:
    model = network()
    with pytest.raises(errors.GeometryError, match=r"0\.weight.*has 4 axes"):
        specops.attach(None, model, CLIP, geometries={"0.weight": Conv((8,))})
    with pytest.raises(errors.GeometryError, match=r"0\.weight.*Dense.*got 'conv'"):
        specops.attach(None, model, CLIP, geometries={"0.weight": "conv"})
    with pytest.raises(errors.GeometryError, match=r"dict of patterns.*got Dense"):
        specops.attach(None, model, CLIP, geometries=Dense())  # type: ignore[arg-type]
    with pytest.raises(errors.PlanError, match="no parameters to act on"):
        specops.attach(None, nn.ReLU(), CLIP)
    scheduled = SpectralNormalization(norm="reshaped", scale=lambda *_: -1.0)
    with pytest.raises(ValueError, match="scale must be") as refused:
        specops.attach(None, model, scheduled)
    assert "0.weight at step 1" in refused.value.__notes__[0]
    attachment = specops.attach(None, model, ClipSpectralNorm(lambda *_: 0.0))
    with pytest.raises(ValueError, match="max_norm must be") as raised:
        attachment.step()
    assert "0.weight at step 1" in raised.value.__notes__[0]
    with pytest.raises(errors.AdapterError, match="no torch optimizer"):
        specops.attach(object(), model, CLIP)


def test_copies_of_the_optimizer_lose_the_hook_and_the_attachment_stays_with_its_own() -> None:
    model = network()
    optimizer = optimizer_of(model)
    attachment = specops.attach(optimizer, model, CLIP)
    copied = copy.deepcopy(optimizer)
    assert not copied._optimizer_step_post_hooks
    assert attachment.is_attached


def test_larger_inputs_later_are_noticed() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1, bias=False))
    attachment = specops.attach(None, model, CLIP)
    for size in (2, 16):
        with torch.no_grad():
            model[0].weight.mul_(3)
        model(torch.zeros(1, 4, size, size))
        attachment.step()
        norm = specops.spectral_norm(model[0].weight.detach(), Conv((size, size)))
        assert 0.4 < float(norm) <= 0.5


def test_circular_layers_of_odd_grids() -> None:
    torch.manual_seed(17)
    options = {"stride": 2, "padding_mode": "circular", "bias": False}
    model = nn.Sequential(nn.Conv2d(1, 2, 3, padding=1, **options))
    for sizes in ([], [5], [6, 5]):
        with torch.no_grad():
            model[0].weight.mul_(5)
        attachment = specops.attach(None, model, CLIP)
        for size in sizes:
            model(torch.zeros(1, 1, size, size))
        attachment.step()
        for size in (3, 5, 6) if len(sizes) != 1 else (5,):
            matrix = layer_matrix(copy.deepcopy(model[0]).double(), 1, (size, size))
            assert np.linalg.norm(matrix, 2) <= 0.5 * (1 + 1e-5)
        attachment.detach()
    monitor = specops.attach(None, model, Monitor())
    model(torch.zeros(1, 1, 7, 7))
    monitor.step()
    assert monitor.history[-1]["spectral_norm"] <= 0.5 * (1 + 1e-5)


def test_misfit_found_at_the_first_forward() -> None:
    layer = nn.Conv2d(1, 2, 4, stride=2, padding=1, padding_mode="circular", bias=False)
    model = nn.Sequential(layer, nn.Flatten(), nn.Linear(18, 2))
    for plan in (CLIP, Plan([("0.*", CLIP)])):
        attachment = specops.attach(None, model, plan)
        model(torch.zeros(1, 1, 7, 7))
        if plan is CLIP:
            attachment.step()
            attachment.step()
            assert "3 outputs" in attachment.report()["0.weight"].reason
            assert attachment.report()["2.weight"].norm <= 0.5
        else:
            with pytest.raises(errors.GeometryError, match=r"0\.weight at step 1.*3 outputs"):
                attachment.step()
        attachment.detach()


def test_a_rule_that_needs_a_size_acts_once_there_is_one() -> None:
    model = nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), nn.Flatten(), nn.Linear(75, 2))
    attachment = specops.attach(None, model, specops.SpectralHammer(0.1, norm="operator"))
    with pytest.warns(errors.CautionWarning, match=r"0\.weight .* run a forward pass first"):
        attachment.step()
    assert "no input yet" in attachment.history[0]["skipped"]
    assert attachment.report(measure=False)["0.weight"].rule
    model(torch.zeros(1, 2, 5, 5))
    attachment.step()
    assert attachment.history[2]["norm_after"] == pytest.approx(0.1)
    assert attachment.report(measure=False)["0.weight"].rule


def test_a_misfit_is_forgotten_when_the_rule_acts() -> None:
    attachment = specops.attach(None, nn.Conv2d(2, 3, 3), Picky(errors.UnsupportedGeometryError))
    attachment.step()
    assert attachment.report()["weight"].reason == "not today"
    attachment.step()
    row = attachment.report()["weight"]
    assert row.rule
    assert not row.reason
    assert row.norm is not None


@pytest.mark.parametrize("stage", ["weights", "gradients", "forward"])
def test_a_mistake_of_a_rule_is_no_misfit(stage: str) -> None:
    layer = nn.Conv2d(2, 3, 3)
    with pytest.raises(errors.GeometryError, match=r"weight.*not today"):  # noqa: PT012
        attachment = specops.attach(None, layer, Picky(errors.GeometryError, stage))
        layer(torch.zeros(1, 2, 5, 5)).sum().backward()
        attachment.before_step()
        attachment.step()


class Picky:
    """A rule that fails at its first firing."""

    def __init__(self, error: type[Exception], stage: Any = "weights") -> None:
        self.error, self.stage, self.calls = error, stage, 0

    def init(self, weight: Any, geometry: Any, name: str) -> dict[str, Any]:
        if self.stage == "forward":
            raise self.error("not today")
        return {}

    def update(self, weight: Any, geometry: Any, state: Any, **_: Any) -> Any:
        self.calls += 1
        if self.calls == 1:
            raise self.error("not today")
        return 0.5 * weight, state, {}

    def apply(self, weight: Any, geometry: Any, state: Any, **_: Any) -> Any:
        return weight


@pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")
@pytest.mark.parametrize(
    "rule", [CLIP, SpectralNormalization(norm="reshaped", scale=0.5)], ids=["clip", "normalised"]
)
def test_halves_of_complex_numbers(rule: Any) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(6, 4, bias=False)
    layer.weight = nn.Parameter(torch.randn(4, 6, dtype=torch.complex64).to(torch.complex32))
    attachment = specops.attach(None, layer, rule)
    attachment.step()
    (w,) = attachment.weights().values()
    assert w.dtype == torch.complex32
    norm = float(torch.linalg.matrix_norm(w.detach().to(torch.complex64), 2))
    assert norm == pytest.approx(0.5, rel=2e-3)
    with torch.no_grad():
        layer.weight.fill_(float("nan"))
    with pytest.raises(errors.NonFiniteError, match="weight holds NaN"):
        attachment.step()


def test_one_bad_matrix_of_a_stack_follows_the_policy() -> None:
    model = nn.Module()
    model.experts = nn.Parameter(torch.ones(3, 4, 4))
    with torch.no_grad():
        model.experts[1, 0, 0] = float("nan")
    geometries = {"experts": Dense(out_axes=(1,), batch_axes=(0,))}
    attachment = specops.attach(None, model, CLIP, geometries=geometries)
    with pytest.raises(errors.NonFiniteError, match="experts holds NaN"):
        attachment.step()
    assert float(model.experts.detach()[0, 0, 0]) == 1.0
    report = specops.project(model, CLIP, geometries=geometries, on_nonfinite="skip")
    assert report["experts"].norm_is == "not finite"


def test_reparametrised_gates_are_no_weights() -> None:
    lstm = nn.LSTM(3, 4)
    prune.l1_unstructured(lstm, "weight_hh_l0", amount=0.5)
    report = specops.attach(None, nn.ModuleDict({"lstm": lstm}), CLIP).report(measure=False)
    assert "reparametrised" in report["lstm.weight_hh_l0_orig"].reason
    assert report["lstm.weight_ih_l0"].rule


def test_changes_after_attaching_are_noticed() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))
    with torch.no_grad():
        for layer in model:
            layer.weight.copy_(2 * torch.eye(4))
    optimizer = optimizer_of_list([*model[0].parameters(), *model[1].parameters()])
    attachment = specops.attach(optimizer, model, CLIP)
    model[0].weight.requires_grad_(False)
    optimizer.step()
    assert float(model[0].weight[0, 0]) == 2.0
    assert float(model[1].weight.detach()[0, 0]) == pytest.approx(0.5)
    assert attachment.history[0]["skipped"].startswith("frozen")
    report = attachment.report()
    assert report["2.weight"].reason == "not in this optimizer"
    assert report["0.weight"].idle.startswith("frozen")
    assert "– frozen (requires_grad=False), under Clip" in str(report)
    assert [row.name for row in report if row.idle] == ["0.weight"]
    assert len(report) == 6
    optimizer.add_param_group({"params": list(model[2].parameters())})
    optimizer.step()
    assert float(model[2].weight.detach()[0, 0]) == pytest.approx(0.5)
    assert attachment.report()["2.weight"].rule
    nn.utils.parametrizations.weight_norm(model[1])
    with pytest.raises(errors.AdapterError, match=r"1\.weight is no parameter any more"):
        optimizer.step()


def test_a_failed_attach_leaves_no_hooks() -> None:
    class Forward:
        stage = "forward"

        def init(self, weight: Any, geometry: Any, name: str) -> dict[str, Any]:
            return {}

        def update(self, weight: Any, geometry: Any, state: Any, **_: Any) -> Any:
            return weight, state, {}

    model = network()
    optimizer = optimizer_of(model)
    with pytest.raises(errors.AdapterError, match="stage 'forward'"):
        specops.attach(optimizer, model, Plan([("7.*", Forward()), ("*", CLIP)]))
    assert not any(m._forward_hooks for m in model.modules())
    assert not optimizer._optimizer_step_post_hooks


@pytest.mark.filterwarnings("error::specops.errors.CautionWarning")
@pytest.mark.parametrize("why", ["not covered", "another", "broken", "later"])
def test_a_warning_that_is_an_error_and_a_broken_rule_leave_nothing_either(why: str) -> None:
    class Broken:
        stage = "forward"

        def init(self, weight: Any, geometry: Any, name: str) -> dict[str, Any]:
            raise ArithmeticError("broken")

        def update(self, weight: Any, geometry: Any, state: Any, **_: Any) -> Any:
            return weight, state, {}

        def apply(self, weight: Any, geometry: Any, state: Any, **_: Any) -> Any:
            return weight

    class BrokenLater(Broken):
        def init(self, weight: Any, geometry: Any, name: str) -> dict[str, Any]:
            return {"state": 1.0 * weight}

        def apply(self, weight: Any, geometry: Any, state: Any, **_: Any) -> Any:
            raise ArithmeticError("broken")

    model = nn.Sequential(nn.Conv2d(2, 2, 3), nn.BatchNorm2d(2), nn.Linear(2, 2))
    model[1].num_batches_tracked += 1
    optimizer = optimizer_of(model)
    rule: Any = specops.SpectralNormalization(norm="reshaped")
    if why == "not covered":
        for name in "abc":
            model.register_parameter(name, nn.Parameter(torch.ones(2, 2)))
        optimizer = optimizer_of(model)
    elif why == "another":
        before, rule = specops.attach(optimizer, model, CLIP), CLIP
    else:
        rule = Broken() if why == "broken" else BrokenLater()
    hooks = [len(m._forward_hooks) for m in model.modules()]
    with pytest.raises((errors.CautionWarning, ArithmeticError)):
        specops.attach(optimizer, model, rule)
    assert [len(m._forward_hooks) for m in model.modules()] == hooks
    assert [type(m) for m in model] == [nn.Conv2d, nn.BatchNorm2d, nn.Linear]
    assert len(optimizer._optimizer_step_post_hooks) == (why == "another")
    if why == "another":
        before.detach()
        specops.attach(optimizer, model, CLIP)


def test_excluded_lazy_and_meta_layers_do_no_harm() -> None:
    for odd in (nn.LazyLinear(3), nn.Linear(2, 3, device="meta")):
        model = nn.ModuleDict({"odd": odd, "plain": nn.Linear(2, 2)})
        report = specops.attach(None, model, Plan([("odd.*", None), ("*", CLIP)])).report()
        assert [row.name for row in report.constrained] == ["plain.weight"]


def test_history_is_made_of_floats() -> None:
    model = nn.ModuleDict({"lstm": nn.LSTM(3, 4)})
    attachment = specops.attach(None, model, Monitor())
    attachment.step()
    norms = attachment.history[0]["spectral_norm"]
    assert len(norms) == 4
    assert all(isinstance(n, float) for n in norms)


def test_a_tied_map_can_be_named_by_either_name() -> None:
    first, second = nn.Conv1d(2, 2, 3, bias=False), nn.Conv1d(2, 2, 3, stride=2, bias=False)
    second.weight = first.weight
    model = nn.ModuleDict({"first": first, "second": second})
    attachment = specops.attach(None, model, CLIP, geometries={"second.weight": Conv(None)})
    attachment.step()
    assert float(specops.spectral_norm(first.weight.detach(), Conv((32,)))) <= 0.5


def test_names_are_whole_in_a_report_as_they_are_asked_for() -> None:
    name = "a_layer_whose_name_goes_on_and_on_and_on_and_on_and_on_for_ever"
    report = specops.attach(None, nn.ModuleDict({name: nn.Linear(2, 2)}), CLIP).report()
    names = [line.split()[0] for line in str(report).splitlines()[2:4]]
    assert names == [f"{name}.weight", f"{name}.bias"]
    assert all(report[n].name == n for n in names)
    assert "…" not in str(report)


def test_an_attachment_says_who_steps_it() -> None:
    model = nn.Linear(2, 2)
    optimizer = optimizer_of_list([*model.parameters()])
    for given, status in ((None, "to be stepped by hand"), (optimizer, "attached")):
        attachment = specops.attach(given, model, CLIP)
        assert repr(attachment) == f"<Attachment: 1 weights, step 0, {status}>"
        attachment.detach()
        assert repr(attachment) == "<Attachment: 1 weights, step 0, detached>"


@pytest.mark.parametrize("length", [-1, 1.5, "10", True])
def test_the_length_of_a_history_is_a_count(length: Any) -> None:
    with pytest.raises(ValueError, match="history must be"):
        specops.attach(None, nn.Linear(2, 2), CLIP, history=length)


@pytest.mark.parametrize("replicas", [3, "WORLD"])
def test_replicas_that_are_no_group_are_refused_by_name(replicas: Any) -> None:
    with pytest.raises(errors.AdapterError, match="replicas must be a process group"):
        specops.attach(None, nn.Linear(2, 2), CLIP, replicas=replicas)
