"""Plasticity: task after task on the same images, with labels that are drawn or renamed anew.

python examples/papers/plasticity.py --quick
python examples/papers/plasticity.py                       # digits, minutes on 2 cores
python examples/papers/plasticity.py --preset full --data DIR --device cuda
python examples/papers/plasticity.py plot

After Lewandowski et al., *Learning Continually by Spectral Regularization*, ICLR 2025, whose
regulariser pulls every layer's norm to 1; the penalty here is that of Yoshida & Miyato, which
pulls it to 0.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from harness import classify, figures, networks, records
from harness.data import Images
from harness.program import Context, Job, Program
from harness.statistics import mean

import specops
from specops import plots

METHODS: dict[str, dict[str, Any]] = {
    "none": {},
    "decay 0.1": {"decay": 0.1},
    "decay 1": {"decay": 1.0},
    "spectral": {"strength": 0.01},
}
TASKS = {
    "random labels": Images.randomly_labelled,
    "renamed classes": Images.permuted_classes,
}
PRESETS: dict[str, dict[str, Any]] = {
    "quick": {
        "data": {"train": 100, "test": 50},
        "network": {"width": 16, "depth": 3},
        "tasks": 2,
        "recipe": {"epochs": 2, "batch": 50, "rate": 3e-3},
        "methods": ["none", "spectral"],
    },
    "digits": {
        "data": {"train": 200},
        "network": {"width": 64, "depth": 4},
        "tasks": 30,
        "recipe": {"epochs": 50, "batch": 50, "rate": 3e-3},
        "methods": list(METHODS),
    },
    "small": {
        "data": {"train": 200, "test": 500, "side": 8},
        "network": {"width": 64, "depth": 4},
        "tasks": 30,
        "recipe": {"epochs": 50, "batch": 50, "rate": 3e-3},
        "methods": list(METHODS),
    },
    "full": {
        "data": {"train": 12800},
        "network": {"width": 256, "depth": 4},
        "tasks": 200,
        "recipe": {"epochs": 20, "batch": 128, "rate": 1e-3},
        "methods": list(METHODS),
    },
}


def jobs(sizes: Mapping[str, Any]) -> list[Job]:
    """Every method on both kinds of tasks."""
    return [Job(tasks, name, METHODS[name]) for tasks in TASKS for name in sizes["methods"]]


def run(job: Job, context: Context) -> dict[str, Any]:
    """One sequence; the optimizer begins anew with each task."""
    settings, sizes, images = job.settings, context.sizes, context.data.standardised()
    torch.manual_seed(context.seed)
    network = networks.mlp(images.shape, images.classes, **sizes["network"]).to(context.device)
    rule = None
    if "strength" in settings:
        rule = specops.SpectralNormPenalty(settings["strength"], norm="reshaped")
    recipe = classify.Recipe(
        adam=True, milestones=(), decay=settings.get("decay", 0.0),
        measure_every=sizes["recipe"]["epochs"], **sizes["recipe"],
    )  # fmt: skip
    curve = []
    for task in range(sizes["tasks"]):
        seed = 1000 * context.seed + task
        trained = classify.train(
            network, TASKS[job.experiment](images, seed), recipe, rule=rule, seed=seed
        )
        if trained.attachment is not None:
            trained.attachment.detach()
        weights = [p.detach() for p in network.parameters() if p.ndim > 1]
        curve.append({
            "task": task + 1,
            "accuracy": trained.last["train_accuracy"],
            "test_accuracy": trained.last["test_accuracy"],
            "largest_norm": max(float(specops.spectral_norm(w)) for w in weights),
            "dead": dead(network, images.x_train),
        })  # fmt: skip
        context.tick((task + 1) / sizes["tasks"])
    fifth = max(1, sizes["tasks"] // 5)
    return {
        "curve": curve,
        "early": mean([p["accuracy"] for p in curve[:fifth]]),
        "late": mean([p["accuracy"] for p in curve[-fifth:]]),
        "late_test": mean([p["test_accuracy"] for p in curve[-fifth:]]),
        "late_norm": mean([p["largest_norm"] for p in curve[-fifth:]]),
        "late_dead": mean([p["dead"] for p in curve[-fifth:]]),
    }


@torch.no_grad()
def dead(network: torch.nn.Sequential, x: torch.Tensor) -> float:
    """The share of rectified units that are zero on all images."""
    silent, units = 0, 0
    for layer in network:
        x = layer(x)
        if isinstance(layer, torch.nn.ReLU):
            silent, units = silent + int((x == 0).all(0).sum()), units + x.shape[1]
    return silent / units


def plot(found: list[records.Record], out: Path) -> list[Path]:
    """Accuracies by task and of late tasks, and norms, for both kinds of tasks."""
    by_kind = {kind: records.by_label(found, kind) for kind in TASKS}
    by_kind = {kind: runs for kind, runs in by_kind.items() if runs}
    figure, axes = figures.panels(3 * len(by_kind), columns=3, size=(3.6, 2.9))
    for row, (kind, runs) in enumerate(by_kind.items()):
        accuracy, late, norm = axes[3 * row : 3 * row + 3]
        figures.curves(accuracy, runs, "task", "accuracy", ("task", f"{kind}: training accuracy"))
        accuracy.legend(frameon=False, fontsize=7, loc="lower left")
        figures.bars(late, figures.values(runs, "late"), "the same, last fifth of the tasks")
        for axis in (accuracy, late):
            axis.set_ylim(0, 1.05)
        figures.curves(norm, runs, "task", "largest_norm", ("task", "largest norm of a layer"))
    return [plots.save(figure, out.parent / f"plasticity_{out.name}.png")]


PROGRAM = Program("plasticity", __doc__, PRESETS, jobs, run, plot, dict.fromkeys(TASKS, "late"))

if __name__ == "__main__":
    PROGRAM.main()
