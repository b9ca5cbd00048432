"""The weight in use: its values, its derivatives of every kind, and what may be done with it."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest

import specops
from specops import SpectralNormalization, StableRankNormalization, TrainableScale
from tests.torch_adapter.models import new_compilers, raw

torch = pytest.importorskip("torch")
from torch import nn  # noqa: E402
from torch.autograd import forward_ad  # noqa: E402
from torch.utils.checkpoint import checkpoint  # noqa: E402
from torch.utils.flop_counter import FlopCounterMode  # noqa: E402

from specops_torch import fast_paths, fused  # noqa: E402

# torch imports decompositions for forward derivatives, which it scripts.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")

WIDE = (300, 260)
"""More entries than a small layer has."""


def attached(
    shape: tuple[int, int] = WIDE, *, bias: bool = True, scale: float = 1.3, layer: Any = nn.Linear
) -> tuple[nn.Module, Any]:
    """(a layer under the rule in double precision, what it should compute, differentiable)."""
    torch.manual_seed(0)
    module = layer(shape[1], shape[0], bias=bias).double()
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    rule = SpectralNormalization(norm="reshaped", scale=scale)
    maps = {"weight": specops.Dense()}
    attachment = specops.attach(optimizer, module, rule, geometries=maps)
    state = attachment.state_dict()["weights"]["weight"]["state"]
    u, v = state["u0"], state["v0"]

    def expected(x: Any) -> Any:
        w = raw(module)
        return nn.functional.linear(x, w * (scale / torch.dot(u, w @ v)), module.bias)

    return module, expected


def inputs(*shape: int) -> Any:
    torch.manual_seed(1)
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


def gradients(y: Any, of: list[Any], **options: Any) -> Any:
    return torch.autograd.grad(
        (y * torch.arange(y.numel()).view(y.shape).cos()).sum(), of, **options
    )


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [WIDE, (5, 7)], ids=["large", "small"])
@pytest.mark.parametrize("rows", [(4,), (2, 3), (700,), (0,)], ids=str)
def test_values_and_both_derivatives(
    shape: tuple[int, int], bias: bool, rows: tuple[int, ...]
) -> None:
    module, expected = attached(shape, bias=bias)
    x = inputs(*rows, shape[1])
    of = [x, *module.parameters()]
    torch.testing.assert_close(module(x), expected(x))
    for ours, theirs in zip(gradients(module(x), of), gradients(expected(x), of), strict=True):
        torch.testing.assert_close(ours, theirs)
    twice = []
    for function in (module, expected):
        first = gradients(function(x).sin(), of, create_graph=True)
        twice.append(torch.autograd.grad(sum(g.square().sum() for g in first), of))
    for ours, theirs in zip(*twice, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_several_gradients_at_once_and_forward_derivatives() -> None:
    for shape in (WIDE, (5, 7)):
        module, expected = attached(shape)
        x = inputs(2, shape[1])
        for of in (x, raw(module)):
            several = torch.randn(3, 2, shape[0], dtype=torch.float64)
            ours, theirs = (
                torch.autograd.grad(f(x), of, several, is_grads_batched=True)[0]
                for f in (module, expected)
            )
            torch.testing.assert_close(ours, theirs)
        with forward_ad.dual_level():
            dual = forward_ad.make_dual(x.detach(), x.detach().sin())
            ours, theirs = (forward_ad.unpack_dual(f(dual)).tangent for f in (module, expected))
        torch.testing.assert_close(ours, theirs)
        rows = torch.func.vmap(torch.func.jacrev(module))(x.detach())
        torch.testing.assert_close(rows[0], torch.func.jacrev(expected)(x.detach()[0]))


def test_what_follows_may_work_in_place() -> None:
    module, expected = attached()
    for rows in ((4,), (2, 2)):
        x = inputs(*rows, WIDE[1])
        ours = nn.functional.relu(module(x), inplace=True)
        torch.testing.assert_close(ours, expected(x).relu())
        torch.testing.assert_close(gradients(ours, [x])[0], gradients(expected(x).relu(), [x])[0])


class Doubled(nn.Linear):
    """A layer with a forward of its own, which looks at its weight."""

    def forward(self, x: Any) -> Any:
        assert isinstance(self.weight, torch.Tensor)
        return nn.functional.linear(x, self.weight, self.bias) * 2.0


def test_others_who_look_at_the_weight_see_a_tensor() -> None:
    module, expected = attached(layer=Doubled)
    x = inputs(4, WIDE[1])
    torch.testing.assert_close(module(x), 2.0 * expected(x))
    module, expected = attached()
    seen = []
    handle = module.register_forward_pre_hook(lambda m, a: seen.append(m.weight))
    module.register_forward_hook(lambda m, a, y: seen.append(m.weight))
    torch.testing.assert_close(module(x), expected(x))
    assert all(isinstance(w, torch.Tensor) for w in seen)
    assert len(seen) == 2
    handle.remove()
    every = nn.modules.module.register_module_forward_pre_hook(lambda m, a: seen.append(m.weight))
    try:
        module(x)
    finally:
        every.remove()
    assert isinstance(seen[2], torch.Tensor)


def test_autocast_and_inputs_of_other_dtypes() -> None:
    module, _ = attached()
    module.float()
    x = torch.randn(4, WIDE[1])
    plain = module(x)
    with torch.autocast("cpu", torch.bfloat16):
        y = module(x)
        assert y.dtype == torch.bfloat16
        y.float().square().sum().backward()
    torch.testing.assert_close(y.float(), plain, rtol=0.05, atol=0.05)
    assert raw(module).grad.dtype == torch.float32
    with pytest.raises(RuntimeError, match="dtype"):
        module(x.double())
    torch.testing.assert_close(module(x[0]), plain[0])


class Recipe(torch.Tensor):
    """A subclass as torch's documentation makes them."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_inputs_of_every_kind() -> None:
    module, _ = attached()
    module.float()
    x = torch.randn(4, WIDE[1]).relu()
    expected = module(x)
    torch.testing.assert_close(module(x.to_sparse()), expected)
    torch.testing.assert_close(torch.Tensor(module(x.as_subclass(Recipe))), expected)
    for layout in (torch.strided, torch.jagged):
        nested = torch.nested.nested_tensor([x[:1], x[1:]], layout=layout)
        torch.testing.assert_close(torch.cat(module(nested).unbind()), expected)
    with torch._C.DisableTorchFunctionSubclass():
        torch.testing.assert_close(module(x), expected)
    with torch.device("cpu"):
        torch.testing.assert_close(module(x), expected)
    torch.testing.assert_close(module(input=x), expected)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_encoders_in_evaluation_with_a_mask() -> None:
    torch.manual_seed(0)
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(64, 4, batch_first=True), 2)
    specops.attach(None, encoder, SpectralNormalization(norm="reshaped"))
    encoder.eval()
    mask = torch.tensor([[False, False, True], [False, False, False]])
    x = torch.randn(2, 3, 64)
    with torch.no_grad():
        y = encoder(x, src_key_padding_mask=mask)
        torch.testing.assert_close(y[1], encoder(x[1:])[0], rtol=1e-4, atol=1e-5)


