"""Jacobian penalty, adversarial loss and balanced chains against their definitions."""

from __future__ import annotations

import copy
from typing import Any

import pytest

torch = pytest.importorskip("torch")
from torch import nn  # noqa: E402

import specops  # noqa: E402
from specops.errors import AdapterError  # noqa: E402
from specops_torch import (  # noqa: E402
    adversarial_loss,
    balance_norms,
    geometry_of,
    jacobian_penalty,
    layerwise_jacobian_penalty,
)


@pytest.fixture
def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()


def squared_jacobians(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return torch.stack([torch.func.jacrev(model)(row).square().sum() for row in x])


def test_jacobian_penalty_is_the_mean_squared_jacobian(model: nn.Sequential) -> None:
    x = torch.randn(5, 4, dtype=torch.float64)
    expected = 0.5 * squared_jacobians(model, x).mean()
    exact = jacobian_penalty(model, x, projections=None)
    torch.testing.assert_close(exact, expected)
    generator = torch.Generator().manual_seed(0)
    many = jacobian_penalty(model, x, projections=4000, generator=generator)
    torch.testing.assert_close(many, expected, rtol=0.03, atol=0)
    again = [
        jacobian_penalty(model, x, generator=torch.Generator().manual_seed(1)) for _ in range(2)
    ]
    assert again[0] == again[1]
    with pytest.raises(ValueError, match="at least 1"):
        jacobian_penalty(model, x, projections=0)


def test_its_gradient_reaches_the_parameters(model: nn.Sequential) -> None:
    x = torch.randn(5, 4, dtype=torch.float64)
    jacobian_penalty(model, x, projections=None).backward()
    weight = model[0].weight
    moved = weight.detach().clone()
    step = 1e-6
    values = []
    for sign in (1, -1):
        with torch.no_grad():
            weight.copy_(moved)
            weight[2, 1] += sign * step
        values.append(0.5 * squared_jacobians(model, x).mean().item())
    assert weight.grad[2, 1].item() == pytest.approx((values[0] - values[1]) / 2 / step, rel=1e-6)
    with torch.no_grad():
        assert jacobian_penalty(model, x, projections=None).requires_grad


def squared_layers(model: nn.Sequential, x: torch.Tensor) -> torch.Tensor:
    """Of an input, an activation behind each layer but the last: layer by layer."""
    total = torch.zeros((), dtype=x.dtype)
    for row in x:
        for part in (model[:2], model[2:]):
            total = total + torch.func.jacrev(part)(row).square().sum()
            row = part(row)
    return 0.5 * total / len(x)


def test_the_layerwise_penalty_sums_the_jacobians_of_the_layers(model: nn.Sequential) -> None:
    x = torch.randn(5, 4, dtype=torch.float64)
    exact = layerwise_jacobian_penalty(model, x, projections=None)
    torch.testing.assert_close(exact, squared_layers(model, x))
    generator = torch.Generator().manual_seed(0)
    many = layerwise_jacobian_penalty(model, x, projections=4000, generator=generator)
    torch.testing.assert_close(many, exact, rtol=0.03, atol=0)
    # Its gradient is that of the definition, through what enters the second layer as well.
    exact.backward()
    found = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    squared_layers(model, x).backward()
    expected = [p.grad for p in model.parameters() if p.grad is not None]
    assert len(found) == len(expected) == 3
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)
    # One layer alone is the whole Jacobian; without activations it is weight decay.
    torch.testing.assert_close(
        layerwise_jacobian_penalty(model, x, ["0"], projections=None),
        jacobian_penalty(model, x, projections=None),
    )
    linear = nn.Sequential(model[0], model[2])
    decay = 0.5 * sum(layer.weight.square().sum() for layer in linear)
    torch.testing.assert_close(layerwise_jacobian_penalty(linear, x, projections=None), decay)


