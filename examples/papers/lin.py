"""Lin, Sekar & Fanti 2021: spectral normalisations of a GAN's discriminator.

    python examples/papers/lin.py --quick
    python examples/papers/lin.py                           # digits, minutes on 2 cores
    python examples/papers/lin.py --preset full --data DIR --device cuda
    python examples/papers/lin.py plot

Inception score and Fréchet distance are those of a classifier that is trained here on the same
images, not of Inception-v3, and compare with one another only.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from harness import adversarial, figures, gan_networks, records, scores
from harness.program import Context, Job, Program

import specops
from specops import plots

VARIANTS: dict[str, dict[str, Any]] = {
    "none": {},
    "SN_w": {"norm": "reshaped"},
    "SN_conv": {"norm": "operator"},
    "BSN": {"norm": "bidirectional"},
    "SSN 1.6": {"norm": "reshaped", "scale": 1.6},
    "BSSN 1.6": {"norm": "bidirectional", "scale": 1.6},
    "SN_w, same γ": {"norm": "reshaped", "trainable": "shared"},
    "SN_w, diff. γ": {"norm": "reshaped", "trainable": "each"},
}
SCALES = [0.5, 0.7, 1.0, 1.4, 2.0, 3.0, 4.0]
PRESETS: dict[str, dict[str, Any]] = {
    "quick": {
        "data": {"train": 200, "test": 200},
        "networks": "small",
        "width": 0.1,
        "recipe": {"steps": 12, "batch": 16, "measure_every": 6},
        "samples": 100,
        "judge": {"width": 4, "epochs": 1},
        "variants": ["SN_w", "BSN", "SN_w, same γ"],
        "scales": [],
    },
    "digits": {
        "data": {},
        "networks": "small",
        "width": 0.25,
        "recipe": {"steps": 1000, "rate_g": 1e-3, "rate_d": 1e-3, "measure_every": 200},
        "samples": 400,
        "judge": {"width": 8, "epochs": 15},
        "variants": list(VARIANTS),
        "scales": SCALES,
    },
    "small": {
        "data": {"train": 2000, "test": 500, "side": 8},
        "networks": "small",
        "width": 0.125,
        "recipe": {"steps": 300, "rate_g": 1e-3, "rate_d": 1e-3, "measure_every": 100},
        "samples": 500,
        "judge": {"width": 8, "epochs": 4},
        "variants": ["none", "SN_w", "SN_conv", "BSN"],
        "scales": [0.5, 4.0],
    },
    "full": {
        "data": {},
        "networks": "full",
        "width": 1.0,
        "recipe": {
            "steps": 400_000,
            "latent": 128,
            "rate_g": 1e-4,
            "rate_d": 1e-4,
            "measure_every": 10_000,
        },
        "samples": 10_000,
        "judge": {"width": 64, "epochs": 50},
        "variants": list(VARIANTS),
        "scales": SCALES,
    },
}


def jobs(sizes: Mapping[str, Any]) -> list[Job]:
    """The variants, and the sweep over scales."""
    found = [Job("variants", name, VARIANTS[name]) for name in sizes["variants"]]
    return found + [
        Job("scales", f"{s:g}", {"norm": "reshaped", "scale": s}) for s in sizes["scales"]
    ]


def rule_of(settings: Mapping[str, Any]) -> specops.SpectralNormalization | None:
    """The discriminator's rule."""
    if not settings:
        return None
    scale: Any = settings.get("scale", 1.0)
    if "trainable" in settings:
        scale = specops.TrainableScale(shared=settings["trainable"] == "shared")
    return specops.SpectralNormalization(norm=settings["norm"], scale=scale)


