"""Layers that compute something else from their weight than their class of torch does."""

from __future__ import annotations

import functools
from typing import Any

import pytest

import specops
from specops import Dense

torch = pytest.importorskip("torch")
from torch import nn  # noqa: E402

import specops_torch  # noqa: E402

CLIP = specops.ClipSpectralNorm(0.5)


class Standardised(nn.Conv2d):
    """Weight standardisation, as it is usually written."""

    def forward(self, x: Any) -> Any:
        w = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return self._conv_forward(x, w / w.std((1, 2, 3), keepdim=True), self.bias)


class Padded(nn.Conv2d):
    """Overrides what `forward` calls."""

    def _conv_forward(self, x: Any, weight: Any, bias: Any) -> Any:
        return super()._conv_forward(nn.functional.pad(x, (1, 1, 1, 1), "reflect"), weight, bias)


class Summed(nn.Linear):
    def __init__(self) -> None:
        super().__init__(4, 4, bias=False)
        self.lora_a, self.lora_b = (nn.Parameter(torch.ones(s)) for s in ((1, 4), (4, 1)))

    def forward(self, x: Any) -> Any:
        return nn.functional.linear(x, self.weight + self.lora_b @ self.lora_a)


class Gated(nn.GRUCell):
    def forward(self, x: Any, h: Any = None) -> Any:
        return 2 * super().forward(x, h)


class Dropping(nn.LSTM):
    """Overrides what `forward` calls."""

    def check_forward_args(self, input: Any, hidden: Any, batch_sizes: Any) -> None:
        super().check_forward_args(2 * input, hidden, batch_sizes)


class Named(nn.Linear):
    """A subclass that computes as its base."""

    def __repr__(self) -> str:
        return "named"


@pytest.mark.parametrize(
    "make",
    [
        lambda: Standardised(4, 4, 3),
        lambda: Padded(4, 4, 3),
        Summed,
        lambda: Gated(4, 4),
        lambda: Dropping(4, 4),
    ],
)
def test_are_left_alone_by_a_bare_rule_and_refused_by_name(make: Any) -> None:
    model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(4)), make())
    report = specops.attach(None, model, CLIP).report()
    rows = [row for row in report.rows if row.name.startswith("4.weight")]
    assert rows
    assert all(row.norm is None and "forward of its own" in row.reason for row in rows)
    assert len(report.constrained) == 4
    with pytest.raises(specops.errors.PlanError, match="forward of its own"):
        specops.attach(None, model, specops.Plan([("4.weight*", CLIP)]))
    with pytest.raises(specops.errors.SpecopsError, match="forward of its own"):
        specops_torch.geometry_of(model[4], rows[0].name.removeprefix("4."))


def test_the_users_word_counts() -> None:
    model = Gated(4, 4)
    attachment = specops.attach(None, model, CLIP, geometries={"weight_*": Dense()})
    attachment.enforce()
    assert attachment.report()["weight_ih"].norm <= 0.5


def test_those_that_compute_as_their_base_are_constrained() -> None:
    named, wrapped, hooked = (kind(4, 4) for kind in (Named, nn.Linear, nn.Linear))
    wrapped.forward = functools.wraps(wrapped.forward)(functools.partial(type(wrapped).forward))
    hooked.register_forward_pre_hook(lambda module, x: x)
    lazy = nn.LazyLinear(4)
    lazy(torch.ones(1, 4))
    attention = nn.MultiheadAttention(4, 2)  # whose output is a Linear's subclass
    model = nn.ModuleList([named, wrapped, hooked, lazy, attention])
    report = specops.attach(None, model, specops.SpectralNormalization(norm="reshaped")).report()
    assert len(report.constrained) == 6
    # Under a forward rule their classes are others, which compute the same.
    again = specops_torch.geometry_of(named)
    assert again == Dense()


class Adapted(nn.Module):
    """As peft wraps a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.base_layer = nn.Linear(4, 4, bias=False)
        self.lora_A, self.lora_B = (
            nn.ModuleDict({"default": nn.Linear(m, n, bias=False)}) for m, n in ((4, 1), (1, 4))
        )

    def forward(self, x: Any) -> Any:
        return self.base_layer(x) + self.lora_B["default"](self.lora_A["default"](x))


class Multiplied(nn.Module):
    """As peft wraps a layer for its other adapters."""

    adapter_layer_names = ("oft_R",)

    def __init__(self) -> None:
        super().__init__()
        self.base_layer = nn.Linear(4, 4, bias=False)
        self.oft_R = nn.ParameterDict({"default": torch.eye(4)})

    def forward(self, x: Any) -> Any:
        return self.base_layer(x @ self.oft_R["default"])


@pytest.mark.parametrize(
    ("make", "reason"), [(Adapted, "adds lora_B·lora_A"), (Multiplied, "changes it by oft_R")]
)
def test_what_adapters_change_is_no_map(make: Any, reason: str) -> None:
    model = nn.Sequential(make(), *(nn.Linear(4, 4) for _ in range(3)))
    report = specops.attach(None, model, CLIP).report()
    assert reason in report["0.base_layer.weight"].reason
    with pytest.warns(specops.errors.CautionWarning, match=reason):
        weights, _ = specops_torch.weights_and_geometries(model)
    assert "0.base_layer.weight" not in weights
    told = {"0.*": Dense()}
    weights, _ = specops_torch.weights_and_geometries(model, geometries=told)
    assert "0.base_layer.weight" in weights


def test_what_lora_adds_to_is_named() -> None:
    report = specops.attach(None, nn.Sequential(Adapted()), CLIP).report()
    assert "adds lora_B·lora_A" in report["0.base_layer.weight"].reason
    assert len(report.constrained) == 2
