"""What the training examples share: the data, the order of the batches, the table, the figure.

Nothing here knows the framework that trains; weights arrive as NumPy arrays.
"""

from __future__ import annotations

import argparse
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from rich import box
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

import specops
from specops.errors import UnsupportedGeometryError

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.ticker import MaxNLocator

Geometry = specops.Dense | specops.Conv
PLAIN, CLIPPED = "#8c8c8c", "#0b6e99"


@dataclass
class Data:
    """Images scaled to zero mean and unit variance, (N, H, W, C) float32, and their labels."""

    x_train: np.ndarray
    y_train: np.ndarray
    x_test: np.ndarray
    y_test: np.ndarray

    @property
    def classes(self) -> int:
        return int(self.y_train.max()) + 1

    def batches(self, options: argparse.Namespace) -> np.ndarray:
        """The images of each step, (steps, images); what fills no batch is left out of a pass."""
        count = len(self.x_train)
        size = min(options.batch, count)
        rng = np.random.default_rng(options.seed)
        passes = [rng.permutation(count)[: count - count % size] for _ in range(options.epochs)]
        return np.concatenate(passes).reshape(-1, size)


@dataclass
class Run:
    """A trained network and what training it took."""

    network: Any
    layers: dict[str, tuple[np.ndarray, Geometry]]
    """The weight of every convolution and linear layer, and the linear map that it is."""
    accuracy: float
    seconds: float
    remark: str = ""
    """What the seconds are made of."""


@dataclass
class LayerFigures:
    """The figures of one layer after one run."""

    geometry: Geometry
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
    y_train, y_test = (arrays[key].astype(np.int64) for key in ("y_train", "y_test"))
    mean, std = x_train.mean(), x_train.std()
    return Data((x_train - mean) / std, y_train, (x_test - mean) / std, y_test)


def _images(x: np.ndarray) -> np.ndarray:
    images = np.asarray(x, dtype=np.float32)
    return images[..., None] if images.ndim == 3 else images


def measure(layers: dict[str, tuple[np.ndarray, Geometry]]) -> dict[str, LayerFigures]:
    """Every layer, as the linear map that it is on these images."""
    figures = {}
    for name, (w, geometry) in layers.items():
        spectrum_of, matrix, periodic = geometry, geometry, False
        if isinstance(geometry, specops.Conv):
            matrix = specops.Dense(out_axes=geometry.channel_axes[:1])
        try:
            spectrum = specops.singular_values(w, geometry)
        except UnsupportedGeometryError:
            # Too large for the explicit zero-padded matrix: the periodic layer has a closed form.
            periodic, stride = True, geometry.stride
            grid = tuple(-(-n // s) * s for n, s in zip(geometry.grid, stride, strict=True))
            spectrum_of = specops.Conv(
                grid, stride=stride, boundary="circular", layout=geometry.layout
            )
            spectrum = specops.singular_values(w, spectrum_of)
        figures[name] = LayerFigures(
            geometry,
            float(specops.spectral_norm(w, geometry)),
            float(specops.spectral_norm(w, matrix)),
            float(specops.stable_rank(w, geometry)),
            spectrum,
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


def compare(
    train: Callable[..., Run], rule: specops.ClipSpectralNorm, options: argparse.Namespace
) -> None:
    """Train twice, plain and clipped; print and draw what became of the layers."""
    console, data = Console(), load(options.data)
    columns = (
        TextColumn("{task.description:<14}"),
        BarColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[result]}"),
    )
    with Progress(*columns, console=console) as progress:
        plain = train(data, None, options, progress)
        clipped = train(data, rule, options, progress)
    with console.status("measuring every layer"):
        before, after = measure(plain.layers), measure(clipped.layers)
    console.print(table(before, after, options.max_norm))
    draw(before, after, options.max_norm, options.out)
    console.print(
        f"test accuracy  {plain.accuracy:.2%} plain, {clipped.accuracy:.2%} clipped "
        f"(batch statistics estimated anew)\n"
        f"training time  {plain.seconds:.1f} s plain, {clipped.seconds:.1f} s clipped "
        f"({clipped.remark})\n"
        f"singular values of every layer: {options.out}",
        highlight=False,
    )


def parse(
    description: str | None, find_device: Callable[[str], Any], arguments: list[str] | None
) -> argparse.Namespace:
    """The command line; `find_device` gives the framework's device of a name, or raises."""
    parser = argparse.ArgumentParser(
        description=description.splitlines()[0] if description else None,
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
    parser.add_argument("--device", default="cpu", help="where to train")
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
        options.device = find_device(options.device)
    except (RuntimeError, AssertionError, ValueError, IndexError) as error:
        parser.error(f"--device {options.device}: {error}".splitlines()[0])
    return options
