"""Small models, their training, and what a forward rule should make of them."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import pytest

torch = pytest.importorskip("torch")
from torch import nn  # noqa: E402
from torch.func import functional_call  # noqa: E402

from specops import SpectralNormalization, StableRankNormalization, TrainableScale  # noqa: E402

Map = Callable[[str, Any], Any]

FORWARD = {
    "reshaped": SpectralNormalization(norm="reshaped"),
    "operator": SpectralNormalization(norm="operator", scale=1.3),
    "bidirectional": SpectralNormalization(norm="bidirectional", scale=2.0),
    "rank": StableRankNormalization(0.4, norm="reshaped"),
    "rank of operator": StableRankNormalization(0.4, norm="operator"),
    "trained": SpectralNormalization(norm="reshaped", scale=TrainableScale(1.5)),
}
every_rule = pytest.mark.parametrize("rule", FORWARD.values(), ids=FORWARD)


def network(width: int = 4) -> nn.Sequential:
    """Smooth, so that its gradients can be differentiated again."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, width, 3, padding=1),
        nn.Tanh(),
        nn.ConvTranspose2d(width, 3, 2, stride=2),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(3 * 64, 2),
    )


def batch(size: int = 4, seed: int = 1) -> Any:
    """Inputs of `network`."""
    return torch.randn(size, 2, 4, 4, generator=torch.Generator().manual_seed(seed))


def backward(model: nn.Module, x: Any) -> Any:
    """The loss, after its gradients were added to those of the parameters."""
    loss = model(x).square().mean()
    loss.backward()
    return loss.detach()


def train(model: nn.Module, optimizer: Any, steps: int = 1, first: int = 0) -> list[float]:
    """Losses of some steps; the data depend on the number of the step."""
    dtype = next(model.parameters()).dtype
    losses = []
    for step in range(first, first + steps):
        optimizer.zero_grad()
        losses.append(float(backward(model, batch(seed=step).to(dtype))))
        optimizer.step()
    return losses


def gradients(model: nn.Module) -> dict[str, Any]:
    """Of every parameter that has one, as a copy."""
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def state_of(attachment: Any, name: str) -> dict[str, Any]:
    """A copy of the rule's state for one weight."""
    return dict(attachment.state_dict()["weights"][name]["state"])


new_compilers = pytest.mark.skipif(
    tuple(map(int, torch.__version__.split(".")[:2])) < (2, 13),
    reason="older compilers refuse to trace array_api_compat",
)


def raw(model: nn.Module, name: str = "weight") -> Any:
    """The parameter itself, where a layer answers with the weight in use."""
    return dict(model.named_parameters(remove_duplicate=False))[name]


def in_use(model: nn.Module, name: str, *inputs: Any) -> Any:
    """The weight that a layer of the model uses in a forward pass."""
    path, _, attribute = name.rpartition(".")
    seen = []
    layer = model.get_submodule(path)
    hook = layer.register_forward_pre_hook(lambda m, _: seen.append(getattr(m, attribute)))
    try:
        model(*inputs)
    finally:
        hook.remove()
    return seen[-1].detach().clone()


def settle(attachment: Any, rounds: int = 400) -> None:
    """Let the vectors converge at the weights as they are."""
    for _ in range(rounds):
        attachment.step()


def top(matrix: Any) -> Any:
    """The largest singular value, differentiable where it is simple."""
    return torch.linalg.svdvals(matrix)[0]


def operator(layer: Any, size: tuple[int, ...], weight: Any) -> Any:
    """A convolution without its bias as a matrix, differentiable in its weight."""
    channels = layer.in_channels
    basis = torch.eye(channels * size[0] * size[1], dtype=weight.dtype)
    given = {"weight": weight}
    if layer.bias is not None:
        given["bias"] = torch.zeros_like(layer.bias)
    return functional_call(layer, given, (basis.reshape(-1, channels, *size),)).flatten(1).T


def divided(blocks: Mapping[str, int]) -> Map:
    """Every matrix over its norm, those named block by block along the first axis."""

    def normalised(name: str, w: Any) -> Any:
        if w.ndim < 2:
            return w
        count = next((n for part, n in blocks.items() if part in name), 1)
        return torch.cat([b / top(b.flatten(1)) for b in w.chunk(count)])

    return normalised


def replaced(model: nn.Module, normalised: Map, *inputs: Any, **kwargs: Any) -> Any:
    """The output of a model that uses other weights, differentiable in its parameters."""
    used = {n: normalised(n, p) for n, p in model.named_parameters()}
    return functional_call(model, used, inputs, kwargs)


def assert_relative(actual: Any, expected: Any, tolerance: float) -> None:
    """‖actual − expected‖ ≤ tolerance · ‖expected‖."""
    actual, expected = actual.detach().double(), expected.detach().double()
    error = float(torch.linalg.vector_norm(actual - expected))
    assert error <= tolerance * float(torch.linalg.vector_norm(expected)), error


Built = tuple[nn.Module, tuple[Any, ...], dict[str, Any]]


