"""Train a small convolutional network twice, plain and with every layer's norm clipped.

The second run differs by two lines: an attachment that keeps the operator norm of each layer
at or below --max-norm, and its last word after the last step. Prints a table of what became of
each layer and draws all singular values.

    python examples/train_digits.py
    python examples/train_digits.py --data cifar10_train_*.npz cifar10_test.npz --epochs 3
"""

from __future__ import annotations

import argparse
import time
import zipfile
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
import torch
from rich import box
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from torch import nn

import specops
from specops.errors import UnsupportedGeometryError
from specops_torch import geometry_of

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.ticker import MaxNLocator

PLAIN, CLIPPED = "#8c8c8c", "#0b6e99"


@dataclass
class Data:
    """Images scaled to zero mean and unit variance, (N, C, H, W), and their labels."""

    x_train: torch.Tensor
    y_train: torch.Tensor
    x_test: torch.Tensor
    y_test: torch.Tensor

    @property
    def classes(self) -> int:
        return int(self.y_train.max()) + 1


@dataclass
class Run:
    """A trained network and what training it took."""

    model: nn.Module
    accuracy: float
    seconds: float
    hook_seconds: float


@dataclass
class LayerFigures:
    """The figures of one layer after one run."""

    geometry: specops.Dense | specops.Conv
    norm: float
    reshaped_norm: float
    stable_rank: float
    spectrum: np.ndarray
    spectrum_is_periodic: bool


def load(files: list[Path]) -> Data:
    """scikit-learn's digits, or the concatenation of .npz files."""
    if files:
        parts: dict[str, list[np.ndarray]] = {}
        for file in files:
            with np.load(file) as arrays:
                for key in ("x_train", "y_train", "x_test", "y_test"):
                    if key in arrays:
                        parts.setdefault(key, []).append(arrays[key])
        missing = {"x_train", "y_train", "x_test", "y_test"} - set(parts)
        if missing:
            raise SystemExit(f"--data: no file holds {', '.join(sorted(missing))}")
        arrays = {key: np.concatenate(values) for key, values in parts.items()}
    else:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split

        digits = load_digits()
        names = ("x_train", "x_test", "y_train", "y_test")
        split = train_test_split(
            digits.images, digits.target, test_size=0.25, random_state=0, stratify=digits.target
        )
        arrays = dict(zip(names, split, strict=True))
    x_train, x_test = (_images(arrays[key]) for key in ("x_train", "x_test"))
    mean, std = x_train.mean(), x_train.std()
    labels = {k: torch.as_tensor(arrays[k].astype(np.int64)) for k in ("y_train", "y_test")}
    return Data((x_train - mean) / std, labels["y_train"], (x_test - mean) / std, labels["y_test"])


