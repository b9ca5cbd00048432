"""Train a small convolutional network twice, plain and with every layer's norm clipped.

The second run differs by two lines: an attachment that keeps the operator norm of each layer
at or below --max-norm, and its last word after the last step. Both are evaluated with statistics
of batch normalisation that are estimated anew, those of training being of weights before the last
projections, or the last steps. Prints a table of what became of each layer and draws all singular
values. train_digits_jax.py is the same in JAX.

    python examples/train_digits.py
    python examples/train_digits.py --data cifar10_train_*.npz cifar10_test.npz --epochs 3
"""

from __future__ import annotations

import argparse
import time
import warnings

import digits
import numpy as np
import torch
from rich.progress import Progress
from torch import nn

import specops
from specops.errors import CautionWarning
from specops_torch import geometry_of


def network(channels: int, classes: int) -> nn.Sequential:
    """Four convolutions with batch norm and a linear head."""

    def block(inputs: int, outputs: int, stride: int = 1) -> list[nn.Module]:
        return [
            nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False),
            nn.BatchNorm2d(outputs),
            nn.ReLU(),
        ]

    return nn.Sequential(
        *block(channels, 16),
        *block(16, 32),
        *block(32, 48, stride=2),
        *block(48, 48),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(48, classes),
    )


def train(
    data: digits.Data,
    rule: specops.ClipSpectralNorm | None,
    options: argparse.Namespace,
    progress: Progress,
) -> digits.Run:
    """One run; both runs see the same initial weights and the same batches."""
    torch.manual_seed(options.seed)
    images, labels = channels_first(data.x_train), torch.as_tensor(data.y_train)
    model = network(images.shape[1], data.classes).to(options.device)
    batches = data.batches(options)
    optimizer = torch.optim.SGD(
        model.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=1e-4
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=len(batches))
    stopwatch = _Stopwatch()
    optimizer.register_step_post_hook(stopwatch.start)
    attachment = None
    if rule is not None:
        attachment = specops.attach(optimizer, model, rule, every=options.every)
    optimizer.register_step_post_hook(stopwatch.stop)

    label = "plain" if rule is None else f"clipped at {options.max_norm:g}"
    task = progress.add_task(label, total=len(batches), result="")
    began = time.perf_counter()
    model.train()
    for chosen in torch.as_tensor(batches):
        x, y = images[chosen].to(options.device), labels[chosen].to(options.device)
        loss = nn.functional.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        progress.advance(task)
    if attachment is not None:
        with warnings.catch_warnings():
            # That statistics are of other weights: those to evaluate with follow.
            warnings.simplefilter("ignore", CautionWarning)
            attachment.enforce()
        attachment.detach()
    seconds = time.perf_counter() - began
    one_pass = torch.as_tensor(batches[-(len(batches) // options.epochs) :])
    loader = (images[chosen].to(options.device) for chosen in one_pass)
    torch.optim.swa_utils.update_bn(loader, model)
    accuracy = evaluate(model, data, options)
    progress.update(task, result=f"test accuracy {accuracy:.2%}")
    remark = f"hook {stopwatch.total:.1f} s, {stopwatch.total / seconds:.0%}"
    return digits.Run(model, layers_of(model, data, options), accuracy, seconds, remark)


class _Stopwatch:
    """Two step hooks around the attachment's own: the time between them is its cost."""

    def __init__(self) -> None:
        self.total = 0.0
        self._began = 0.0

    def start(self, *_: object) -> None:
        self._began = time.perf_counter()

    def stop(self, *_: object) -> None:
        self.total += time.perf_counter() - self._began


def channels_first(images: np.ndarray) -> torch.Tensor:
    """Images as torch wants them."""
    return torch.as_tensor(images).permute(0, 3, 1, 2).contiguous()


@torch.no_grad()
def evaluate(model: nn.Module, data: digits.Data, options: argparse.Namespace) -> float:
    """Share of test images classified correctly."""
    model.eval()
    found = [
        model(x.to(options.device)).argmax(1).cpu() for x in channels_first(data.x_test).split(500)
    ]
    return float(np.mean(torch.cat(found).numpy() == data.y_test))


@torch.no_grad()
def layers_of(
    model: nn.Module, data: digits.Data, options: argparse.Namespace
) -> dict[str, tuple[np.ndarray, digits.Geometry]]:
    """Every convolution and linear layer's weight, and the linear map that it is."""
    shapes: dict[str, tuple[int, ...]] = {}
    layers = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Conv2d | nn.Linear)
    }
    hooks = [
        module.register_forward_hook(
            lambda _, args, __, name=name: shapes.update({name: tuple(args[0].shape[2:])})
        )
        for name, module in layers.items()
    ]
    model(channels_first(data.x_test[:2]).to(options.device))
    for hook in hooks:
        hook.remove()
    return {
        name: (
            module.weight.detach().cpu().numpy(),
            geometry_of(module, input_shape=shapes[name] or None),
        )
        for name, module in layers.items()
    }


def find_device(name: str) -> torch.device:
    """The device of this name, if tensors can be made there."""
    return torch.empty(0, device=name).device


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    return digits.parse(__doc__, find_device, arguments)


def main(arguments: list[str] | None = None) -> None:
    """Train twice, compare, draw."""
    options = parse(arguments)
    if not options.data:
        # So small a job loses more by two threads that wait for each other than it gains.
        torch.set_num_threads(1)
    digits.compare(train, specops.ClipSpectralNorm(options.max_norm), options)


if __name__ == "__main__":
    main()
