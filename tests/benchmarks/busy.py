"""What public functions take beside two busy processes, such as data loaders, over what they take
alone: with as many cores, half the machine is lost, and a factor of two with it.
"""

from __future__ import annotations

import contextlib
import io
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

import specops
from specops import Conv, Dense
from specops.cli import main
from tests.benchmarks.harness import milliseconds, seconds_of

BUSY = 2
ALLOWED = 4.0
_SECONDS, _LONG = 0.3, 1.0
"""Each case runs so long on either side, after a run that does not count, and three times at least;
once where it takes longer than a second."""
_SPIN = "print('on', flush=True)\nwhile True:\n    sum(range(10000))\n"


def run(repeats: int, quick: bool) -> None:
    """Print seconds alone and beside, and their ratio."""
    del repeats
    table = Table(title=f"beside {BUSY} busy processes", title_justify="left", title_style="bold")
    for header in ("case", "alone", "beside", "ratio"):
        table.add_column(header, justify="left" if header == "case" else "right")
    with tempfile.TemporaryDirectory() as folder:
        cases = _cases(Path(folder), quick)
        alone = {name: _median(function, quick) for name, function in cases.items()}
        with _busy():
            beside = {name: _median(function, quick) for name, function in cases.items()}
    ratios = {name: beside[name] / alone[name] for name in cases}
    for name, ratio in ratios.items():
        mark = " !" if ratio > ALLOWED else ""
        seconds = (milliseconds(side[name]) for side in (alone, beside))
        table.add_row(name, *seconds, f"{ratio:.2f}{mark}")
    table.caption = (
        f"median {statistics.median(ratios.values()):.2f}, greatest {max(ratios.values()):.2f}, "
        f"allowed {ALLOWED:.0f}"
    )
    table.caption_justify = "left"
    Console(width=100).print(table)


@contextlib.contextmanager
def _busy() -> Iterator[None]:
    running = []
    try:
        for _ in range(BUSY):
            command = [sys.executable, "-c", _SPIN]
            running.append(subprocess.Popen(command, stdout=subprocess.PIPE))
        for process in running:
            assert process.stdout is not None
            process.stdout.readline()
        yield
    finally:
        for process in running:
            process.kill()
            process.communicate()


def _median(function: Callable[[], Any], quick: bool) -> float:
    first = seconds_of(function)
    if quick or first > _LONG:
        return first
    times: list[float] = []
    while len(times) < 3 or sum(times) < _SECONDS:
        times.append(seconds_of(function))
    return statistics.median(times)


def _cases(folder: Path, quick: bool) -> dict[str, Callable[[], Any]]:
    cases: dict[str, Callable[[], Any]] = {}
    for library, convert in _libraries().items():
        weights = {k: (convert(w), g) for k, (w, g) in _weights().items()}
        for label, (w, geometry) in weights.items():
            limit = 0.9 * float(specops.spectral_norm_bounds(w, geometry).lower.max())
            for name, function in _functions(label, limit).items():
                if quick and label != "48×48":
                    continue
                call = lambda f=function, w=w, g=geometry: f(w, g)  # noqa: E731
                cases[f"{library}, {label}: {name}"] = call
    path = folder / "network.npz"
    np.savez(path, **_network(1 if quick else 10))
    sizes = {"sizes unknown": []} if quick else {"sizes unknown": [], "32×32": ["32x32"]}
    for label, size in sizes.items():
        arguments = ["inspect", str(path), "--json", *(["--input-size", *size] if size else [])]
        cases[f"inspect, {label}"] = lambda a=arguments: _silent(a)
    return cases


def _libraries() -> dict[str, Callable[[np.ndarray], Any]]:
    libraries: dict[str, Callable[[np.ndarray], Any]] = {"NumPy": lambda w: w}
    with contextlib.suppress(ImportError):
        import torch

        libraries["torch"] = torch.from_numpy
    return libraries


def _weights() -> dict[str, tuple[np.ndarray, Any]]:
    rng = np.random.default_rng(0)

    def normal(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape, dtype=np.float32)

    return {
        "48×48": (normal(48, 48), Dense()),
        "256×256": (normal(256, 256), Dense()),
        "32 of 64×64": (normal(32, 64, 64), Dense(out_axes=(1,), batch_axes=(0,))),
        "circular 3×3, 16 channels, 32×32": (
            normal(16, 16, 3, 3),
            Conv((32, 32), boundary="circular"),
        ),
        "circular 3×3, 64 channels, 8×8": (normal(64, 64, 3, 3), Conv((8, 8), boundary="circular")),
        "zeros 3×3, 32 channels, 8×8": (normal(32, 32, 3, 3), Conv((8, 8), padding=1)),
        "zeros 3×3, 32 channels, any size": (normal(32, 32, 3, 3), Conv(None, padding=1)),
    }


def _functions(label: str, limit: float) -> dict[str, Callable[[Any, Any], Any]]:
    measured: dict[str, Callable[[Any, Any], Any]] = {
        "bounds": specops.spectral_norm_bounds,
        "norm": specops.spectral_norm,
        "stable rank": specops.stable_rank,
    }
    exact: dict[str, Callable[[Any, Any], Any]] = {
        "values": specops.singular_values,
        "effective rank": specops.effective_rank,
        "project onto the ball": lambda w, g: specops.project_spectral_ball(
            w, limit, g, distance_tolerance=0.1
        ),
    }
    if label.endswith("any size"):
        return {"bounds": specops.spectral_norm_bounds}
    if label.startswith("zeros"):
        return measured
    if label.startswith("circular"):
        return measured | exact
    only = {
        "project the stable rank": lambda w, g: specops.project_stable_rank(w, g, target=4.0),
        "triplets": lambda w, g: specops.top_singular_triplets(w, 2, g),
        "polar factor": specops.polar_factor,
        "clip": lambda w, g: specops.clip_singular_values(w, 0.0, 4.0, g),
    }
    return measured | exact | only


def _network(depth: int) -> dict[str, np.ndarray]:
    """Three stages of so many layers, 0.47 million parameters of ten, and a head."""
    rng = np.random.default_rng(0)
    widths = [3, 16, *(n for n in (16, 32, 64) for _ in range(depth))]
    layers = {
        f"layers.{i}.weight": rng.standard_normal((o, n, 3, 3), dtype=np.float32) / np.sqrt(9 * n)
        for i, (n, o) in enumerate(pairwise(widths))
    }
    return layers | {"head.weight": rng.standard_normal((10, 64), dtype=np.float32)}


def _silent(arguments: list[str]) -> None:
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        status = main(arguments)
    assert status == 0
