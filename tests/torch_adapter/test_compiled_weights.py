"""Compiled code looks at no writes: who else does, so that the weight in use stays the rule's."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest

import specops
from specops import SpectralNormalization, StableRankNormalization
from tests.torch_adapter.models import new_compilers, raw, top

torch = pytest.importorskip("torch")
from torch import nn  # noqa: E402
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn  # noqa: E402

SN = SpectralNormalization(norm="reshaped")
pytestmark = [
    new_compilers,
    pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor"),  # where a graph breaks
]


@pytest.fixture(autouse=True)
def new_graphs() -> None:
    torch._dynamo.reset()


def linear(*shape: int) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(shape[1], shape[0], bias=False)


def used(layer: Callable[[torch.Tensor], torch.Tensor]) -> float:
    """The norm of a layer of twelve inputs without bias as it computes."""
    return float(top(layer(torch.eye(12)).detach()))


def write(layer: nn.Linear) -> None:
    with torch.no_grad():
        raw(layer).copy_(3 * torch.randn_like(raw(layer)))


def load(layer: nn.Module) -> None:
    entries = layer.state_dict()
    layer.load_state_dict({name: 3 * torch.randn_like(x) for name, x in entries.items()})


def test_compiled_code_uses_directions_of_a_weight_that_was_zero() -> None:
    """The step away from zero finds them, before vectors are due."""
    layer = linear(8, 12)
    nn.init.zeros_(layer.weight)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.01)
    specops.attach(optimizer, layer, SN, every=4)
    compiled = torch.compile(layer, backend="eager")
    compiled(torch.eye(12))
    gradient = torch.randn(8, 12)
    for _ in range(3):
        raw(layer).grad = gradient + 0.1 * torch.randn(8, 12)
        optimizer.step()
        assert used(compiled) == pytest.approx(1.0, rel=0.02)


def test_weights_that_were_refreshed() -> None:
    layer = linear(8, 12)
    attachment = specops.attach(None, layer, SN)
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    compiled(torch.eye(12))
    write(layer)
    attachment.refresh()
    assert used(compiled) == pytest.approx(1.0, rel=1e-3)


@pytest.mark.parametrize("compiled_first", [False, True])
@pytest.mark.parametrize("of_the_compiled", [False, True])
def test_weights_that_were_loaded(compiled_first: bool, of_the_compiled: bool) -> None:
    """They were used at up to 20 times the norm until the next firing."""
    layer = linear(8, 12)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.01)
    if compiled_first:
        layer.compile(backend="eager")
    attachment = specops.attach(optimizer, layer, SN, every=10)
    compiled = layer if compiled_first else torch.compile(layer, backend="eager", fullgraph=True)
    for _ in range(2):
        compiled(torch.eye(12)).sum().backward()
        optimizer.step()
    for _ in range(2):
        load(compiled if of_the_compiled else layer)
        assert used(compiled) == pytest.approx(1.0, rel=1e-3)
    attachment.detach()
    load(layer)
    assert used(layer) == pytest.approx(float(top(raw(layer).detach())))


def averaged(model: nn.Module) -> nn.Module:
    return AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5))


def pickled(model: nn.Module) -> nn.Module:
    again: nn.Module = pickle.loads(pickle.dumps(model))
    return again


@pytest.mark.parametrize("copied", [copy.deepcopy, averaged, pickled])
@pytest.mark.parametrize("rule", [SN, StableRankNormalization(0.4, norm="reshaped")])
def test_copies_that_are_written_to(copied: Any, rule: Any) -> None:
    """They were used at up to 48 times the norm: no optimizer's step advances their vectors."""
    layer = linear(8, 12)
    specops.attach(torch.optim.SGD(layer.parameters(), lr=0.01), layer, rule)
    model = copied(layer)
    own = model.module if copied is averaged else model
    compiled = torch.compile(model, backend="eager")
    compiled(torch.eye(12))
    for _ in range(3):
        write(own)
        assert used(compiled) == pytest.approx(1.0, rel=1e-3)
        with torch.autocast("cpu", dtype=torch.bfloat16), torch.inference_mode():
            assert used(compiled) == pytest.approx(1.0, rel=1e-2)


def test_gradients_of_a_compiled_copy() -> None:
    """A teacher that is trained, say."""
    layer = linear(8, 12)
    specops.attach(torch.optim.SGD(layer.parameters(), lr=0.01), layer, SN)
    model = copy.deepcopy(layer)
    compiled, x = torch.compile(model, backend="eager"), torch.randn(3, 12)
    for _ in range(2):
        write(model)
        (found,) = torch.autograd.grad(compiled(x).square().sum(), raw(model))
        (wanted,) = torch.autograd.grad(model(x).square().sum(), raw(model))
        torch.testing.assert_close(found, wanted)


@pytest.mark.filterwarnings("ignore:While compiling, we found certain side effects")
def test_whole_graphs_of_copies_are_for_export_and_attached_ones() -> None:
    layer, x = linear(8, 12), torch.eye(12)
    specops.attach(torch.optim.SGD(layer.parameters(), lr=0.01), layer, SN)
    model = copy.deepcopy(layer)
    with pytest.raises(Exception, match="disable"):
        torch.compile(model, backend="eager", fullgraph=True)(x)
    if hasattr(torch.compiler, "is_exporting"):
        exported = torch.export.export(model, (x,), strict=True).module()
        assert used(exported) == pytest.approx(1.0, rel=1e-3)
    attachment = specops.attach(None, model, SN)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    write(model)
    attachment.refresh()
    assert used(compiled) == pytest.approx(1.0, rel=1e-3)


@pytest.mark.parametrize("how", ["called", "mapped", "exchanged"])
def test_other_tensors(how: str) -> None:
    """They met the vectors of the layer's own weight: 5 to 97 for 1."""
    layer = linear(8, 12)
    attachment = specops.attach(None, layer, SN)
    x, others = torch.eye(12), torch.randn(3, 8, 12)

    def with_weight(w: Any) -> Any:
        return torch.func.functional_call(layer, {"weight": w}, (x,))

    outputs = {
        "called": lambda: [with_weight(w) for w in others],
        "mapped": lambda: torch.vmap(with_weight)(others),
        "exchanged": lambda: [layer(x)],
    }
    if how == "exchanged":
        layer.weight = nn.Parameter(others[0])
    for y in torch.compile(outputs[how], backend="eager")():
        assert float(top(y.detach())) == pytest.approx(1.0, rel=1e-3)
    # The layer's own weight is used within the graph.
    attachment.refresh()
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    assert used(compiled) == pytest.approx(1.0, rel=1e-3)