class Beside(nn.Module):
    """Two layers next to each other, and a skip connection around a third."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(3, 3, bias=False) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.a(x)
        y = y + self.b(y.relu_())
        return y * self.c(x)


def test_layers_with_branches_and_those_that_do_not_follow() -> None:
    torch.manual_seed(0)
    model, x = Beside().double(), torch.randn(4, 3, dtype=torch.float64)
    y = model.a(x)
    last = torch.stack([torch.diag(c) @ model.b.weight for c in model.c(x)])
    first = (y > 0).double()[:, :, None] * model.a.weight
    expected = 0.5 * (first.square().sum() + last.square().sum()) / 4
    found = layerwise_jacobian_penalty(model, x, ["a", "b"], projections=None)
    torch.testing.assert_close(found, expected)
    with pytest.raises(AdapterError, match="follow each other"):
        layerwise_jacobian_penalty(model, x)
    for layers, said in ((["d"], "no such modules: d"), ([], "no layers")):
        with pytest.raises(AdapterError, match=said):
            layerwise_jacobian_penalty(model, x, layers)
    with pytest.raises(AdapterError, match="ran twice"):
        layerwise_jacobian_penalty(nn.Sequential(model.a, model.a), x)
    with pytest.raises(ValueError, match="at least 1"):
        layerwise_jacobian_penalty(model, x, projections=0)
    assert not model.a._forward_pre_hooks


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_adversarial_loss(model: nn.Sequential, alpha: float) -> None:
    x, y = torch.randn(5, 4, dtype=torch.float64), torch.tensor([0, 1, 2, 0, 1])
    got = adversarial_loss(model, nn.functional.cross_entropy, x, y, alpha=alpha, epsilon=0.7)
    perturbed = []
    for row, label in zip(x, y, strict=True):
        row = row.clone().requires_grad_()
        nn.functional.cross_entropy(model(row[None]), label[None]).backward()
        assert row.grad is not None
        perturbed.append((row + 0.7 * row.grad / row.grad.norm()).detach())
    moved = torch.stack(perturbed)
    assert torch.allclose((moved - x).norm(dim=1), torch.tensor(0.7, dtype=x.dtype))
    plain, adversarial = (nn.functional.cross_entropy(model(z), y) for z in (x, moved))
    torch.testing.assert_close(got, alpha * plain + (1 - alpha) * adversarial)
    model.zero_grad()
    got.backward()
    assert model[0].weight.grad.abs().sum() > 0


def test_adversarial_loss_survives_a_flat_loss_and_refuses_nonsense(model: nn.Sequential) -> None:
    x, y = torch.randn(2, 4, dtype=torch.float64), torch.zeros(2, dtype=torch.long)

    def flat(outputs: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
        return 0.0 * outputs.sum() + 1.0

    assert adversarial_loss(model, flat, x, y) == 1.0
    for bad in ({"alpha": 1.5}, {"epsilon": -1.0}):
        with pytest.raises(ValueError, match="alpha must be"):
            adversarial_loss(model, flat, x, y, **bad)


def test_layers_that_are_called_by_keyword(model: nn.Sequential) -> None:
    class ByName(nn.Sequential):
        def forward(self, x: Any) -> Any:
            return self[2](input=self[1](self[0](input=x)))

    x = torch.randn(5, 4, dtype=torch.float64)
    found = layerwise_jacobian_penalty(ByName(*model), x, projections=None)
    expected = layerwise_jacobian_penalty(model, x, projections=None)
    torch.testing.assert_close(found, expected)


def test_adversarial_loss_of_confident_samples_moves_them_by_epsilon() -> None:
    confident = nn.Linear(3, 2)
    with torch.no_grad():
        confident.weight.copy_(torch.tensor([[27.5, 0, 0], [-27.5, 0, 0]]))
        confident.bias.zero_()
    x, y = torch.tensor([[1.0, 0.3, -1], [-1, 0.2, 0.5]]), torch.tensor([0, 1])
    got = adversarial_loss(confident, nn.functional.cross_entropy, x, y, alpha=0.0)
    # Both have come to the border between the classes.
    assert got.item() == pytest.approx(0.6931472, rel=1e-5)


def test_a_sequential_network_is_balanced_in_place() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        nn.ConvTranspose2d(4, 3, 3, stride=2, bias=False),
        nn.LeakyReLU(),
        nn.Flatten(),
        nn.Dropout(0.5),
        nn.Linear(3 * 81, 5),
    ).double()
    with torch.no_grad():
        model[1].weight.mul_(30.0)
    x = torch.randn(3, 2, 8, 8, dtype=torch.float64)
    model.eval()
    before = model(x)
    model.train()
    factors = balance_norms(model, x)
    assert model.training
    assert list(factors) == ["0.0", "1", "5"]
    assert torch.tensor(list(factors.values())).prod().item() == pytest.approx(1.0)
    model.eval()
    torch.testing.assert_close(model(x), before)
    shapes = {"0.0": (8, 8), "1": (4, 4), "5": None}
    norms = [
        float(
            specops.spectral_norm(
                model.get_submodule(name).weight.detach(),
                geometry_of(model.get_submodule(name), input_shape=shape),
            )
        )
        for name, shape in shapes.items()
    ]
    assert norms == pytest.approx([norms[0]] * 3, rel=1e-5)


def test_what_does_not_commute_is_refused() -> None:
    x = torch.randn(2, 4)
    for odd in (nn.Tanh(), nn.BatchNorm1d(4), nn.LayerNorm(4)):
        model = nn.Sequential(nn.Linear(4, 4), odd, nn.Linear(4, 4))
        before = model[0].weight.detach().clone()
        with pytest.raises(AdapterError, match="does not commute"):
            balance_norms(model, x)
        assert torch.equal(model[0].weight, before)
    with pytest.raises(AdapterError, match=r"expected a torch\.nn\.Sequential"):
        balance_norms(nn.Linear(4, 4), x)
    for prepare in (
        nn.utils.parametrizations.weight_norm,
        lambda m: specops.attach(None, m, specops.SpectralNormalization(norm="reshaped")),
    ):
        model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
        prepare(model[0])
        with pytest.raises(AdapterError, match="0 computes its weight"):
            balance_norms(model, x)
    with pytest.raises(AdapterError, match="no linear or convolution layer"):
        balance_norms(nn.Sequential(nn.ReLU()), x)
    layer = nn.Linear(4, 4)
    with pytest.raises(AdapterError, match="occurs twice"):
        balance_norms(nn.Sequential(layer, nn.ReLU(), layer), x)
    other = nn.Linear(4, 4)
    other.bias = layer.bias
    with pytest.raises(AdapterError, match="a bias occurs twice"):
        balance_norms(nn.Sequential(layer, nn.ReLU(), other), x)


def test_layers_that_learn_their_sizes_in_the_first_forward_pass_are_balanced() -> None:
    model = nn.Sequential(nn.LazyConv1d(3, 3), nn.ReLU(), nn.Flatten(), nn.LazyLinear(2))
    factors = balance_norms(model, torch.randn(2, 1, 5))
    assert factors["0"] * factors["3"] == pytest.approx(1.0)
    assert isinstance(model[3], nn.Linear)


class Residual(nn.Sequential):
    def forward(self, x: Any) -> Any:
        return x + super().forward(x)


class Sine(nn.ReLU):
    def forward(self, x: Any) -> Any:
        return torch.sin(x)


@pytest.mark.parametrize(
    ("between", "said"),
    [
        (Residual(nn.Linear(4, 4)), r"without a forward of its own, got Residual"),
        (nn.Sequential(Residual(nn.ReLU())), "got Residual"),
        (Sine(), "1 is a Sine, which does not commute"),
        (nn.ReLU(), "1 has a hook"),
        (nn.Sequential(nn.ReLU()), "1 has a hook"),
    ],
)
def test_parts_that_compute_something_of_their_own_are_refused(between: Any, said: str) -> None:
    model = nn.Sequential(nn.Linear(4, 4), between, nn.Linear(4, 4))
    before = copy.deepcopy(model.state_dict())
    handle = between.register_forward_hook(lambda m, args, y: y + 1) if "hook" in said else None
    with pytest.raises(AdapterError, match=said):
        balance_norms(model, torch.randn(2, 4))
    torch.testing.assert_close(dict(model.state_dict()), dict(before), rtol=0, atol=0)
    if handle is not None:
        handle.remove()
        balance_norms(model, torch.randn(2, 4))
