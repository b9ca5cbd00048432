"""Sedghi, Gupta & Long 2019: spectra of convolutions, and clipping them during training.

python examples/papers/sedghi.py --quick
python examples/papers/sedghi.py                       # digits, minutes on 2 cores
python examples/papers/sedghi.py --preset full --data DIR --device cuda
python examples/papers/sedghi.py plot
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from harness import classify, figures, networks, records
from harness.program import Context, Job, Program

import specops
from specops import plots

CLIPS: dict[str, dict[str, Any]] = {
    "none": {},
    "operator 0.1": {"rule": "operator", "bound": 0.1},
    "operator 0.5": {"rule": "operator", "bound": 0.5},
    "operator 1.0": {"rule": "operator", "bound": 1.0},
    "reshaped 0.2": {"rule": "reshaped", "bound": 0.2},
    "reshaped 0.5": {"rule": "reshaped", "bound": 0.5},
    "one round 0.5": {"rule": "one round", "bound": 0.5},
}
PRESETS = {
    "quick": {
        "data": {"train": 200, "test": 100},
        "network": {"depth": 8, "width": 4},
        "recipe": {"epochs": 2},
        "every": 3,
        "rates": [0.1],
        "grids": [4],
        "channels": 3,
        "clips": ["none", "operator 0.5", "reshaped 0.5", "one round 0.5"],
    },
    "digits": {
        "data": {},
        "network": {"depth": 8, "width": 8},
        "recipe": {"epochs": 10, "decay": 2e-4},
        "every": 10,
        "rates": [0.01, 0.03, 0.1, 0.3],
        "grids": [4, 8, 16],
        "channels": 8,
        "clips": list(CLIPS),
    },
    "small": {
        "data": {"train": 1500, "test": 2000, "side": 8},
        "network": {"depth": 8, "width": 8},
        "recipe": {"epochs": 8, "decay": 2e-4, "measure_every": 2},
        "every": 23,
        "rates": [0.01, 0.1, 0.3],
        "grids": [4, 8, 12],
        "channels": 8,
        "clips": [c for c in CLIPS if c != "reshaped 0.5"],
    },
    "full": {
        "data": {},
        "network": {"depth": 32, "width": 32},
        "recipe": {
            "epochs": 250, "batch": 128, "decay": 2e-4, "augment": True, "measure_every": 5,
        },
        "every": 100,
        "rates": [0.01, 0.03, 0.1, 0.2, 0.3],
        "grids": [8, 16, 32],
        "channels": 16,
        "clips": list(CLIPS),
    },
}  # fmt: skip


def jobs(sizes: Mapping[str, Any]) -> list[Job]:
    """Clipping with and without batch norm, over learning rates, and times of the spectrum."""
    found = [Job("clipping", c, {**CLIPS[c], "norm": True, "rate": 0.1}) for c in sizes["clips"]]
    some = [c for c in sizes["clips"] if c in ("none", "operator 0.5", "operator 1.0")]
    for norm in (True, False):
        name = "rates, batch norm" if norm else "rates, no batch norm"
        for rate in sizes["rates"]:
            for clip in some:
                settings = {**CLIPS[clip], "norm": norm, "rate": rate}
                if not norm or rate != 0.1:  # with batch norm 0.1 is above
                    found.append(Job(name, f"{clip}, rate {rate:g}", settings))
    found += [Job("time", f"{n}×{n}", {"grid": n}) for n in sizes["grids"]]
    return found


def run(job: Job, context: Context) -> dict[str, Any]:
    """One run."""
    if job.experiment == "time":
        return spectrum_times(job.settings["grid"], context)
    settings, sizes, images = job.settings, context.sizes, context.data.standardised()
    torch.manual_seed(context.seed)
    network = networks.resnet(
        images.shape[0], images.classes, norm=settings["norm"], **sizes["network"]
    ).to(context.device)
    rule = rule_of(settings, network)
    recipe = classify.Recipe(rate=settings["rate"], settle=True, **sizes["recipe"])
    trained = classify.train(
        network, images, recipe, rule=rule, every=sizes["every"], seed=context.seed,
        tick=context.tick,
    )  # fmt: skip
    found = {
        "test_error": 1 - trained.last["test_accuracy"],
        "train_accuracy": trained.last["train_accuracy"],
        "training_seconds": trained.seconds,
        "curve": [{**p, "test_error": 1 - p["test_accuracy"]} for p in trained.curve],
    }
    if job.experiment == "clipping":
        found |= spectra(trained, images.x_train)
    return found


def rule_of(settings: Mapping[str, Any], network: torch.nn.Module) -> specops.Plan | None:
    """The convolutions' rule; the head is left alone, as in the paper."""
    if "rule" not in settings:
        return None
    bound = settings["bound"]
    rule = {
        "operator": lambda: specops.ClipSpectralNorm(bound),
        "reshaped": lambda: specops.ClipSpectralNorm(bound, norm="reshaped"),
        "one round": lambda: specops.ClipAndCut(bound),
    }[settings["rule"]]()
    return specops.Plan([("*conv*", rule), ("*", None)])


def spectra(trained: classify.Trained, x: torch.Tensor) -> dict[str, Any]:
    """Of every convolution on the torus of its input, as the paper computes them."""
    weights, maps = classify.weights_of(trained, x)
    found, norms = {}, {}
    for name in networks.convolutions(trained.network):
        w, geometry = weights[name], maps[name]
        norms[name] = float(specops.spectral_norm(w, geometry))
        torus = specops.Conv(geometry.grid, stride=geometry.stride, boundary="circular")
        found[name] = records.quantiles(specops.singular_values(w, torus).cpu())
    return {"largest_norm": max(norms.values()), "norms": norms, "spectra": found}