def run(job: Job, context: Context) -> dict[str, Any]:
    """One run."""
    sizes, images = context.sizes, context.data.symmetric()
    recipe = adversarial.Recipe(**sizes["recipe"])
    judge = scores.judge_of(context.data, **sizes["judge"])
    makers = gan_networks.makers(
        sizes["networks"], images.shape, recipe.latent, images.classes, sizes["width"]
    )
    labels = images.y_train if makers.conditional else None
    torch.manual_seed(context.seed)
    generator = makers.generator().to(context.device)
    discriminator = makers.discriminator().to(context.device)
    curve: list[dict[str, float]] = []
    layers: list[dict[str, float]] = []

    def observe(step: int, game: adversarial.Game) -> None:
        generated = game.images(sizes["samples"])
        x, y = images.x_train[: recipe.batch], None if labels is None else labels[: recipe.batch]
        norms = adversarial.gradients_by_weights_in_use(game, makers.discriminator, x, y)
        layers.append(norms)
        curve.append(
            {
                "step": step,
                **judge.score(generated),
                "log_gradient": math.log10(max(1e-12, sum(g**2 for g in norms.values()) ** 0.5)),
                "log_variances": adversarial.parameter_variances(game) / math.log(10),
            }
        )

    adversarial.train(
        generator, discriminator, images.x_train, recipe, labels=labels,
        rule=rule_of(job.settings), seed=context.seed, tick=context.tick, observe=observe,
    )  # fmt: skip
    last = curve[-1]
    gradients = torch.tensor([p["log_gradient"] for p in curve])
    return {
        **{key: last[key] for key in ("inception_score", "fid", "log_gradient", "log_variances")},
        "best_inception_score": max(p["inception_score"] for p in curve),
        "best_fid": min(p["fid"] for p in curve),
        "fid_rise_since_best": last["fid"] - min(p["fid"] for p in curve),
        "gradient_spread": float(gradients.std()) if len(curve) > 1 else 0.0,
        "judge_accuracy": judge.accuracy,
        "curve": curve,
        "gradients_by_layer": layers[-1],
    }


def plot(found: list[records.Record], out: Path) -> list[Path]:
    """Figures 4 to 9."""
    drawn = []
    runs = records.by_label(found, "variants")
    if runs:
        figure, axes = figures.panels(6, columns=3, size=(3.6, 2.9))
        figures.bars(
            axes[0], figures.values(runs, "inception_score"), "Inception score, own classifier"
        )
        figures.bars(axes[1], figures.values(runs, "fid"), "Fréchet distance, own features")
        step = "step of the generator"
        figures.curves(axes[2], runs, "step", "inception_score", (step, "Inception score"))
        figures.curves(axes[3], runs, "step", "fid", (step, "Fréchet distance"))
        label = "log₁₀ gradient norm, weights in use"
        figures.curves(axes[4], runs, "step", "log_gradient", (step, label))
        label = "log₁₀ product of variances"
        figures.curves(axes[5], runs, "step", "log_variances", (step, label))
        axes[2].legend(frameon=False, fontsize=7)
        drawn.append(plots.save(figure, out.parent / f"lin_variants_{out.name}.png"))
    sweep = {**records.by_label(found, "scales")}
    if sweep and "SN_w" in runs:
        sweep["1"] = runs["SN_w"]
        if "SSN 1.6" in runs:
            sweep["1.6"] = runs["SSN 1.6"]
        sweep = dict(sorted(sweep.items(), key=lambda item: float(item[0])))
        figure, axes = figures.panels(2)
        for axis, metric, label in zip(
            axes,
            ("best_inception_score", "best_fid"),
            ("best Inception score", "best Fréchet distance"),
            strict=True,
        ):
            values = figures.values(sweep, metric)
            centre = [figures.mean(v) for v in values.values()]
            half = [figures.half_interval(v) for v in values.values()]
            axis.errorbar([float(s) for s in values], centre, half, fmt="o-", capsize=3)
            axis.set(xscale="log")
            axis.minorticks_off()
            axis.set_xticks([float(s) for s in values], list(values))
            axis.set_xlabel("scale of SSN", fontsize=8.5)
            axis.set_ylabel(label, fontsize=8.5)
        drawn.append(plots.save(figure, out.parent / f"lin_scales_{out.name}.png"))
    return drawn


PROGRAM = Program(
    "lin", __doc__, PRESETS, jobs, run, plot, {"variants": "fid", "scales": "best_fid"}
)

if __name__ == "__main__":
    PROGRAM.main()
