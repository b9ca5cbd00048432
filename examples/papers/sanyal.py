"""Sanyal, Torr & Dokania 2020: normalising the stable rank.

python examples/papers/sanyal.py --quick
python examples/papers/sanyal.py                        # digits, minutes on 2 cores
python examples/papers/sanyal.py --preset full --data DIR --device cuda
python examples/papers/sanyal.py plot
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from harness import adversarial, classify, figures, gan_networks, networks, records, scores
from harness.program import Context, Job, Program

import specops
import specops_torch
from specops import measures, plots

RULES: dict[str, float | str] = {"vanilla": "none", "SN": 1.0, "SRN-50": 0.5, "SRN-30": 0.3}
PRESETS: dict[str, dict[str, Any]] = {
    "quick": {
        "data": {"train": 200, "test": 100},
        "network": {"depth": 8, "width": 4},
        "recipe": {"epochs": 1, "batch": 50},
        "random": {"epochs": 1, "batch": 50, "rate": 0.01},
        "measured": 50,
        "gan_networks": "small",
        "gan": {"steps": 10, "batch": 16},
        "gan_width": 0.1,
        "judge": {"width": 4, "epochs": 1},
        "samples": 100,
        "rules": ["vanilla", "SRN-30"],
        "ratios": [0.5],
        "decays": [0.0],
    },
    "digits": {
        "data": {},
        "network": {"depth": 8, "width": 8},
        "recipe": {"epochs": 10, "decay": 5e-4},
        "random": {"epochs": 30, "rate": 0.01, "measure_every": 10},
        "measured": 300,
        "gan_networks": "small",
        "gan": {"steps": 1000, "rate_g": 1e-3, "rate_d": 1e-3},
        "gan_width": 0.25,
        "judge": {"width": 8, "epochs": 15},
        "samples": 400,
        "rules": list(RULES),
        "ratios": [0.9, 0.7, 0.5, 0.3, 0.1],
        "decays": [0.0, 5e-4],
    },
    "small": {
        "data": {"train": 1000, "test": 1000, "side": 8},
        "network": {"depth": 8, "width": 8},
        "recipe": {"epochs": 8, "decay": 5e-4, "measure_every": 4},
        "random": {"epochs": 10, "rate": 0.01, "measure_every": 10},
        "measured": 100,
        "gan_networks": "small",
        "gan": {"steps": 300, "rate_g": 1e-3, "rate_d": 1e-3},
        "gan_width": 0.125,
        "judge": {"width": 8, "epochs": 4},
        "samples": 500,
        "rules": list(RULES),
        "ratios": [0.7, 0.3, 0.1],
        "decays": [0.0, 5e-4],
    },
    "full": {
        "data": {},
        "network": {"depth": 110, "width": 16},
        "recipe": {
            "epochs": 200, "batch": 128, "decay": 5e-4, "augment": True, "measure_every": 10,
        },
        "random": {"epochs": 200, "batch": 128, "rate": 0.01, "measure_every": 20},
        "measured": 2000,
        "gan_networks": "residual",
        "gan": {"steps": 100_000, "latent": 128, "n_dis": 5},
        "gan_width": 1.0,
        "judge": {"width": 64, "epochs": 50},
        "samples": 10_000,
        "rules": list(RULES),
        "ratios": [0.9, 0.7, 0.5, 0.3, 0.1],
        "decays": [0.0, 5e-4],
    },
}  # fmt: skip


def jobs(sizes: Mapping[str, Any]) -> list[Job]:
    """Classification, random labels with and without weight decay, GANs."""
    found = [Job("clean labels", name, {"ratio": RULES[name]}) for name in sizes["rules"]]
    for decay in sizes["decays"]:
        for name in sizes["rules"]:
            settings = {"ratio": RULES[name], "decay": decay}
            experiment = "random labels, " + ("weight decay" if decay else "no weight decay")
            found.append(Job(experiment, name, settings))
    found.append(Job("GAN", "SN", {"ratio": 1.0}))
    return found + [Job("GAN", f"SRN-{100 * c:.0f}", {"ratio": c}) for c in sizes["ratios"]]


def rule_of(ratio: float | str) -> Any:
    """All layers': spectral normalisation where the rank is not limited."""
    if ratio == "none":
        return None
    if ratio == 1.0:
        return specops.SpectralNormalization(norm="reshaped")
    return specops.StableRankNormalization(float(ratio), norm="reshaped")


def run(job: Job, context: Context) -> dict[str, Any]:
    """One run."""
    if job.experiment == "GAN":
        return run_gan(job, context)
    settings, sizes, images = job.settings, context.sizes, context.data.standardised()
    clean = job.experiment == "clean labels"
    if not clean:
        images = images.randomly_labelled(context.seed)
    torch.manual_seed(context.seed)
    network = networks.resnet(images.shape[0], images.classes, norm=True, **sizes["network"])
    network = network.to(context.device)
    options = sizes["recipe"] if clean else {**sizes["random"], "decay": settings["decay"]}
    trained = classify.train(
        network, images, classify.Recipe(**options), rule=rule_of(settings["ratio"]),
        seed=context.seed, tick=context.tick,
    )  # fmt: skip
    found = {**trained.last, "train_error": 1 - trained.last["train_accuracy"]}
    if clean:
        found |= complexities(trained, images, sizes["measured"])
    return {**found, "curve": trained.curve, "training_seconds": trained.seconds}