def _images(x: np.ndarray) -> torch.Tensor:
    images = torch.as_tensor(np.ascontiguousarray(x), dtype=torch.float32)
    return images.unsqueeze(1) if images.ndim == 3 else images.permute(0, 3, 1, 2).contiguous()


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
    data: Data,
    rule: specops.ClipSpectralNorm | None,
    options: argparse.Namespace,
    progress: Progress,
) -> Run:
    """One run; both runs see the same initial weights and the same batches."""
    torch.manual_seed(options.seed)
    model = network(data.x_train.shape[1], data.classes).to(options.device)
    batches = -(-len(data.x_train) // options.batch)
    optimizer = torch.optim.SGD(
        model.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=1e-4
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=0.1, total_steps=batches * options.epochs
    )
    stopwatch = _Stopwatch()
    optimizer.register_step_post_hook(stopwatch.start)
    attachment = None
    if rule is not None:
        attachment = specops.attach(optimizer, model, rule, every=options.every)
    optimizer.register_step_post_hook(stopwatch.stop)

    order = torch.Generator().manual_seed(options.seed)
    label = "plain" if rule is None else f"clipped at {options.max_norm:g}"
    task = progress.add_task(label, total=batches * options.epochs, accuracy="")
    began = time.perf_counter()
    for _ in range(options.epochs):
        model.train()
        for chosen in torch.randperm(len(data.x_train), generator=order).split(options.batch):
            x = data.x_train[chosen].to(options.device)
            loss = nn.functional.cross_entropy(model(x), data.y_train[chosen].to(options.device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            progress.advance(task)
    if attachment is not None:
        attachment.enforce()
        attachment.detach()
    seconds = time.perf_counter() - began
    accuracy = evaluate(model, data, options)
    progress.update(task, accuracy=f"test accuracy {accuracy:.2%}")
    return Run(model, accuracy, seconds, stopwatch.total)


class _Stopwatch:
    """Two step hooks around the attachment's own: the time between them is its cost."""

    def __init__(self) -> None:
        self.total = 0.0
        self._began = 0.0

    def start(self, *_: object) -> None:
        self._began = time.perf_counter()

    def stop(self, *_: object) -> None:
        self.total += time.perf_counter() - self._began


@torch.no_grad()
def evaluate(model: nn.Module, data: Data, options: argparse.Namespace) -> float:
    """Share of test images classified correctly."""
    model.eval()
    correct = 0
    for x, y in zip(data.x_test.split(500), data.y_test.split(500), strict=True):
        correct += int((model(x.to(options.device)).argmax(1).cpu() == y).sum())
    return correct / len(data.y_test)


@torch.no_grad()
def measure(model: nn.Module, data: Data, options: argparse.Namespace) -> dict[str, LayerFigures]:
    """Every convolution and linear layer, as the linear map that it is on these images."""
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
    model(data.x_test[:2].to(options.device))
    for hook in hooks:
        hook.remove()

    figures = {}
    for name, module in layers.items():
        w = module.weight.detach()
        geometry = geometry_of(module, input_shape=shapes[name] or None)
        spectrum_of, periodic = geometry, False
        try:
            spectrum = specops.singular_values(w, geometry)
        except UnsupportedGeometryError:
            # Too large for the explicit zero-padded matrix: the periodic layer has a closed form.
            periodic = True
            grid = tuple(-(-n // s) * s for n, s in zip(shapes[name], module.stride, strict=True))
            spectrum_of = specops.Conv(grid, stride=module.stride, boundary="circular")
            spectrum = specops.singular_values(w, spectrum_of)
        figures[name] = LayerFigures(
            geometry,
            float(specops.spectral_norm(w, geometry)),
            float(specops.spectral_norm(w, specops.Dense())),
            float(specops.stable_rank(w, geometry)),
            spectrum.cpu().numpy(),
            periodic,
        )
    return figures


def table(
    plain: dict[str, LayerFigures], clipped: dict[str, LayerFigures], max_norm: float
) -> Table:
    """What became of each layer."""
    result = Table(
        title="Layers after training: plain → clipped",
        title_style="bold",
        title_justify="left",
        box=box.SIMPLE_HEAD,
        padding=(0, 1),
        pad_edge=False,
    )
    result.add_column("layer", style="bold")
    result.add_column("is a")
    for header in ("operator norm", "reshaped norm", "stable rank"):
        result.add_column(header, justify="right")
    for name, before in plain.items():
        after = clipped[name]
        held = "green" if after.norm <= max_norm * (1 + 1e-4) else "red"
        result.add_row(
            name,
            before.geometry.describe(),
            f"{before.norm:.2f} → [{held}]{after.norm:.4f}[/]",
            f"{before.reshaped_norm:.2f} → {after.reshaped_norm:.2f}",
            f"{before.stable_rank:.1f} → {after.stable_rank:.1f}",
        )
    return result


def draw(
    plain: dict[str, LayerFigures],
    clipped: dict[str, LayerFigures],
    max_norm: float,
    out: Path,
) -> None:
    """Every layer's singular values by rank, both runs."""
    columns = min(3, len(plain))
    rows = -(-len(plain) // columns)
    figure, axes = plt.subplots(
        rows, columns, figsize=(3.6 * columns, 2.7 * rows), squeeze=False, layout="constrained"
    )
    for axis, (name, before) in zip(axes.flat, plain.items(), strict=False):
        after = clipped[name]
        axis.axhline(
            max_norm, color="#c0392b", linewidth=0.9, linestyle=(0, (4, 3)), label="max norm"
        )
        for spectrum, color, label in [
            (before.spectrum, PLAIN, "plain"),
            (after.spectrum, CLIPPED, "clipped"),
        ]:
            rank = np.arange(1, len(spectrum) + 1)
            style = {"marker": "o", "markersize": 3} if len(spectrum) <= 64 else {}
            axis.plot(rank, spectrum, color=color, linewidth=1.8, label=label, **style)
        kind = before.geometry.describe()
        if before.spectrum_is_periodic:
            kind += "\n(spectrum of its periodic version)"
        axis.set_title(f"{name}: {kind}", fontsize=8.5, loc="left")
        axis.xaxis.set_major_locator(MaxNLocator(4, integer=True))
        axis.set_ylim(bottom=0)
        axis.tick_params(labelsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    for axis in axes.flat[len(plain) :]:
        axis.set_visible(False)
    axes[0, 0].legend(frameon=False, fontsize=8)
    figure.supxlabel("rank", fontsize=9)
    figure.supylabel("singular value", fontsize=9)
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=150)
    plt.close(figure)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0] if __doc__ else None,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument(
        "--data",
        nargs="+",
        type=Path,
        default=[],
        metavar="FILE.npz",
        help="x_train, y_train, x_test, y_test; images (N, H, W) or (N, H, W, C) uint8; several "
        "files are concatenated; without it scikit-learn's digits",
    )
    parser.add_argument("--max-norm", type=float, default=1.0, help="bound on every layer's norm")
    parser.add_argument("--every", type=int, default=10, help="clip every so many steps")
    parser.add_argument("--epochs", type=int, default=15, help="passes over the training images")
    parser.add_argument("--batch", type=int, default=64, help="images per step")
    parser.add_argument("--seed", type=int, default=0, help="of the weights and the batches")
    parser.add_argument("--device", default="cpu", help="where torch trains")
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("singular_values.png"),
        metavar="FILE.png",
        help="where the figure goes",
    )
    options = parser.parse_args(arguments)
    if not 0 < options.max_norm < float("inf"):
        parser.error(f"--max-norm must be positive and finite, got {options.max_norm:g}")
    for name in ("every", "epochs", "batch"):
        if getattr(options, name) < 1:
            parser.error(f"--{name} must be at least 1, got {getattr(options, name)}")
    for file in options.data:
        if not zipfile.is_zipfile(file):
            parser.error(f"--data: {file} is no .npz file")
    known = FigureCanvasAgg.get_supported_filetypes()
    if options.out.suffix.lstrip(".") not in known:
        parser.error(f"--out must end in one of {', '.join(sorted(known))}, got {options.out}")
    try:
        torch.empty(0, device=options.device)
    except (RuntimeError, AssertionError) as error:
        parser.error(f"--device {options.device}: {error}".splitlines()[0])
    return options


def main(arguments: list[str] | None = None) -> None:
    """Train twice, compare, draw."""
    options = parse(arguments)
    rule = specops.ClipSpectralNorm(options.max_norm)
    console = Console()
    data = load(options.data)
    if not options.data:
        # So small a job loses more by two threads that wait for each other than it gains.
        torch.set_num_threads(1)
    columns = (
        TextColumn("{task.description:<14}"),
        BarColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[accuracy]}"),
    )
    with Progress(*columns, console=console) as progress:
        plain = train(data, None, options, progress)
        clipped = train(data, rule, options, progress)
    with console.status("measuring every layer"):
        before, after = (measure(run.model, data, options) for run in (plain, clipped))
    console.print(table(before, after, options.max_norm))
    draw(before, after, options.max_norm, options.out)
    share = clipped.hook_seconds / clipped.seconds
    console.print(
        f"test accuracy  {plain.accuracy:.2%} plain, {clipped.accuracy:.2%} clipped\n"
        f"training time  {plain.seconds:.1f} s plain, {clipped.seconds:.1f} s clipped "
        f"(hook {clipped.hook_seconds:.1f} s, {share:.0%})\n"
        f"singular values of every layer: {options.out}",
        highlight=False,
    )


if __name__ == "__main__":
    main()