def test_forwards_of_instances_may_do_anything_with_the_weight(monkeypatch: Any) -> None:
    module, expected = attached()
    x = inputs(4, WIDE[1])
    y = expected(x)
    module.forward = lambda x: nn.functional.linear(x, module.weight * 2.0) + module.bias
    torch.testing.assert_close(module(x), 2.0 * y - module.bias)
    module.forward = lambda x: nn.functional.linear(x, module.weight[:3])
    torch.testing.assert_close(module(x), (y - module.bias)[:, :3])
    del module.forward
    plain = nn.functional.linear
    monkeypatch.setattr(nn.functional, "linear", lambda x, w, b: plain(x, w + 0.0, b))
    torch.testing.assert_close(module(x), y)


@pytest.mark.parametrize("size", [300, 9], ids=["large", "small"])
@pytest.mark.parametrize("change", ["load", "double", "copy", "transpose"])
def test_checkpoints_recompute_in_the_same_form(size: int, change: str) -> None:
    torch.manual_seed(0)
    model = nn.Linear(size, size)
    specops.attach(
        torch.optim.SGD(model.parameters(), lr=0.1), model, SpectralNormalization(norm="reshaped")
    )
    x = torch.randn(4, size, requires_grad=True)
    model(x)
    if change == "load":
        model.load_state_dict(nn.Linear(size, size).state_dict())
    elif change == "double":
        model, x = model.double(), x.detach().double().requires_grad_()
    elif change == "copy":
        model = copy.deepcopy(model)
        model.weight.data.mul_(3.0)
    else:
        model.weight.data = model.weight.data.t()
    checkpoint(model, x, use_reentrant=False).square().sum().backward()
    found = x.grad.clone(), model.weight.grad.clone()
    x.grad = model.weight.grad = None
    model(x).square().sum().backward()
    torch.testing.assert_close(found, (x.grad, model.weight.grad))


