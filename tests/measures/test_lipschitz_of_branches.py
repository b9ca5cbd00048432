"""Lipschitz bounds of models with branches, against the explicit matrices of linear ones."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
from torch import nn  # noqa: E402
from torch.nn import functional  # noqa: E402

from specops import measures  # noqa: E402
from specops_torch import jacobian_operator, lipschitz_upper_bound  # noqa: E402
from tests.measures.test_torch import ACTIVATIONS, doubling, matrix_of, settled  # noqa: E402


class Do(nn.Module):
    """A function as a model."""

    def __init__(self, function: Callable[[Any], Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Any) -> Any:
        return self.function(x)


def fixed(*shape: int) -> Any:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


MASK = torch.tensor([True, False, True, True, False, False])
VAR = torch.linspace(0.5, 2.0, 3, dtype=torch.float64)
# What is linear: (function, shape of a sample, whether the bound is the norm).
LINEAR: dict[str, tuple[Callable[[Any], Any], tuple[int, ...], bool]] = {
    "sum": (lambda x: x + 2.0 * x, (6,), True),
    "sum, in place": (lambda x: x.clone().add_(x, alpha=-3.0), (6,), False),
    "difference": (lambda x: torch.sub(x.flip(1), x, alpha=4), (6,), True),
    "sum with a constant": (lambda x: fixed(6) + x - 1.0, (6,), True),
    "broadcast sum": (lambda x: x[:, :, None] + x[:, None, :] * 0, (3,), True),
    "concatenation": (lambda x: torch.cat([x, 2.0 * x, x[:, :2] * 0], 1), (6,), True),
    "stack": (lambda x: torch.stack((x, -x), 2), (6,), True),
    "pieces": (lambda x: torch.cat(x.chunk(3, 1), 1), (6,), True),
    "sum of pieces": (lambda x: x.split(3, 1)[0] + x.split(3, 1)[1], (6,), False),
    "choice": (lambda x: torch.where(MASK, x, 2.0 * x), (6,), False),
    "mean": (lambda x: x.mean((2, 3)), (2, 3, 4), True),
    "sum over an axis": (lambda x: torch.sum(x, -1), (2, 5), True),
    "expanded": (lambda x: x[..., None].expand(-1, -1, 4), (3,), True),
    "repeated": (lambda x: x.repeat(1, 3).reshape(x.shape[0], -1), (3,), True),
    "scaled": (lambda x: x.mul(fixed(6)), (6,), True),
    "scaled and repeated": (lambda x: x[..., None] * fixed(2), (3,), False),
    "divided": (lambda x: (x / torch.tensor([2.0, -0.5, 4.0])).neg() / 3, (3,), True),
    "slices": (lambda x: x[:, ::2, None, 1:].squeeze(2), (4, 3), True),
    "axes": (lambda x: x.permute(0, 2, 1).contiguous().view(x.size(0), -1).float(), (4, 3), True),
    "linear": (lambda x: functional.linear(x, fixed(3, 6), fixed(3)), (6,), True),
    "matrix from the right": (lambda x: x @ fixed(4, 5), (3, 4), True),
    "matrix from the left": (lambda x: torch.matmul(fixed(5, 3), x), (3, 4), True),
    "convolution": (
        lambda x: functional.conv2d(x, fixed(4, 1, 3, 3), None, 2, 1, groups=2),
        (2, 5, 6),
        False,
    ),
    "dilated": (lambda x: functional.conv1d(x, fixed(2, 2, 3), dilation=2), (2, 9), False),
    "batch norm": (
        lambda x: functional.batch_norm(x, VAR, VAR, VAR - 1.0, training=False),
        (3, 4),
        True,
    ),
    "average": (lambda x: functional.avg_pool2d(x, 3, stride=1, padding=1), (2, 4, 5), True),
    "adaptive": (lambda x: functional.adaptive_avg_pool1d(x, 3).flatten(1), (2, 7), True),
    "average without a batch": (
        lambda x: functional.avg_pool2d(x.flatten(0, 1), (8, 1), 1)[None],
        (2, 15, 8),
        True,
    ),
    "adaptive without a batch": (
        lambda x: functional.adaptive_avg_pool2d(x.flatten(0, 1), (1, 8))[None],
        (2, 1, 8),
        True,
    ),
    "masked": (lambda x: 2.0 * x * MASK, (6,), True),
    "padding": (lambda x: functional.pad(x, (1, 2, -1, 0)), (2, 4, 5), True),
    "transposed": (lambda x: x.mT @ fixed(3, 3), (3, 4), True),
    "like another": (lambda x: x[:, None].expand_as(x[..., None].repeat(1, 1, 3)), (3,), True),
    "dropout": (lambda x: functional.dropout(x, 0.5, training=False), (3,), True),
}


@pytest.mark.parametrize("key", LINEAR)
def test_rules_of_linear_functions(key: str) -> None:
    function, shape, tight = LINEAR[key]
    model = Do(function).double()
    x = torch.zeros((1, *shape), dtype=torch.float64)
    # Without parameters inputs are of the default type: one of them says which.
    model.register_parameter("kind", nn.Parameter(x.new_zeros(())))
    bound = lipschitz_upper_bound(model, shape).value
    true = np.linalg.norm(
        matrix_of(Do(lambda x: torch.cat([function(r) for r in x.split(1)])), shape), 2
    )
    assert true * (1 - 1e-9) <= bound
    if tight:
        assert bound == pytest.approx(true, rel=1e-6)
    else:
        assert bound <= 2.5 * true + 1e-9


FUNCTIONS: dict[str, tuple[Callable[[Any], Any], float]] = {
    "relu": (lambda x: functional.relu(x), 1.0),
    "relu_": (lambda x: x.clone().relu_(), 1.0),
    "clamp": (lambda x: x.clamp(min=0.0, max=1.0), 1.0),
    "leaky_relu": (lambda x: functional.leaky_relu(x, -3.0), 3.0),
    "elu": (lambda x: functional.elu(x, alpha=2.0), 2.0),
    "celu": (lambda x: functional.celu(x, 3.0), 1.0),
    "prelu": (lambda x: functional.prelu(x, torch.tensor([1.5], dtype=x.dtype)), 1.5),
    "gelu": (lambda x: functional.gelu(x, approximate="tanh"), 1.1291),
    "softplus": (lambda x: functional.softplus(x, beta=2), 1.0),
    "hardswish": (lambda x: functional.hardswish(x), 1.5),
    "selu": (lambda x: functional.selu(x), 1.7581),
    "mish": (lambda x: functional.mish(x), 1.0885),
    "hardsigmoid": (lambda x: functional.hardsigmoid(x), 1 / 6),
    "sigmoid": (torch.sigmoid, 0.25),
    "cos": (torch.cos, 1.0),
    "maximum": (lambda x: torch.maximum(x, torch.zeros_like(x)), 1.0),
}


@pytest.mark.parametrize("key", FUNCTIONS)
def test_rules_of_functions_of_bounded_slope(key: str) -> None:
    function, expected = FUNCTIONS[key]
    x = torch.linspace(-6, 6, 40001, dtype=torch.float64)
    y = function(x)
    steepest = float(((y[1:] - y[:-1]) / (x[1:] - x[:-1])).abs().max())
    bound = lipschitz_upper_bound(Do(lambda x: function(x)), (3,)).value
    assert bound == pytest.approx(expected)
    assert steepest <= bound * (1 + 1e-9) <= steepest * 1.01


def test_functions_and_layers_have_the_same_rules() -> None:
    for layer in ACTIVATIONS:
        name = {"LogSigmoid": "logsigmoid"}.get(type(layer).__name__, "")
        if name:
            function = getattr(functional, name)
            found = lipschitz_upper_bound(Do(lambda x, f=function: f(x)), (3,))
            assert found.value == lipschitz_upper_bound(layer, (3,)).value
    for options in ((2,), (3, 1), (3, 2)):
        one = lipschitz_upper_bound(nn.MaxPool2d(*options), (1, 8, 8))
        two = lipschitz_upper_bound(
            Do(lambda x, o=options: functional.max_pool2d(x, *o)), (1, 8, 8)
        )
        assert one.value == two.value


@pytest.mark.parametrize(("size", "wanted"), [(7, 3), (8, 4), (5, 1), (3, 7)])
def test_adaptive_maxima_repeat_an_entry_as_often_as_their_factor_says(
    size: int, wanted: int
) -> None:
    layer = nn.AdaptiveMaxPool1d(wanted)
    reached = 0.0
    for at in range(size):
        x = torch.zeros(1, 1, size)
        x[0, 0, at] = 1.0
        reached = max(reached, float(layer(x).norm()))
    assert lipschitz_upper_bound(layer, (1, size)).value == pytest.approx(reached)


class Web(nn.Module):
    """Linear operations on randomly chosen earlier values."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        rng = np.random.default_rng(seed)
        self.steps = [
            (int(rng.integers(5)), *map(int, rng.integers(0, i + 1, 2))) for i in range(7)
        ]
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in self.steps)
        self.joined = nn.Parameter(torch.randn(8, 4))

    def forward(self, x: Any) -> Any:
        values = [x]
        for (kind, i, j), layer in zip(self.steps, self.layers, strict=True):
            a, b = values[i], values[j]
            made: Any = (
                lambda a, b, f: f(a),
                lambda a, b, f: a - 0.5 * b,
                lambda a, b, f: torch.cat([a, b], 1) @ self.joined,
                lambda a, b, f: torch.cat([b[:, 2:], a[:, :2]], 1) + f(b),
                lambda a, b, f: torch.stack([a, b.flip(1)], 2).sum(2),
            )[kind]
            values.append(made(a, b, layer))
        return values[-1] + values[-2]


