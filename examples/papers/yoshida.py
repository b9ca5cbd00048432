"""Yoshida & Miyato 2017: a penalty on spectral norms, at small and large batches.

python examples/papers/yoshida.py --quick
python examples/papers/yoshida.py                       # digits, minutes on 2 cores
python examples/papers/yoshida.py --preset full --data DIR --device cuda
python examples/papers/yoshida.py plot
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from harness import classify, figures, networks, records
from harness.program import Context, Job, Program
from torch.nn.functional import cross_entropy

import specops
import specops_torch
from specops import measures, plots

METHODS: dict[str, dict[str, Any]] = {
    "vanilla": {},
    "decay": {"decay": 1e-4},
    "adversarial": {"alpha": 0.5, "epsilon": 1.0},
    "Jacobian": {"jacobian": 0.01},
    "spectral": {"strength": 0.01},
}
PRESETS: dict[str, dict[str, Any]] = {
    "quick": {
        "data": {"train": 200, "test": 100},
        "width": 4,
        "epochs": {"small": 1, "large": 2},
        "batch": {"small": 50, "large": 200},
        "rate": {"small": 0.05, "large": 0.2},
        "measure_every": 1,
        "measured": 50,
        "methods": ["vanilla", "adversarial", "Jacobian", "spectral"],
    },
    "digits": {
        "data": {},
        "width": 8,
        "epochs": {"small": 10, "large": 40},
        "batch": {"small": 64, "large": 1024},
        "rate": {"small": 0.05, "large": 0.4},
        "measure_every": 2,
        "measured": 200,
        "methods": list(METHODS),
    },
    "small": {
        "data": {"train": 1024, "test": 1000, "side": 8},
        "width": 8,
        "epochs": {"small": 8, "large": 16},
        "batch": {"small": 64, "large": 512},
        "rate": {"small": 0.05, "large": 0.4},
        "measure_every": 2,
        "measured": 100,
        "methods": list(METHODS),
    },
    "full": {
        "data": {},
        "width": 64,
        "epochs": {"small": 100, "large": 200},
        "batch": {"small": 64, "large": 4096},
        "rate": {"small": 0.1, "large": 1.0},
        "measure_every": 2,
        "measured": 1000,
        "methods": list(METHODS),
    },
}


def jobs(sizes: Mapping[str, Any]) -> list[Job]:
    """Every method at both batches."""
    return [
        Job(f"{batch} batch", name, {**METHODS[name], "batch": sizes["batch"][batch]})
        for batch in ("large", "small")
        for name in sizes["methods"]
    ]


def run(job: Job, context: Context) -> dict[str, Any]:
    """One run."""
    settings, sizes, images = job.settings, context.sizes, context.data.standardised()
    regime = job.experiment.split()[0]
    torch.manual_seed(context.seed)
    network = networks.vgg(images.shape[0], images.classes, width=sizes["width"])
    network = network.to(context.device)
    rule = None
    if "strength" in settings:
        rule = specops.SpectralNormPenalty(settings["strength"], norm="reshaped")
    recipe = classify.Recipe(
        epochs=sizes["epochs"][regime],
        batch=settings["batch"],
        rate=sizes["rate"][regime],
        decay=settings.get("decay", 0.0),
        measure_every=sizes["measure_every"],
    )
    count = sizes["measured"]
    parts = {
        "train": (images.x_train[:count], images.y_train[:count]),
        "test": (images.x_test[:count], images.y_test[:count]),
    }

    def gradients(network: torch.nn.Module) -> dict[str, float]:
        return {
            f"gradient_{part}": classify.input_gradients(network, x, y)
            for part, (x, y) in parts.items()
        }

    trained = classify.train(
        network, images, recipe, rule=rule, loss=loss_of(settings), seed=context.seed,
        tick=context.tick, observe=gradients,
    )  # fmt: skip
    found = {"curve": trained.curve, **trained.last}
    found["gap"] = found["train_accuracy"] - found["test_accuracy"]
    found["training_seconds"] = trained.seconds
    for part, (x, y) in parts.items():
        found[f"sharpness_{part}"] = sharpness(network, x, y)
    weights = {n: p.detach() for n, p in network.named_parameters() if p.ndim > 1}
    reshaped = {n: w.flatten(1) for n, w in weights.items()}
    values = {n: specops.singular_values(w, specops.Dense()).cpu() for n, w in reshaped.items()}
    found["largest_norm"] = max(float(v[0]) for v in values.values())
    found["spectrum"] = records.quantiles(values["conv2_0.weight"])
    return found


def loss_of(settings: Mapping[str, Any]) -> classify.Loss:
    """What is minimised; the penalty on norms is a rule on gradients instead."""
    if "alpha" in settings:
        alpha, epsilon = settings["alpha"], settings["epsilon"]
        return lambda network, x, y: specops_torch.adversarial_loss(
            network, cross_entropy, x, y, alpha=alpha, epsilon=epsilon
        )
    if "jacobian" in settings:
        return lambda network, x, y: (
            classify.plain_loss(network, x, y)
            + settings["jacobian"] * specops_torch.jacobian_penalty(network, x)
        )
    return classify.plain_loss


def sharpness(network: torch.nn.Module, x: torch.Tensor, y: torch.Tensor) -> float:
    """The largest eigenvalue of the loss's Hessian."""
    operator = specops_torch.hessian_operator(
        lambda: cross_entropy(network(x), y), network.parameters()
    )
    return float(measures.spectrum_ends(operator, tolerance=0.02, max_steps=20).largest)


