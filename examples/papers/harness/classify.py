"""Training a classifier, with or without a rule."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import specops
import specops_torch
from specops.errors import CautionWarning

from .data import Images


@dataclass(frozen=True)
class Recipe:
    """How to train: Nesterov's momentum, or Adam, and a step schedule."""

    epochs: int
    batch: int = 64
    rate: float = 0.1
    decay: float = 0.0
    milestones: tuple[float, ...] = (0.5, 0.75)
    """Shares of the training after which the rate is divided by ten."""
    augment: bool = False
    """Shifts by up to an eighth of the side and mirror images."""
    measure_every: int = 1
    """Epochs between evaluations."""
    stop_at: float | None = None
    """The training accuracy at which training ends."""
    settle: bool = False
    """Whether the rule acts once more after the last step."""
    adam: bool = False
    """Adam, with decay apart from its gradients, in place of momentum."""


@dataclass
class Trained:
    """A network after training."""

    network: nn.Module
    attachment: Any
    curve: list[dict[str, float]] = field(default_factory=list)
    seconds: float = 0.0
    """Of processor time, or of a GPU's elapsed time, in steps of training alone."""

    @property
    def last(self) -> dict[str, float]:
        return self.curve[-1]


Loss = Callable[[nn.Module, Tensor, Tensor], Tensor]


def plain_loss(network: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return cross_entropy(network(x), y)


def train(
    network: nn.Module,
    images: Images,
    recipe: Recipe,
    *,
    rule: Any = None,
    every: int = 1,
    loss: Loss = plain_loss,
    seed: int = 0,
    tick: Callable[[float], None] = lambda share: None,
    observe: Callable[[nn.Module], dict[str, float]] | None = None,
    after_step: Callable[[nn.Module], None] = lambda network: None,
) -> Trained:
    """Train; what `observe` gives at evaluations is put into the curve.

    Batch statistics are estimated anew before each evaluation: those of training are of weights
    before the last projection.
    """
    torch.manual_seed(seed)
    x, y = images.x_train, images.y_train
    size = min(recipe.batch, len(x))
    steps = len(x) // size
    options: dict[str, Any] = {"lr": recipe.rate, "weight_decay": recipe.decay}
    if recipe.adam:
        optimizer = torch.optim.AdamW(network.parameters(), **options)
    else:
        optimizer = torch.optim.SGD(network.parameters(), momentum=0.9, nesterov=True, **options)
    milestones = [max(1, round(share * recipe.epochs * steps)) for share in recipe.milestones]
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, milestones)
    network(x[:2])  # layers learn the size of their inputs
    attachment = None
    if rule is not None:
        attachment = specops.attach(optimizer, network, rule, every=every)
    trained = Trained(network, attachment)
    clock = time.perf_counter if x.is_cuda else time.process_time
    for epoch in range(1, recipe.epochs + 1):
        began, total = clock(), 0.0
        network.train()
        for chosen in torch.randperm(len(x))[: steps * size].view(steps, size):
            inputs = x[chosen.to(x.device)]
            if recipe.augment:
                inputs = _augmented(inputs)
            value = loss(network, inputs, y[chosen.to(x.device)])
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
            after_step(network)
            schedule.step()
            total += value.detach()
        last = epoch == recipe.epochs
        if last and recipe.settle and attachment is not None:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", CautionWarning)  # statistics follow
                attachment.enforce()
        total = float(total)  # waits for a GPU
        trained.seconds += clock() - began
        tick(epoch / recipe.epochs)
        if not last and epoch % recipe.measure_every:
            continue
        reestimate(network, x)
        point = {
            "epoch": epoch,
            "seconds": trained.seconds,
            "train_loss": total / steps,
            "train_accuracy": accuracy(network, x, y),
            "test_accuracy": accuracy(network, images.x_test, images.y_test),
            **(observe(network) if observe else {}),
        }
        trained.curve.append(point)
        if not torch.isfinite(torch.tensor(total)):
            break
        if recipe.stop_at is not None and point["train_accuracy"] >= recipe.stop_at:
            break
    network.eval()
    return trained


def reestimate(network: nn.Module, x: Tensor) -> None:
    """Batch statistics of the weights as they are; the network is left in evaluation."""
    if any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in network.modules()):
        torch.optim.swa_utils.update_bn(x[:2000].split(250), network)
    network.eval()


@torch.no_grad()
def accuracy(network: nn.Module, x: Tensor, y: Tensor) -> float:
    """The share that is classified correctly, in evaluation."""
    network.eval()
    right = sum(
        (network(a).argmax(1) == b).sum() for a, b in zip(x.split(500), y.split(500), strict=True)
    )
    return float(right) / len(x)


@torch.no_grad()
def weights_of(trained: Trained, x: Tensor) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The weights in use that have a rule, or all if there is none, and the maps that they are."""
    attachment = trained.attachment
    if attachment is None:
        attachment = specops.attach(None, trained.network, specops.Monitor())
        trained.network(x[:2])
    weights = {name: w.detach() for name, w in attachment.weights().items()}
    maps = attachment.geometries()
    if trained.attachment is None:
        attachment.detach()
    return weights, maps


def input_gradients(network: nn.Module, x: Tensor, y: Tensor) -> float:
    """The mean norm of the gradient of a sample's loss by its input."""
    norms = specops_torch.input_gradient_norms(
        lambda v: cross_entropy(network(v), y, reduction="none"), x
    )
    return float(norms.mean())


def _augmented(x: Tensor) -> Tensor:
    """Every image shifted and mirrored at random."""
    n, _, h, w = x.shape
    most = h // 8
    padded = nn.functional.pad(x, (most,) * 4)
    down, right = torch.randint(0, 2 * most + 1, (2, n, 1), device=x.device)
    columns = torch.arange(w, device=x.device).expand(n, w)
    columns = torch.where(torch.rand(n, 1, device=x.device) < 0.5, columns.flip(1), columns) + right
    rows = torch.arange(h, device=x.device) + down
    index = torch.arange(n, device=x.device)[:, None, None]
    return padded[index, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)