@pytest.mark.parametrize("seed", range(12))
def test_no_web_of_branches_stretches_more_than_its_bound(seed: int) -> None:
    torch.manual_seed(seed)
    model = Web(seed).double()
    bound = lipschitz_upper_bound(model, (4,))
    true = np.linalg.norm(matrix_of(model, (4,)), 2)
    assert 0 < true <= bound.value * (1 + 1e-9)
    assert math.prod(bound.factors) == pytest.approx(bound.value)


class Block(nn.Module):
    """Of a residual network: two convolutions with batch normalisation beside a shortcut."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = settled(nn.BatchNorm2d(outputs), inputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, padding_mode="circular")
        self.bn2 = settled(nn.BatchNorm2d(outputs), outputs)
        self.relu = nn.ReLU(inplace=True)
        self.short = nn.Sequential()
        if stride > 1:
            shrink = nn.Conv2d(inputs, outputs, 1, stride, bias=False)
            self.short = nn.Sequential(shrink, settled(nn.BatchNorm2d(outputs), 9))

    def forward(self, x: Any) -> Any:
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += self.short(x)
        return self.relu(out)


def test_residual_networks() -> None:
    torch.manual_seed(0)
    blocks = [Block(3, 3, 1), Block(3, 4, 2)]
    model = nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2)).double()
    model.train()
    bound = lipschitz_upper_bound(model, (3, 6, 6))
    assert model.training
    assert bound.layers == ("0.conv1 … iadd", "0.relu", "1.conv1 … iadd", "1.relu", "2", "3", "4")
    assert math.prod(bound.factors) == pytest.approx(bound.value)
    for block, factor, shape in zip(blocks, bound.factors[::2], ((3, 6, 6),) * 2, strict=False):
        middle = (block.conv1.out_channels, *(n // block.conv1.stride[0] for n in shape[1:]))
        first = matrix_of(nn.Sequential(block.conv1, block.bn1), shape)
        second = matrix_of(nn.Sequential(block.conv2, block.bn2), middle)
        short = matrix_of(nn.Sequential(*block.short, nn.Identity()), shape)
        a, b, c = (np.linalg.norm(m, 2) for m in (first, second, short))
        # One zero-padded convolution is bounded on a torus.
        assert a * b + c <= factor * (1 + 1e-9)
        assert factor <= 1.1 * a * b + c * (1 + 1e-9)
        apart = np.linalg.norm(matrix_of(block.conv1, shape), 2) * np.linalg.norm(
            matrix_of(block.bn1, middle), 2
        )
        assert a < 0.9 * apart
    x = torch.randn(3, 6, 6, dtype=torch.float64)
    local = measures.local_lipschitz(jacobian_operator(lambda v: model.eval()(v[None])[0], x))
    assert 0 < local.value <= bound.value


@pytest.mark.parametrize(
    ("layer", "norm", "shape"),
    [
        (nn.Linear(5, 4), nn.BatchNorm1d(4), (5,)),
        (
            nn.Conv1d(4, 6, 3, groups=2, padding=1, padding_mode="circular"),
            nn.BatchNorm1d(6),
            (4, 7),
        ),
        (nn.ConvTranspose1d(4, 6, 1, groups=2), nn.BatchNorm1d(6), (4, 3)),
        (nn.ConvTranspose1d(4, 6, 3, stride=2), nn.BatchNorm1d(6), (4, 3)),
    ],
    ids=["linear", "grouped", "transposed and grouped", "transposed"],
)
def test_a_layer_and_its_batch_normalisation_are_one_map(
    layer: nn.Module, norm: nn.Module, shape: tuple[int, ...]
) -> None:
    model = nn.Sequential(layer, settled(norm)).double()
    found = lipschitz_upper_bound(model, shape)
    true = np.linalg.norm(matrix_of(model, shape), 2)
    assert found.layers == ("0 … 1",)
    # A zero boundary is bounded on a torus.
    slack = 1.25 if isinstance(layer, nn.ConvTranspose1d) else 1 + 1e-6
    assert true * (1 - 1e-9) <= found.value <= true * slack


def test_a_normalisation_of_another_axis_is_a_map_of_its_own() -> None:
    model = nn.Sequential(nn.Linear(4, 3), settled(nn.BatchNorm1d(3))).double()
    found = lipschitz_upper_bound(model, (3, 4))
    assert found.layers == ("0", "1")
    assert np.linalg.norm(matrix_of(model, (3, 4)), 2) <= found.value
    # Taken for one channel of four positions, of which the normalisation scales the first.
    model = nn.Sequential(nn.Conv1d(1, 4, 1), nn.BatchNorm1d(4)).double()
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([0.1, 1, 1, 1]).reshape(4, 1, 1))
        model[1].weight.copy_(torch.tensor([9.0, 0.1, 0.1, 0.1]))
    x = torch.zeros(1, 4, dtype=torch.float64)
    jacobian = torch.autograd.functional.jacobian(model.eval(), x).reshape(16, 4)
    assert torch.linalg.matrix_norm(jacobian, 2) <= lipschitz_upper_bound(model, (4,)).value


class Twice(nn.Module):
    """A convolution whose output is used by its normalisation and by others."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv1d(2, 2, 1), settled(nn.BatchNorm1d(2))

    def forward(self, x: Any) -> Any:
        y = self.conv(x)
        return torch.cat([self.norm(y), y], 1)