def gaps(runs: Mapping[str, list[records.Record]]) -> dict[str, list[float]]:
    """The gap at α, where α is the largest accuracy that every run of every method exceeds."""
    best = [
        max(p["test_accuracy"] for p in r["results"]["curve"]) for rs in runs.values() for r in rs
    ]
    alpha = min(best) - 1e-6
    return {
        name: [
            measures.generalization_gap(
                [p["train_accuracy"] for p in r["results"]["curve"]],
                [p["test_accuracy"] for p in r["results"]["curve"]],
                alpha,
            )
            for r in rs
        ]
        for name, rs in runs.items()
    }


def plot(found: list[records.Record], out: Path) -> list[Path]:
    """Table 1 as bars; figures 1 to 4."""
    drawn = []
    for regime in ("small", "large"):
        runs = records.by_label(found, f"{regime} batch")
        if not runs:
            continue
        figure, axes = figures.panels(6, columns=3, size=(3.6, 2.9))
        figures.bars(axes[0], figures.values(runs, "test_accuracy"), "test accuracy")
        figures.bars(axes[1], gaps(runs), "generalisation gap at α")
        epochs = "epoch"
        labels = (epochs, "accuracy: test, train (dotted)")
        figures.curves(axes[2], runs, "epoch", "test_accuracy", labels)
        solid = len(axes[2].lines)
        figures.curves(axes[2], runs, "epoch", "train_accuracy", labels)
        for line in axes[2].lines[solid:]:
            line.set(linestyle=":", label="_")
        axes[2].legend(frameon=False, fontsize=7)
        labels = (epochs, "‖∇x loss‖ on test images")
        figures.curves(axes[3], runs, "epoch", "gradient_test", labels)
        figures.bars(axes[4], figures.values(runs, "sharpness_train"), "top Hessian eigenvalue")
        spectra = {n: r[0]["results"]["spectrum"] for n, r in runs.items()}
        plots.singular_values(spectra, ax=axes[5])
        figures.of_quantiles(axes[5], "conv2_0 reshaped")
        figure.suptitle(f"batch of {next(iter(runs.values()))[0]['settings']['batch']}", fontsize=9)
        drawn.append(plots.save(figure, out.parent / f"yoshida_{regime}_{out.name}.png"))
    return drawn


PROGRAM = Program(
    "yoshida", __doc__, PRESETS, jobs, run, plot,
    {"small batch": "test_accuracy", "large batch": "test_accuracy"},
)  # fmt: skip

if __name__ == "__main__":
    PROGRAM.main()