def spectrum_times(n: int, context: Context) -> dict[str, float]:
    """Seconds for all singular values of a 3×3 convolution on an n×n torus (figure 1)."""
    channels = context.sizes["channels"]
    kernel = np.random.default_rng(context.seed).standard_normal((channels, channels, 3, 3))
    torus = specops.Conv((n, n), boundary="circular")

    def explicit() -> np.ndarray:
        operator = specops.linear_operator(kernel, torus)
        size = channels * n * n
        return np.linalg.svd(operator @ np.eye(size), compute_uv=False)

    def two_lines() -> np.ndarray:
        transform = np.fft.fft2(kernel, (n, n), axes=(2, 3)).transpose(2, 3, 0, 1)
        return np.linalg.svd(transform, compute_uv=False)

    tensor = torch.as_tensor(kernel, device=context.device)
    methods = {
        "explicit": explicit,
        "numpy": two_lines,
        "specops_numpy": lambda: specops.singular_values(kernel, torus),
        "specops_torch": lambda: specops.singular_values(tensor, torus).cpu().numpy(),
    }
    try:
        import jax

        at_jax = jax.numpy.asarray(kernel)
        methods["specops_jax"] = lambda: np.asarray(specops.singular_values(at_jax, torus))
    except ImportError:
        pass
    found, reference = {}, np.sort(explicit())
    for name, method in methods.items():
        values = np.sort(np.ravel(method()))
        np.testing.assert_allclose(values, reference, atol=1e-4 * reference[-1])
        times = []
        for _ in range(3):
            began = time.perf_counter()
            method()
            times.append(time.perf_counter() - began)
        found[name] = min(times)
    return found


def plot(found: list[records.Record], out: Path) -> list[Path]:
    """Figures 1 to 7, as far as there are records."""
    drawn = []
    clipping = records.by_label(found, "clipping")
    if clipping:
        figure, (bar, loss, over_time, spectrum) = figures.panels(4)
        figures.bars(bar, figures.values(clipping, "test_error"), "test error")
        labels = ("epoch", "training loss")
        figures.curves(loss, clipping, "epoch", "train_loss", labels)
        figures.curves(
            over_time, clipping, "seconds", "test_error", ("seconds of training", "test error")
        )
        loss.legend(frameon=False, fontsize=7)
        loss.set_ylim(bottom=0)
        over_time.set(xscale="log")
        of_runs = {n: runs[0]["results"]["spectra"] for n, runs in clipping.items()}
        layer = next(name for name in of_runs["none"])
        plots.singular_values({n: s[layer] for n, s in of_runs.items()}, ax=spectrum)
        figures.of_quantiles(spectrum, layer)
        drawn.append(plots.save(figure, out.parent / f"sedghi_clipping_{out.name}.png"))
        figure, axes = figures.panels(2)
        for axis, scale in zip(axes, ("absolute", "normalized"), strict=True):
            plots.singular_values(of_runs["none"], scale=scale, ax=axis)
        figures.of_quantiles(axes[0], "Singular values, each layer")
        drawn.append(plots.save(figure, out.parent / f"sedghi_spectra_{out.name}.png"))
    rates = {
        title: records.by_label(found, f"rates, {title}")
        for title in ("batch norm", "no batch norm")
    }
    rates = {title: runs for title, runs in rates.items() if runs}
    if rates:
        figure, axes = figures.panels(len(rates))
        for axis, (title, runs) in zip(axes, rates.items(), strict=True):
            by_clip: dict[str, dict[float, list[float]]] = {}
            for label, values in figures.values(runs, "test_error").items():
                clip, rate = label.split(", rate ")
                by_clip.setdefault(clip, {})[float(rate)] = values
            for place, (clip, points) in enumerate(by_clip.items()):
                figures.line(axis, list(points), list(points.values()), clip, place)
            axis.set(xscale="log", title=title)
            axis.set_xlabel("learning rate", fontsize=8.5)
            axis.set_ylabel("test error", fontsize=8.5)
        axes[0].legend(frameon=False, fontsize=7)
        drawn.append(plots.save(figure, out.parent / f"sedghi_rates_{out.name}.png"))
    times = records.by_label(found, "time")
    if times:
        figure, (axis,) = figures.panels(1)
        grids = [runs[0]["settings"]["grid"] for runs in times.values()]
        for place, method in enumerate(next(iter(times.values()))[0]["results"]):
            seconds = list(figures.values(times, method).values())
            centre = [figures.mean(v) for v in seconds]
            color = figures.COLORS[place]
            axis.plot(grids, centre, "o-", color=color, label=method.replace("_", ", "))
        axis.set(yscale="log")
        axis.set_xlabel("side of the input", fontsize=8.5)
        axis.set_ylabel("seconds for all singular values", fontsize=8.5)
        axis.legend(frameon=False, fontsize=7)
        drawn.append(plots.save(figure, out.parent / f"sedghi_time_{out.name}.png"))
    return drawn


PROGRAM = Program(
    "sedghi", __doc__, PRESETS, jobs, run, plot,
    {"clipping": "test_error", "rates, batch norm": "test_error",
     "rates, no batch norm": "test_error", "time": "specops_numpy"},
)  # fmt: skip

if __name__ == "__main__":
    PROGRAM.main()