def complexities(trained: classify.Trained, images: Any, count: int) -> dict[str, Any]:
    """The three of the paper, of the weights in use; Lipschitz ratios; noise sensitivity."""
    network, x, y = trained.network, images.x_test[:count], images.y_test[:count]
    weights, maps = classify.weights_of(trained, x)
    with torch.no_grad():
        logits = network(x)
    margins = measures.margins(logits, y)
    right = margins > 0
    matrices = [w.flatten(1) for w in weights.values()]
    spec_fro = measures.log_spec_fro(matrices, margins)[right]
    spec_l1 = measures.log_spec_l1(
        list(weights.values()), margins, [maps[name] for name in weights]
    )[right]
    hidden, jacobians, margin = specops_torch.margin_jacobians(network, x, y)
    jac_norm = measures.log_jac_norm(hidden, jacobians, margin)[right]
    with torch.no_grad():
        noise = measures.noise_sensitivity(lambda v: network(v), x)
    ratios = measures.lipschitz_ratios(x, logits)
    found = {"spec_fro": spec_fro, "spec_l1": spec_l1, "jac_norm": jac_norm}
    return {
        **{f"{name}_90": float(values.double().quantile(0.9)) for name, values in found.items()},
        "complexities": {name: records.quantiles(v.cpu()) for name, v in found.items()},
        "noise_sensitivity": float(noise.median()),
        "lipschitz_95": float(ratios.quantile(0.95)),
    }


def run_gan(job: Job, context: Context) -> dict[str, Any]:
    """Scores, neural divergence, and empirical Lipschitz constants of the discriminator."""
    sizes, images = context.sizes, context.data.symmetric()
    recipe = adversarial.Recipe(**sizes["gan"], measure_every=sizes["gan"]["steps"])
    judge = scores.judge_of(context.data, **sizes["judge"])
    width = sizes["gan_width"]
    makers = gan_networks.makers(
        sizes["gan_networks"], images.shape, recipe.latent, images.classes, width
    )
    torch.manual_seed(context.seed)
    game = adversarial.train(
        makers.generator().to(context.device), makers.discriminator().to(context.device),
        images.x_train, recipe, labels=images.y_train if makers.conditional else None,
        rule=rule_of(job.settings["ratio"]), seed=context.seed, tick=context.tick,
    )  # fmt: skip
    generated, labels = game.images_and_labels(sizes["samples"])
    count = min(len(generated), len(images.x_test))
    generated, real = generated[:count], images.x_test[:count]
    with torch.no_grad():
        on_fake = game.discriminator(generated, *(y[:count] for y in labels))
        on_real = game.discriminator(real, *(images.y_test[:count] for _ in labels))
    within = measures.lipschitz_ratios(real, on_real)
    other = torch.randperm(count, generator=torch.Generator().manual_seed(0))
    apart = (real - generated[other]).flatten(1).norm(dim=1)
    across = (on_real - on_fake[other]).flatten(1).norm(dim=1) / apart
    divergence = specops_torch.neural_divergence(
        lambda: gan_networks.small_discriminator(images.shape, min(width, 0.25)),
        real, generated, steps=min(300, recipe.steps), seed=context.seed,
    )  # fmt: skip
    return {
        **judge.score(generated),
        "neural_divergence": divergence,
        "lipschitz_95": float(within.quantile(0.95)),
        "lipschitz_95_generated": float(across.quantile(0.95)),
        "lipschitz": records.quantiles(within.cpu(), 100),
        "judge_accuracy": judge.accuracy,
    }


def plot(found: list[records.Record], out: Path) -> list[Path]:
    """Figures 1 to 5, tables 1, 2 and 4."""
    drawn = []
    clean = records.by_label(found, "clean labels")
    if clean:
        random = {
            decay: records.by_label(found, f"random labels, {decay}")
            for decay in ("weight decay", "no weight decay")
        }
        bars = [
            (clean, "test_accuracy", "test accuracy"),
            *((r, "train_error", f"random labels: error, {d}") for d, r in random.items() if r),
            (clean, "noise_sensitivity", "noise sensitivity, median"),
            (clean, "lipschitz_95", "Lipschitz ratios, 95th percentile"),
        ]
        figure, axes = figures.panels(len(bars) + 1, columns=3, size=(3.6, 2.9))
        for axis, (runs, metric, label) in zip(axes, bars, strict=False):
            figures.bars(axis, figures.values(runs, metric), label)
        samples = {
            name: np.concatenate([r["results"]["complexities"]["jac_norm"] for r in runs])
            for name, runs in clean.items()
        }
        samples = {name: values for name, values in samples.items() if len(values)}
        if samples:
            plots.histogram(samples, kind="complexity", ax=axes[-1], percentiles=(90,))
            axes[-1].set_title("Jac-Norm, quantiles of all runs", fontsize=8.5, loc="left")
        drawn.append(plots.save(figure, out.parent / f"sanyal_classifiers_{out.name}.png"))
    gans = records.by_label(found, "GAN")
    if gans:
        figure, axes = figures.panels(4)
        figures.bars(axes[0], figures.values(gans, "fid"), "Fréchet distance, own features")
        figures.bars(axes[1], figures.values(gans, "neural_divergence"), "neural divergence")
        figures.bars(
            axes[2], figures.values(gans, "lipschitz_95"), "Lipschitz ratios, 95th percentile"
        )
        samples = {
            name: np.concatenate([r["results"]["lipschitz"] for r in runs])
            for name, runs in gans.items()
        }
        plots.histogram(samples, kind="lipschitz", ax=axes[3], percentiles=(95,))
        axes[3].set_title("Lipschitz ratios, quantiles of all runs", fontsize=8.5, loc="left")
        drawn.append(plots.save(figure, out.parent / f"sanyal_gans_{out.name}.png"))
    return drawn


PROGRAM = Program(
    "sanyal", __doc__, PRESETS, jobs, run, plot,
    {"clean labels": "test_accuracy", "random labels, no weight decay": "train_error",
     "random labels, weight decay": "train_error", "GAN": "lipschitz_95"},
)  # fmt: skip

if __name__ == "__main__":
    PROGRAM.main()
