"""Accuracy against a certified Lipschitz bound: layers whose norms never exceed a cap.

python examples/papers/certified.py --quick
python examples/papers/certified.py                       # digits, minutes on 2 cores
python examples/papers/certified.py --preset full --data DIR --device cuda
python examples/papers/certified.py plot

After Newhouse et al., *Training Transformers with Enforced Lipschitz Constants*, 2025, which
begins with such networks on CIFAR-10. Distances are Euclidean, of pixels in [0, 1].
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from harness import classify, figures, networks, records
from harness.program import Context, Job, Program

import specops
import specops_torch
from specops import measures, plots

CAPS = (0.5, 1.0, 2.0, 4.0)
METHODS: dict[str, dict[str, Any]] = {
    "none": {},
    "decay 0.001": {"decay": 1e-3},
    "decay 0.01": {"decay": 1e-2},
    **{f"cap {c:g}": {"cap": c} for c in CAPS},
}
RADIUS = 36 / 255
PRESETS: dict[str, dict[str, Any]] = {
    "quick": {
        "data": {"train": 200, "test": 100},
        "network": {"width": 16, "depth": 3},
        "recipe": {"epochs": 2, "batch": 50, "rate": 0.05},
        "every": 5,
        "points": 5,
        "methods": ["none", "cap 1"],
    },
    "digits": {
        "data": {},
        "network": {"width": 128, "depth": 3},
        "recipe": {"epochs": 20, "batch": 64, "rate": 0.05},
        "every": 10,
        "points": 20,
        "methods": list(METHODS),
    },
    "small": {
        "data": {"train": 5000, "test": 2000, "side": 16},
        "network": {"width": 128, "depth": 3},
        "recipe": {"epochs": 10, "batch": 64, "rate": 0.05},
        "every": 10,
        "points": 20,
        "methods": list(METHODS),
    },
    "full": {
        "data": {},
        "network": {"width": 256, "depth": 3},
        "recipe": {"epochs": 50, "batch": 128, "rate": 0.05},
        "every": 10,
        "points": 100,
        "methods": list(METHODS),
    },
}


def jobs(sizes: Mapping[str, Any]) -> list[Job]:
    """Every cap, and what does not cap."""
    return [Job("bounds", name, METHODS[name]) for name in sizes["methods"]]


def run(job: Job, context: Context) -> dict[str, Any]:
    """One run."""
    settings, sizes, images = job.settings, context.sizes, context.data.centred()
    torch.manual_seed(context.seed)
    network = networks.mlp(images.shape, images.classes, **sizes["network"]).to(context.device)
    rule = specops.ClipSpectralNorm(settings["cap"]) if "cap" in settings else None
    recipe = classify.Recipe(
        settle=True, decay=settings.get("decay", 0.0),
        measure_every=sizes["recipe"]["epochs"], **sizes["recipe"],
    )  # fmt: skip
    trained = classify.train(
        network, images, recipe, rule=rule, every=sizes["every"], seed=context.seed,
        tick=context.tick,
    )  # fmt: skip
    bound = specops_torch.lipschitz_upper_bound(network, images.shape)
    ahead = margins(network, images)
    found = {
        **trained.last,
        "lipschitz": bound.value,
        "log10_lipschitz": bound.log / math.log(10),
        "local_lipschitz": max(local(network, x) for x in images.x_test[: sizes["points"]]),
        # Differences of two outputs change by at most √2 times as much.
        "certified_accuracy": float((ahead > math.sqrt(2) * bound.value * RADIUS).float().mean()),
        "training_seconds": trained.seconds,
    }
    if "cap" in settings:
        found["allowed"] = settings["cap"] ** sizes["network"]["depth"]
    return found


@torch.no_grad()
def margins(network: torch.nn.Module, images: Any) -> torch.Tensor:
    """Of the test images."""
    return measures.margins(network(images.x_test), images.y_test)


def local(network: torch.nn.Module, x: torch.Tensor) -> float:
    """The norm of the Jacobian at an image."""
    jacobian = specops_torch.jacobian_operator(lambda v: network(v[None])[0], x)
    return measures.local_lipschitz(jacobian).value


def plot(found: list[records.Record], out: Path) -> list[Path]:
    """Accuracy against the bound; certified accuracy; the bound beside what is seen locally."""
    runs = records.by_label(found, "bounds")
    figure, (plane, certified, both) = figures.panels(3, columns=3, size=(3.8, 3.1))
    for place, (name, points) in enumerate(runs.items()):
        x, y = ([r["results"][k] for r in points] for k in ("lipschitz", "test_accuracy"))
        style = ("o", 4) if name.startswith("cap") else ("s", 5.5)
        plane.plot(x, y, style[0], markersize=style[1], color=figures.COLORS[place], label=name)
    plane.set(xscale="log")
    plane.set_xlabel("certified Lipschitz bound", fontsize=8.5)
    plane.set_ylabel("test accuracy", fontsize=8.5)
    plane.legend(frameon=False, fontsize=7)
    label = f"share certainly right within {RADIUS:.2f}"
    figures.bars(certified, figures.values(runs, "certified_accuracy"), label)
    figures.bars(
        both, figures.values(runs, "lipschitz"), "certified bound; ×: largest ‖Jacobian‖ met"
    )
    for place, points in enumerate(runs.values()):
        values = [r["results"]["local_lipschitz"] for r in points]
        both.plot([place] * len(values), values, "x", color="black", markersize=5)
    both.set(yscale="log")
    return [plots.save(figure, out.parent / f"certified_{out.name}.png")]


PROGRAM = Program("certified", __doc__, PRESETS, jobs, run, plot, {"bounds": "test_accuracy"})

if __name__ == "__main__":
    PROGRAM.main()