@new_compilers
def test_hooks_that_come_and_go_do_not_disturb_recomputation() -> None:
    module, _ = attached()
    x = inputs(4, WIDE[1])
    handle = module.register_forward_hook(lambda m, a, y: None)
    y = checkpoint(module, x, use_reentrant=False)
    handle.remove()
    y.sum().backward()
    y = checkpoint(module, x, use_reentrant=False)
    with FlopCounterMode(display=False):
        y.sum().backward()


@pytest.mark.filterwarnings("ignore:`torch.jit", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize(
    ("module", "inputs"),
    [
        (nn.Linear(*WIDE), 1),
        (nn.Linear(16, 5), 1),
        (nn.MultiheadAttention(16, 4), 3),
    ],
    ids=["large", "small", "attention"],
)
def test_traced_layers_run_where_gradients_are_recorded(module: Any, inputs: int) -> None:
    specops.attach(None, module, SpectralNormalization(norm="reshaped"))
    width = 16 if inputs == 3 else module.in_features
    x = [torch.randn(2, 3, width)] * inputs
    traced = torch.jit.trace(module, tuple(x), check_trace=False)
    torch.testing.assert_close(traced(*x), module(*x))
    torch.jit.save(traced, io.BytesIO())


def test_weights_of_other_kinds() -> None:
    module, expected = attached()
    x, tangent = inputs(2, WIDE[1]).detach(), raw(module).detach().sin()
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(raw(module).detach(), tangent)
        y = torch.func.functional_call(module, {"weight": dual}, (x,))
        found = forward_ad.unpack_dual(y).tangent
    step = 1e-6
    with torch.no_grad():
        module.weight.add_(step * tangent)
        above = expected(x)
        module.weight.sub_(2 * step * tangent)
        difference = (above - expected(x)) / (2 * step)
    torch.testing.assert_close(found, difference, rtol=1e-5, atol=1e-6)
    with torch.inference_mode():
        made = nn.Linear(9, 9)
    specops.attach(None, made, SpectralNormalization(norm="reshaped"))
    with torch.no_grad():
        assert float(torch.linalg.matrix_norm(made(torch.eye(9)) - made.bias, 2)) < 1.01
    assert module.to("meta")(x.to("meta")).shape == (2, WIDE[0])


def test_frozen_weights_keep_no_inputs() -> None:
    module, expected = attached()
    module.weight.requires_grad_(False)
    x = inputs(4, WIDE[1])
    before = x * 1.0
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape), lambda t: t):
        kept: list[Any] = []
        y = module(x * 1.0)
    assert (4, WIDE[1]) not in kept
    y = module(before)
    before.add_(1.0)
    of = [x, module.bias]
    for ours, theirs in zip(gradients(y, of), gradients(expected(x), of), strict=True):
        torch.testing.assert_close(ours, theirs)
    twice = [
        torch.autograd.grad(gradients(f(x).sin(), [x], create_graph=True)[0].sum(), x)[0]
        for f in (module, expected)
    ]
    torch.testing.assert_close(*twice)
    with torch.inference_mode():
        x = torch.randn(4, WIDE[1], dtype=torch.float64)
    module(x).sum().backward()