def attention(**sizes: int) -> Built:
    layer = nn.MultiheadAttention(8, 2, batch_first=True, **sizes)
    keys = [torch.randn(2, 5, sizes.get(k, 8)) for k in ("kdim", "vdim")]
    return layer, (torch.randn(2, 3, 8), *keys), {"need_weights": False}


def encoder() -> Built:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0)
    ignored = torch.arange(5) >= torch.tensor([[5], [3]])
    return (
        nn.TransformerEncoder(layer, 2),
        (torch.randn(2, 5, 8),),
        {"mask": None} | {"src_key_padding_mask": ignored},
    )


def recurrent(kind: Any, cell: bool = False, **options: Any) -> Built:
    x = torch.randn(3, 4) if cell else torch.randn(5, 3, 4)
    return kind(4, 6, **options), (x,), {}


def tied() -> Built:
    """An embedding and a head of one tensor, a layer used twice, a foreign holder's `kernel`."""
    model = nn.Module()
    model.embed, model.head = nn.Embedding(7, 4), nn.Linear(4, 7, bias=False)
    model.head.weight = model.embed.weight
    model.twice = nn.Linear(4, 4)
    model.foreign = nn.Module()
    model.foreign.kernel = model.twice.weight
    foreign = model.foreign
    model.foreign.forward = lambda x: x @ foreign.kernel
    model.forward = lambda i: model.head(
        model.foreign(model.twice(model.twice(model.embed(i)).tanh()).tanh())
    )
    return model, (torch.arange(6).reshape(2, 3),), {}


KINDS = {
    "attention": (attention, {"in_proj": 3}),
    "attention of other sizes": (lambda: attention(kdim=6, vdim=5), {}),
    "encoder": (encoder, {"in_proj": 3}),
    "LSTM": (lambda: recurrent(nn.LSTM, num_layers=2, bidirectional=True), {"weight": 4}),
    "LSTM with projection": (
        lambda: recurrent(nn.LSTM, proj_size=2),
        {"weight_hr": 1, "weight": 4},
    ),
    "GRU": (lambda: recurrent(nn.GRU), {"weight": 3}),
    "RNN": (lambda: recurrent(nn.RNN), {}),
    "LSTM cell": (lambda: recurrent(nn.LSTMCell, True), {"weight": 4}),
    "tied": (tied, {}),
}


def parts(output: Any) -> list[Any]:
    """The tensors of an output."""
    if torch.is_tensor(output):
        return [output]
    return [t for o in output if o is not None for t in parts(o)]


def sgd(model: nn.Module, **options: Any) -> Any:
    """With momentum."""
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, **options)


def same(a: nn.Module, b: nn.Module) -> bool:
    """Whether two models hold the same values, bit by bit."""
    pairs = zip(a.state_dict().values(), b.state_dict().values(), strict=True)
    return all(torch.equal(x, y) for x, y in pairs)


def hooks(model: nn.Module) -> list[Any]:
    """All forward hooks."""
    return [h for m in model.modules() for h in (*m._forward_hooks.values(), *m._forward_pre_hooks)]


def taken_over(model: nn.Module, optimizer: Any, how: str) -> Any:
    """An optimizer of the model's parameters made from another one."""
    if how == "new":
        other = sgd(model)
        other.load_state_dict(optimizer.state_dict())
        return other
    if how == "deepcopy":
        return copy.deepcopy(optimizer, {id(p): p for p in model.parameters()})
    other = pickle.loads(pickle.dumps(optimizer))
    other.param_groups[0]["params"] = list(model.parameters())
    other.state.clear()
    return other


class Halved:
    """A forward rule of somebody else."""

    stage = "forward"

    def init(self, weight: Any, geometry: Any, name: str) -> dict[str, Any]:
        return {"count": torch.zeros(())}

    def update(self, weight: Any, geometry: Any, state: Any, **_: Any) -> Any:
        return weight, {"count": state["count"] + 1}, {}

    def apply(self, weight: Any, geometry: Any, state: Any, **_: Any) -> Any:
        return 0.5 * weight


class Decay(Halved):
    """A gradient rule of somebody else."""

    stage = "gradients"

    def update(self, weight: Any, geometry: Any, state: Any, **_: Any) -> Any:
        return 0.5 * weight, {"count": state["count"] + 1}, {}

    def penalty(self, weight: Any, geometry: Any, state: Any, **_: Any) -> Any:
        return 0.25 * (weight * weight).sum(), 0.5 * weight


@contextmanager
def gradients_added(model: nn.Module, optimizer: Any) -> Iterator[dict[str, Any]]:
    """What a step inside the block adds to the gradients, by name."""
    before, added = gradients(model), dict[str, Any]()
    yield added
    added |= {n: g - before[n] for n, g in gradients(model).items()}


def penalty_of(model: nn.Module, strength: float = 0.3) -> Any:
    """The sum over layers of λ/2·σ² for reshaped kernels, differentiable."""
    total = 0.0
    for layer in model.modules():
        if getattr(layer, "weight", None) is not None and layer.weight.ndim > 1:
            w = layer.weight
            w = w.transpose(0, 1) if isinstance(layer, nn.ConvTranspose2d) else w
            total = total + 0.5 * strength * top(w.flatten(1)) ** 2
    return total
