"""Exponential averages of weights under spectral normalisation, in a deep stack of layers.

python examples/papers/averages.py --quick
python examples/papers/averages.py                       # digits, minutes on 2 cores
python examples/papers/averages.py --preset full --data DIR --device cuda
python examples/papers/averages.py plot

An average of unit vectors is shorter than 1: torch's normalisation, which keeps its singular
vectors in buffers, then divides by too little, in every layer. Reported as losses of 4,000 times
(NCAR/miles-credit, pull requests 394 and 409).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from harness import classify, figures, networks, records
from harness.program import Context, Job, Program
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.utils import parametrizations
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import specops
from specops import plots

KINDS: dict[str, dict[str, Any]] = {
    "torch, vectors averaged": {"by": "torch", "buffers": True},
    "torch, vectors of the last step": {"by": "torch", "buffers": False},
    "specops": {"by": "specops", "buffers": True},
}
PRESETS: dict[str, dict[str, Any]] = {
    "quick": {
        "data": {"train": 200, "test": 100},
        "width": 16,
        "depths": [8],
        "recipe": {"epochs": 1, "batch": 50, "rate": 1e-3},
        "decay": 0.9,
    },
    "digits": {
        "data": {},
        "width": 64,
        "depths": [4, 16, 64],
        "recipe": {"epochs": 10, "batch": 64, "rate": 1e-3},
        "decay": 0.99,
    },
    "small": {
        "data": {"train": 2000, "test": 1000, "side": 8},
        "width": 64,
        "depths": [4, 16, 64],
        "recipe": {"epochs": 10, "batch": 64, "rate": 1e-3},
        "decay": 0.99,
    },
    "full": {
        "data": {},
        "width": 512,
        "depths": [4, 16, 64, 176],
        "recipe": {"epochs": 20, "batch": 128, "rate": 1e-3},
        "decay": 0.999,
    },
}


def jobs(sizes: Mapping[str, Any]) -> list[Job]:
    """Every kind at every depth."""
    return [
        Job(f"{depth} layers", name, {**kind, "depth": depth})
        for depth in sizes["depths"]
        for name, kind in KINDS.items()
    ]


def run(job: Job, context: Context) -> dict[str, Any]:
    """One run; its average is compared with the same averaged weights normalised exactly."""
    settings, sizes, images = job.settings, context.sizes, context.data.standardised()

    def make() -> nn.Sequential:
        return networks.residual_mlp(
            images.shape, images.classes, width=sizes["width"], depth=settings["depth"]
        ).to(context.device)

    torch.manual_seed(context.seed)
    network, rule = make(), None
    if settings["by"] == "torch":
        for layer in linear_layers(network).values():
            parametrizations.spectral_norm(layer)
    else:
        rule = specops.SpectralNormalization(norm="reshaped")
    average: list[AveragedModel] = []

    def follow(network: nn.Module) -> None:
        if not average:
            ema = get_ema_multi_avg_fn(sizes["decay"])
            average.append(
                AveragedModel(network, multi_avg_fn=ema, use_buffers=settings["buffers"])
            )
        average[0].update_parameters(network)

    trained = classify.train(
        network, images, classify.Recipe(adam=True, milestones=(), **sizes["recipe"]), rule=rule,
        seed=context.seed, tick=context.tick, after_step=follow,
        observe=lambda _: compared(average[0].module, make(), images.x_test, images.y_test),
    )  # fmt: skip
    return {**trained.last, "curve": trained.curve, "training_seconds": trained.seconds}


@torch.no_grad()
def compared(average: nn.Module, exact: nn.Module, x: Tensor, y: Tensor) -> dict[str, float]:
    """The average's outputs against those of its raw weights over their exact norms."""
    average.eval()
    norms = [
        float(specops.spectral_norm(v.weight.detach())) for v in linear_layers(average).values()
    ]
    raw = {
        name.replace("parametrizations.weight.original", "weight"): p.detach()
        for name, p in average.named_parameters()
    }
    for name, p in exact.named_parameters():
        p.copy_(raw[name] / specops.spectral_norm(raw[name]) if p.ndim > 1 else raw[name])
    found, expected = average(x), exact(x)
    error = float((found - expected).norm() / expected.norm())
    losses = {"average": found, "exact": expected}
    return {
        "error": error,
        "log10_error": math.log10(error) if error > 0 else -math.inf,
        "largest_norm": max(norms),
        **{f"{k}_loss": float(cross_entropy(v, y)) for k, v in losses.items()},
        **{f"{k}_accuracy": float((v.argmax(1) == y).float().mean()) for k, v in losses.items()},
    }


def linear_layers(network: nn.Module) -> dict[str, nn.Linear]:
    return {name: m for name, m in network.named_modules() if isinstance(m, nn.Linear)}


def plot(found: list[records.Record], out: Path) -> list[Path]:
    """Errors by depth and over training, losses."""
    by_depth = {
        experiment: records.by_label(found, experiment)
        for experiment in dict.fromkeys(r["experiment"] for r in found)
    }
    figure, axes = figures.panels(3, columns=3, size=(3.8, 3.1))
    depths = [int(name.split()[0]) for name in by_depth]
    axes[0].set(xscale="log", yscale="log")
    for place, name in enumerate(KINDS):
        errors = [runs[name] for runs in by_depth.values() if name in runs]
        values = [[10 ** r["results"]["log10_error"] for r in runs] for runs in errors]
        figures.line(axes[0], depths[: len(values)], values, name, place)
    axes[0].set_xticks(depths, depths)
    axes[0].minorticks_off()
    axes[0].set_xlabel("layers", fontsize=8.5)
    axes[0].set_ylabel("relative error of the average's outputs", fontsize=8.5)
    deepest = list(by_depth.values())[-1]
    axes[1].set(yscale="log")
    figures.curves(
        axes[1], deepest, "epoch", "error", ("epoch", f"the same with {depths[-1]} layers")
    )
    axes[1].legend(frameon=False, fontsize=7, loc="center right", bbox_to_anchor=(1, 0.32))
    for place, runs in enumerate(deepest.values()):
        for shift, loss in ((-0.2, "exact_loss"), (0.2, "average_loss")):
            values = [r["results"][loss] for r in runs]
            style = {"alpha": 0.75 if shift > 0 else 0.35, "width": 0.36}
            axes[2].bar(place + shift, figures.mean(values), color=figures.COLORS[place], **style)
    axes[2].set(yscale="log")
    axes[2].set_xticks(range(len(deepest)), deepest, rotation=15, ha="right", fontsize=7.5)
    axes[2].set_ylabel(f"test loss, {depths[-1]} layers (pale: exact norms)", fontsize=8.5)
    return [plots.save(figure, out.parent / f"averages_{out.name}.png")]


PROGRAM = Program(
    "averages", __doc__, PRESETS, jobs, run, plot,
    {f"{depth} layers": "error" for depth in (4, 8, 16, 64, 176)},
)  # fmt: skip

if __name__ == "__main__":
    PROGRAM.main()