@pytest.mark.parametrize("shape", [WIDE, (5, 7)], ids=["large", "small"])
@pytest.mark.parametrize("size", [1e-30, 1e-17, 1e17, 1e30])
def test_tiny_and_huge_weights_have_gradients(shape: tuple[int, int], size: float) -> None:
    module, _ = attached(shape)
    module.float()
    x = torch.randn(3, shape[1])
    module(x).square().sum().backward()
    expected = module.weight.grad
    with torch.no_grad():
        module.weight.mul_(size)
    module.weight.grad = None
    module(x).square().sum().backward()
    scale = expected.abs().max().item()
    torch.testing.assert_close(
        module.weight.grad.double() * size, expected.double(), rtol=1e-3, atol=1e-3 * scale
    )


def test_derivatives_along_the_bias_and_of_gradients() -> None:
    for shape in (WIDE, (5, 7)):
        module, expected = attached(shape)
        x = inputs(2, shape[1])
        with forward_ad.dual_level():
            bias = forward_ad.make_dual(module.bias.detach(), module.bias.detach().cos())
            y = torch.func.functional_call(module, {"bias": bias}, (x,))
            tangent = forward_ad.unpack_dual(y).tangent
        torch.testing.assert_close(tangent, module.bias.detach().cos().expand(2, -1))
        several = []
        for function in (module, expected):
            y = function(x)
            with forward_ad.dual_level():
                g = forward_ad.make_dual(torch.ones_like(y), torch.ones_like(y).cumsum(1).sin())
                found = torch.autograd.grad(y, raw(module), g)[0]
                several.append(forward_ad.unpack_dual(found).tangent)
        torch.testing.assert_close(*several)


RULES = {
    "normalised": SpectralNormalization(norm="reshaped", scale=1.3),
    "limited": StableRankNormalization(0.3, norm="reshaped"),
    "limited to the dyad": StableRankNormalization(0.01, norm="reshaped"),
    "hardly limited": StableRankNormalization(1.0, norm="reshaped"),
    "bidirectional": SpectralNormalization(norm="bidirectional"),
    "trained": SpectralNormalization(norm="reshaped", scale=TrainableScale(0.7)),
    "scheduled": SpectralNormalization(norm="reshaped", scale=lambda step, *_: 1.0 + step),
}


@pytest.mark.parametrize("layer", ["linear", "conv", "gates", "row", "transposed"])
@pytest.mark.parametrize("name", list(RULES))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_one_operation_is_the_rule(monkeypatch: Any, name: str, layer: str, dtype: Any) -> None:
    """The fused operation against the rule's `apply`: values, gradients, gradients of those."""
    makers: dict[str, Any] = {
        "linear": lambda: nn.Linear(9, 6),
        "conv": lambda: nn.Conv2d(3, 4, 3),
        "gates": lambda: nn.LSTMCell(5, 4),
        "row": lambda: nn.Linear(7, 1),
        "transposed": lambda: nn.ConvTranspose1d(3, 4, 2),
    }
    attribute = "weight_ih" if layer == "gates" else "weight"
    found, counted = [], []
    apply = fused._Used.apply
    monkeypatch.setattr(fused._Used, "apply", lambda *a: counted.append(1) or apply(*a))
    for enabled in (True, False):
        monkeypatch.setattr(fused, "ENABLED", enabled)
        torch.manual_seed(2)
        module = makers[layer]().to(dtype)
        attachment = specops.attach(None, module, specops.Plan([(attribute, RULES[name])]))
        of = [raw(module, attribute), *attachment.scales.values()]
        used = getattr(module, attribute)
        pattern = torch.arange(used.numel(), dtype=dtype).view(used.shape).sin()
        first = torch.autograd.grad((used * pattern).sum(), of)
        used = getattr(module, attribute)
        again = torch.autograd.grad((used.sin() * pattern).sum(), of, create_graph=True)
        twice = torch.autograd.grad(sum(g.square().sum() for g in again), of)
        found.append([used.detach(), *first, *twice])
    assert bool(counted) == (layer != "transposed" or name == "bidirectional")
    tolerance = 1e-4 if dtype == torch.float32 else 1e-9
    for ours, plain in zip(*found, strict=True):
        torch.testing.assert_close(ours, plain, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("every", [1, 2])
@pytest.mark.parametrize("name", ["normalised", "limited", "bidirectional"])
def test_a_measured_norm_is_used_for_as_long_as_it_is_the_weights(
    monkeypatch: Any, name: str, every: int
) -> None:
    """One look less at a weight that a step has just measured; at any other it is taken."""
    asked: list[int] = []
    along = fused._along
    monkeypatch.setattr(fused, "_along", lambda *a: asked.append(1) or along(*a))
    torch.manual_seed(1)
    layer = nn.Conv2d(3, 4, 3)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.5)
    specops.attach(optimizer, layer, RULES[name], every=every)

    def asks() -> bool:
        asked.clear()
        with torch.no_grad():
            used = layer.weight.clone()
            monkeypatch.setattr(fused, "ENABLED", False)
            torch.testing.assert_close(used, layer.weight.clone(), rtol=1e-5, atol=1e-6)
            monkeypatch.setattr(fused, "ENABLED", True)
        return bool(asked)

    found = [asks()]
    for _ in range(2):
        optimizer.zero_grad()
        layer(torch.ones(1, 3, 5, 5)).square().sum().backward()
        optimizer.step()
        found.append(asks())
    assert found == [False, every > 1, False]
    raw(layer).data[0, 0, 0] *= 1.0001  # which torch does not count
    assert asks()