def test_an_output_that_is_used_twice_is_not_absorbed() -> None:
    model = Twice().double()
    a, b = (np.linalg.norm(matrix_of(m, (2, 3)), 2) for m in (model.conv, model.norm))
    found = lipschitz_upper_bound(model, (2, 3))
    assert found.layers == ("conv", "norm … cat")
    assert found.value == pytest.approx(a * math.hypot(b, 1.0), rel=1e-6)


class Skip(nn.Sequential):
    def forward(self, x: Any) -> Any:
        return x + super().forward(x)


def test_subclasses_that_add_and_nested_ones() -> None:
    assert lipschitz_upper_bound(Skip(doubling()), (3,)).value == pytest.approx(3.0, rel=1e-6)
    nested = nn.Sequential(Skip(doubling(), Skip(doubling()), nn.ReLU()), doubling())
    assert lipschitz_upper_bound(nested, (3,)).value == pytest.approx(14.0, rel=1e-5)


class Standardised(nn.Conv2d):
    """Another kernel than its weight, by a method that the layer's own forward pass calls."""

    def _conv_forward(self, input: Any, weight: Any, bias: Any) -> Any:
        return super()._conv_forward(input, 5.0 * weight, bias)


class Renamed(nn.Conv2d):
    def extra_repr(self) -> str:
        return "renamed"


@pytest.mark.parametrize("kind", [Standardised, Renamed])
def test_subclasses_of_layers_that_compute_another_weight(kind: type[nn.Conv2d]) -> None:
    torch.manual_seed(0)
    layer = kind(2, 3, 1, bias=False).double()
    true = np.linalg.norm(matrix_of(layer, (2, 3, 3)), 2)
    for model in (layer, nn.Sequential(layer)):
        assert lipschitz_upper_bound(model, (2, 3, 3)).value == pytest.approx(true, rel=1e-6)


def test_products_of_bounds_do_not_overflow() -> None:
    def grow(x: Any) -> Any:
        y = x
        for _ in range(40):
            y = 1e10 * y
        return x + y

    found = lipschitz_upper_bound(Do(grow), (2,))
    assert found.log == pytest.approx(400 * math.log(10))
    assert found.factors == (math.inf,)
    assert lipschitz_upper_bound(Do(lambda x: 0.0 * x + 1.0), (2,)).value == 0.0
    constant = lipschitz_upper_bound(Do(lambda x: torch.zeros_like(x) + fixed(2)), (2,))
    assert (constant.value, constant.layers) == (0.0, ("constant",))
