"""Stable rank as a warning: does it fall before the loss rises, at a rate that is too high?

python examples/papers/early_warning.py --quick
python examples/papers/early_warning.py                  # descriptions of data sets, minutes
python examples/papers/early_warning.py --preset full --data DIR --device cuda
python examples/papers/early_warning.py plot

A transformer of characters. Ren et al. 2026, *MSign* (arXiv 2602.01734), see the stable rank of
weights decline before failures; here an alarm is a number of steps, at thresholds that were set on
the descriptions.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from harness import figures, records, text, transformer
from harness.program import Context, Job, Program
from torch.nn.functional import cross_entropy
from torch.nn.utils import clip_grad_norm_

import specops
from specops import plots

RISE, FALL, GROWTH = 1.1, 0.25, 3.0
"""Times the lowest loss so far; the stable rank at the start; the lowest gradient so far."""
PRESETS: dict[str, dict[str, Any]] = {
    "quick": {
        "data": {"characters": 4000},
        "network": {"width": 16, "depth": 1, "heads": 2},
        "length": 16,
        "batch": 8,
        "steps": 20,
        "warm": 10,
        "every": 5,
        "rates": [1e-3, 2e-1],
    },
    "digits": {
        "data": {},
        "network": {"width": 64, "depth": 3, "heads": 4},
        "length": 64,
        "batch": 16,
        "steps": 400,
        "warm": 50,
        "every": 10,
        "rates": [1e-3, 1e-2, 3e-2, 2e-1],
    },
    "small": {
        "data": {},
        "network": {"width": 64, "depth": 3, "heads": 4},
        "length": 64,
        "batch": 16,
        "steps": 400,
        "warm": 50,
        "every": 10,
        "rates": [1e-3, 1e-2, 3e-2, 2e-1],
    },
    "full": {
        "data": {},
        "network": {"width": 256, "depth": 6, "heads": 8},
        "length": 256,
        "batch": 64,
        "steps": 5000,
        "warm": 100,
        "every": 10,
        "rates": [3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 2e-1],
    },
}


def jobs(sizes: Mapping[str, Any]) -> list[Job]:
    """One for each learning rate."""
    return [Job("rates", f"rate {rate:g}", {"rate": rate}) for rate in sizes["rates"]]


def run(job: Job, context: Context) -> dict[str, Any]:
    """One run: Adam, the rate warmed up and then constant."""
    sizes, words = context.sizes, context.data
    torch.manual_seed(context.seed)
    network = transformer.Transformer(len(words.symbols), sizes["length"], **sizes["network"]).to(
        context.device
    )
    optimizer = torch.optim.Adam(network.parameters(), job.settings["rate"])
    warm = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / sizes["warm"])
    )
    attachment = specops.attach(optimizer, network, specops.Monitor(), every=sizes["every"])
    start = {n: float(specops.stable_rank(w.detach())) for n, w in attachment.weights().items()}
    inputs, targets = words.windows("train", 4 * sizes["batch"], sizes["length"], context.seed)
    curve, gradients = [], []
    for step in range(1, sizes["steps"] + 1):
        x, y = words.windows("train", sizes["batch"], sizes["length"], context.seed * 10**6 + step)
        loss = cross_entropy(network(x).flatten(0, 1), y.flatten())
        optimizer.zero_grad()
        loss.backward()
        gradients.append(float(clip_grad_norm_(network.parameters(), math.inf)))
        if not math.isfinite(loss.item() + gradients[-1]):
            curve.append({**curve[-1], "step": step, "loss": math.inf})
            break
        optimizer.step()
        warm.step()
        if step % sizes["every"] == 0:
            latest = attachment.history[-len(start) :]
            shares = [r["stable_rank"] / start[r["name"]] for r in latest]
            with torch.no_grad():
                fixed = cross_entropy(network(inputs).flatten(0, 1), targets.flatten())
            curve.append({
                "step": step,
                "loss": float(fixed),
                "gradient": float(np.mean(gradients[-sizes["every"] :])),
                "rank": float(np.exp(np.mean(np.log(shares)))),
                "lowest_rank": min(shares),
                "largest_norm": max(r["spectral_norm"] for r in latest),
            })  # fmt: skip
            context.tick(step / sizes["steps"])
    return {**alarms(curve, sizes["steps"]), "curve": curve}


def alarms(curve: Sequence[Mapping[str, float]], steps: int) -> dict[str, float | None]:
    """When the loss rose, and how many steps before it each alarm rang; negative: after it.

    An alarm that never rang counts as having rung after the last step.
    """
    rise = first(curve, "loss", lambda value, lowest: value > RISE * lowest)
    rang = {
        "rank": first(curve, "rank", lambda value, _: value < FALL),
        "gradient": first(curve, "gradient", lambda value, lowest: value > GROWTH * lowest),
    }
    found: dict[str, float | None] = {
        "final_loss": curve[-1]["loss"],
        "lowest_rank": min(point["rank"] for point in curve),
        "loss_rose": float(rise is not None),
        "rise": rise,
    }
    for name, step in rang.items():
        found[f"{name}_alarm"] = float(step is not None)
        found[f"{name}_lead"] = None if rise is None else rise - (step or steps + 1)
    return found


def first(
    curve: Sequence[Mapping[str, float]], key: str, is_so: Callable[[float, float], bool]
) -> float | None:
    """The step at which a figure and its lowest so far first fulfil a condition."""
    lowest = math.inf
    for point in curve:
        lowest = min(lowest, point[key])
        if is_so(point[key], lowest):
            return point["step"]
    return None


def plot(found: list[records.Record], out: Path) -> list[Path]:
    """Loss, stable rank and gradients by step; the steps between."""
    runs = records.by_label(found, "rates")
    figure, (loss, rank, gradient, lead) = figures.panels(4)
    figures.curves(loss, runs, "step", "loss", ("step", "loss of a fixed part of the text"))
    figures.curves(rank, runs, "step", "rank", ("step", "stable rank: share of that at the start"))
    gradient.set(yscale="log")
    figures.curves(gradient, runs, "step", "gradient", ("step", "norm of the gradient"))
    loss.legend(frameon=False, fontsize=7)
    rank.axhline(FALL, color="black", linewidth=0.8, linestyle=":")
    leads = {
        f"{which}, {name}": values
        for name, records_ in runs.items()
        for which in ("rank", "gradient")
        for values in figures.values({name: records_}, f"{which}_lead").values()
    }
    if leads:
        figures.bars(lead, leads, "steps of warning (below 0: too late)")
        lead.axhline(0, color="black", linewidth=0.8)
    lead.set_visible(bool(leads))
    return [plots.save(figure, out.parent / f"early_warning_{out.name}.png")]


PROGRAM = Program(
    "early_warning", __doc__, PRESETS, jobs, run, plot, {"rates": "rank_lead"},
    load=text.load, dataset="tinyshakespeare", suffix="txt",
)  # fmt: skip

if __name__ == "__main__":
    PROGRAM.main()