@pytest.mark.parametrize("shape", [(6, 8), WIDE])
def test_differences_of_single_entries_are_derivatives(shape: tuple[int, int]) -> None:
    """As `torch.autograd.gradcheck` takes them in double precision, by writes that nothing counts,
    too few for a sample to show."""
    layer, _ = attached(shape)
    x, weight, h = inputs(3, shape[1]), raw(layer), 1e-5

    def loss() -> Any:
        return layer(x).square().mean()

    (gradient,) = torch.autograd.grad(loss(), weight)
    entries = weight.data.view(-1)
    for at in (1, 5, 40):
        plain, losses = float(entries[at]), []
        for moved in (plain + h, plain - h):
            entries[at] = moved
            losses.append(float(loss().detach()))
        entries[at] = plain
        difference = (losses[0] - losses[1]) / (2 * h)
        assert float(gradient.view(-1)[at]) == pytest.approx(difference, rel=1e-4, abs=1e-9)


def test_steps_in_few_calls_are_the_rules(monkeypatch: Any) -> None:
    """`fast_paths` against `rule.update`: vectors and figures, small and large, both dtypes."""
    rules = [
        SpectralNormalization(norm="reshaped", iterations=2),
        StableRankNormalization(0.3, norm="reshaped"),
        specops.SpectralNormPenalty(0.1, norm="reshaped"),
    ]
    for rule in rules:
        for shape, dtype in (((6, 9), torch.float32), (WIDE, torch.float64)):
            states, histories = [], []
            for enabled in (True, False):
                monkeypatch.setattr(fast_paths, "ENABLED", enabled)
                torch.manual_seed(4)
                layer = nn.Linear(shape[1], shape[0], bias=False).to(dtype)
                optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
                attachment = specops.attach(optimizer, layer, rule)
                for _ in range(3):
                    optimizer.zero_grad()
                    layer(torch.ones(2, shape[1], dtype=dtype)).square().mean().backward()
                    optimizer.step()
                states.append(attachment.state_dict()["weights"]["weight"]["state"])
                histories.append(attachment.history)
            tolerance = 1e-4 if dtype == torch.float32 else 1e-9
            for key, x in states[1].items():
                torch.testing.assert_close(states[0][key], x, rtol=tolerance, atol=tolerance)
            for ours, plain in zip(*histories, strict=True):
                assert ours == {
                    k: v if isinstance(v, str) else pytest.approx(v, rel=tolerance)
                    for k, v in plain.items()
                }
