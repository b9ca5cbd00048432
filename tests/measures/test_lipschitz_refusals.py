"""Lipschitz bounds leave nothing behind, and what has none is refused with the reason."""

from __future__ import annotations

import functools
import math
from typing import Any

import pytest

torch = pytest.importorskip("torch")
from torch import nn  # noqa: E402
from torch.nn import functional  # noqa: E402

from specops.errors import AdapterError, NonFiniteError  # noqa: E402
from specops_torch import lipschitz_upper_bound  # noqa: E402
from tests.measures.test_lipschitz_of_branches import Do, Skip, fixed  # noqa: E402
from tests.measures.test_torch import doubling  # noqa: E402


class Leaving(nn.Module):
    """What looks at itself, and computes what nothing uses."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.norm = doubling(), nn.LayerNorm(3)
        self.calls = 0

    def forward(self, x: Any, scale: float = 2.0, mask: Any = None) -> Any:
        self.calls += 1
        self.last = x
        self.norm(x) ** 2
        y = self.linear(x)
        return y * scale if mask is None else y * mask


def test_nothing_is_left_behind_and_unused_branches_do_not_count() -> None:
    model = Leaving()
    before = {k: v for m in model.modules() for k, v in vars(m).items()}
    assert lipschitz_upper_bound(model, (3,)).value == pytest.approx(4.0, rel=1e-6)
    assert {k: v for m in model.modules() for k, v in vars(m).items()} == before
    assert model.training


def viewed(x: Any) -> Any:
    y = x.clone()
    y.view(-1).mul_(5.0)
    return y


def overwritten(x: Any) -> Any:
    y = 1.0 * x
    z = y
    y += 5.0 * x
    return z + 0.0 * y


def unused(x: Any) -> Any:
    y = 1.0 * x
    y.mul_(5.0)
    return y


def unseen(x: Any) -> Any:
    y = 1.0 * x
    y.data.mul_(5.0)
    return y


def rectified(x: Any) -> Any:
    y = -x
    return functional.relu(y, inplace=True) + y


def branching(x: Any) -> Any:
    return x if x.sum() > 0 else -x


def gathering(x: Any) -> Any:
    y = torch.zeros(1, 3)
    y[:, :2] = 3.0 * x[:, :2]
    return y + x


def copying(x: Any) -> Any:
    y = torch.zeros(1, 3)
    y.data.copy_(x)
    return y


def given_to(x: Any) -> Any:
    y = torch.zeros(1, 3)
    torch.add(x, x, out=y)
    return y


def by_kind(x: Any) -> Any:
    return 5.0 * x if isinstance(x, torch.Tensor) else x


def by_kind_a_little(x: Any) -> Any:
    return 1.03 * x if isinstance(x, torch.Tensor) else x


def overlapping(x: Any) -> Any:
    return torch.cat(torch.tensor_split(x, (2, 1), dim=1), 1)


REFUSED: dict[str, tuple[Any, str]] = {
    "gate": (lambda x: x * torch.sigmoid(x), "mul: a product of two values"),
    "attention": (lambda x: x @ x.mT, "matmul: a product of two values"),
    "sdpa": (lambda x: functional.scaled_dot_product_attention(x, x, x), "attention has no"),
    "quotient": (lambda x: 1.0 / (1.0 + x.abs()), "truediv|rdiv"),
    "by zero": (lambda x: x / torch.tensor([0.0, 1.0, 1.0]), "divides by zero"),
    "layer norm": (lambda x: functional.layer_norm(x, (3,)), "layer_norm: it divides by a statist"),
    "power": (lambda x: x**2, "pow: its slope has no bound"),
    "indices": (lambda x: x.argmax(1).double(), "argmax: its"),
    "maximum and where": (lambda x: x.max(1)[0], "max: its Lipschitz"),
    "whole": (lambda x: x.to(torch.int32), "to: it gives whole"),
    "table": (lambda x: x[:, [0, 0]], "repeat entries"),
    "reflected": (lambda x: functional.pad(x, (1, 1), mode="reflect"), "pad: padding by reflect"),
    "dropping": (lambda x: functional.dropout(x, 0.5), "dropout: it drops"),
    "batch statistics": (
        lambda x: functional.batch_norm(x, None, None, training=True),
        "the batch",
    ),
    "choice by values": (lambda x: torch.where(x > 0, x, -x), "gt: |where: it chooses"),
    "written to": (lambda x: torch.add(x, x, out=1.0 * x), "add: it writes"),
    "two outputs": (lambda x: (x, x), "no single tensor"),
    "data": (lambda x: x.data, "written to it is not seen"),
    "control flow": (branching, "torch.fx cannot follow"),
    "values": (lambda x: x * float(x.sum()), "torch.fx cannot follow"),
    "overwritten by addition": (overwritten, "overwritten in place"),
    "overwritten, not used": (unused, "overwritten in place"),
    "overwritten by a view": (viewed, "overwritten in place"),
    "rectified in place": (rectified, "overwritten in place"),
    "given": (lambda x: x.add_(x) + x, "overwritten in place"),
    "written to through data": (unseen, "written to it is not seen"),
    "an output made before": (gathering, "writes to a tensor that does not come from its input"),
    "an output made before, through data": (copying, "writes to a tensor"),
    "an output given": (given_to, "writes to a tensor"),
    "by the kind of object": (by_kind, "computes something else than torch.fx follows"),
    "a little by the kind": (by_kind_a_little, "computes something else than torch.fx follows"),
    "random": (lambda x: x * torch.rand(3), "computes something else .*: it draws at random"),
    "parts that overlap": (overlapping, "tensor_split: its parts overlap"),
    "bits": (lambda x: x.view(torch.float16), "view: it reads the bits"),
    "filled with its sum": (lambda x: x.new_full((1, 2), x.sum()), "new_full: its Lipschitz"),
    "NaN": (lambda x: x * torch.tensor(math.nan), "mul: it holds NaN"),
    "divided by NaN": (lambda x: x / math.nan, "truediv: it holds NaN"),
    "shapes": (lambda x: x @ fixed(4, 4), r"matmul failed on a sample of shape \(3,\)"),
}


@pytest.mark.parametrize("key", REFUSED)
def test_what_has_no_bound_is_refused_with_the_reason(key: str) -> None:
    function, said = REFUSED[key]
    shape = (2, 3) if key in ("attention", "sdpa", "batch statistics") else (3,)
    with pytest.raises(AdapterError, match=said):
        lipschitz_upper_bound(Do(function), shape)


def test_models_that_torch_fx_would_misread_are_refused() -> None:
    class Two(nn.Module):
        def forward(self, x: Any, y: Any) -> Any:
            return x + y

    with pytest.raises(AdapterError, match="takes y"):
        lipschitz_upper_bound(Two(), (3,))
    hooked = Skip(doubling())
    hooked.register_forward_hook(lambda m, i, o: 5 * o)
    with pytest.raises(AdapterError, match="has a hook"):
        lipschitz_upper_bound(hooked, (3,))
    # Inside another model it is followed.
    inside = lipschitz_upper_bound(nn.Sequential(hooked), (3,))
    assert inside.value == pytest.approx(15.0, rel=1e-6)

    class Random(nn.Sequential):
        def forward(self, x: Any) -> Any:
            self[0].train()
            return super().forward(x)

    with pytest.raises(AdapterError, match=r"0 \(Dropout\): the forward pass puts it"):
        lipschitz_upper_bound(Random(nn.Dropout()), (3,))
    patched = doubling()
    patched.forward = lambda x: 5 * x  # type: ignore[method-assign]

    class Times(nn.Linear):
        def __call__(self, x: Any) -> Any:
            return 5.0 * super().__call__(x)

    times = Times(3, 3)
    times.load_state_dict(doubling(bias=True).state_dict())
    for model in (patched, times):
        with pytest.raises(AdapterError, match="called in a way of its own"):
            lipschitz_upper_bound(model, (3,))
    for model in (doubling(), nn.Sequential(doubling())):
        # As mixed precision wraps the forward pass.
        model.forward = functools.wraps(model.forward)(lambda x, f=model.forward: f(x))  # type: ignore[method-assign]
        assert lipschitz_upper_bound(model, (3,)).value == pytest.approx(2.0, rel=1e-5)
    # Inside another model it is followed.
    assert lipschitz_upper_bound(nn.Sequential(times), (3,)).value == pytest.approx(10.0, rel=1e-5)
    with pytest.raises(AdapterError, match=r"0 \(LayerNorm\): it divides by a statistic"):
        lipschitz_upper_bound(nn.Sequential(nn.LayerNorm(3)), (3,))
    reflected = nn.Conv1d(1, 1, 3, padding=1, padding_mode="reflect")
    with pytest.raises(AdapterError, match=r"0 \(Conv1d\): .*reflect"):
        lipschitz_upper_bound(nn.Sequential(reflected), (1, 5))


@pytest.mark.parametrize("layer", [nn.BatchNorm1d(3), nn.PReLU(3), nn.LeakyReLU(math.nan)])
def test_layers_that_hold_nan_are_refused_by_name(layer: Any) -> None:
    if layer._parameters:
        nn.init.constant_(layer.weight, math.nan)
    with pytest.raises(AdapterError, match=rf"0 \({type(layer).__name__}\): it holds NaN"):
        lipschitz_upper_bound(nn.Sequential(layer), (3,))
    linear = nn.Linear(3, 3)
    nn.init.constant_(linear.weight, math.nan)
    with pytest.raises(NonFiniteError, match=r"1 \(Linear\): .*NaN"):
        lipschitz_upper_bound(nn.Sequential(nn.ReLU(), linear), (3,))


def test_activations_of_complex_numbers_have_poles() -> None:
    linear = nn.Linear(1, 1, dtype=torch.complex64)
    found = lipschitz_upper_bound(linear, (1,)).value
    assert found == pytest.approx(abs(linear.weight.item()), rel=1e-5)
    with pytest.raises(AdapterError, match=r"1 \(Tanh\): .* for complex numbers"):
        lipschitz_upper_bound(nn.Sequential(linear, nn.Tanh()), (1,))


def test_mixed_precision_within_a_forward_pass_is_followed() -> None:
    class Mixed(nn.Sequential):
        def forward(self, x: Any) -> Any:
            with torch.autocast("cpu", torch.bfloat16):
                return super().forward(x)

    torch.manual_seed(0)
    layers = [nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8)]
    found = lipschitz_upper_bound(Mixed(*layers), (8,))
    assert found == lipschitz_upper_bound(nn.Sequential(*layers), (8,))


def test_layers_that_learn_their_sizes_in_the_first_forward_pass() -> None:
    model = nn.Sequential(nn.LazyConv1d(3, 3), nn.ReLU(), nn.Flatten(), nn.LazyLinear(2))
    first = lipschitz_upper_bound(model, (1, 5))
    assert first == lipschitz_upper_bound(model, (1, 5))
