"""The command line of a program: which runs are left, and its figures."""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from . import records
from .data import load
from .statistics import mean, rounded, standard_error

RESULTS = Path(__file__).parents[1] / "results"


@dataclass(frozen=True)
class Job:
    """One setting of an experiment, run for each seed."""

    experiment: str
    label: str
    settings: dict[str, Any] = field(default_factory=dict)


class Data(Protocol):
    """What runs are on."""

    def describe(self) -> str:
        """What records say of it; its first word goes into the names of figures."""

    def to(self, device: str) -> Data:
        """The same on another device."""


@dataclass(frozen=True)
class Context:
    """What a run is given beside its settings."""

    data: Any
    """What the program's `load` gives."""
    sizes: Mapping[str, Any]
    seed: int
    device: str
    tick: Callable[[float], None]
    """Told the share of the run that is done."""


@dataclass(frozen=True)
class Program:
    """A program of a paper, or of a question."""

    paper: str
    about: str
    presets: Mapping[str, Mapping[str, Any]]
    """Sizes by name: "quick", "digits", "small", "full"; "data" in each are `load`'s."""
    jobs: Callable[[Mapping[str, Any]], Sequence[Job]]
    run: Callable[[Job, Context], dict[str, Any]]
    plot: Callable[[list[records.Record], Path], list[Path]]
    headline: Mapping[str, str]
    """The figure of each experiment that is printed."""
    load: Callable[..., Data] = load
    """Of a folder (None: what comes with a dependency), a data set's name, and sizes."""
    dataset: str = "cifar10"
    suffix: str = "npz"

    def main(self, arguments: Sequence[str] | None = None) -> list[records.Record]:
        """Run what is left, print, draw; the records of this preset."""
        options = self._parse(arguments)
        torch.set_num_threads(options.threads)
        sizes = self.presets[options.preset]
        path = options.results / f"{self.paper}.jsonl"
        console = Console()
        if options.action == "run":
            self._run(options, sizes, path, console)
        chosen = [
            r
            for r in records.read(path)
            if r["preset"] == options.preset or options.action != "run"
        ]
        if not chosen:
            raise SystemExit(f"no records in {path}: run first")
        console.print(self._table(chosen))
        if options.preset == "quick":
            console.print("quick: too few steps to compare settings by")
        for preset, data in dict.fromkeys((r["preset"], r["data"]) for r in chosen):
            of_these = [r for r in chosen if (r["preset"], r["data"]) == (preset, data)]
            for figure in self.plot(of_these, options.results / f"{preset}_{data.split()[0]}"):
                console.print(f"figure: {figure}", highlight=False, soft_wrap=True)
        return chosen

    def _run(
        self, options: argparse.Namespace, sizes: Mapping[str, Any], path: Path, console: Console
    ) -> None:
        data = self.load(options.data, options.dataset, **sizes["data"]).to(options.device)
        jobs = [
            job for job in self.jobs(sizes) if not options.only or job.experiment in options.only
        ]
        done = {records.key(r) for r in records.read(path)}
        plan = []
        for seed in range(options.first_seed, options.first_seed + options.seeds):
            for job in jobs:
                record = {
                    "paper": self.paper,
                    "experiment": job.experiment,
                    "label": job.label,
                    "settings": job.settings,
                    "preset": options.preset,
                    "data": data.describe(),
                    "seed": seed,
                }
                if records.key(record) not in done:
                    plan.append((job, record))
        columns = (TextColumn("{task.description:<44}"), BarColumn(), TimeElapsedColumn())
        began = time.monotonic()
        with Progress(*columns, console=console) as progress:
            whole = progress.add_task(f"{self.paper}: {len(plan)} runs left", total=len(plan))
            for job, record in plan:
                if options.stop_after and time.monotonic() - began > options.stop_after:
                    console.print("stopped: the same command goes on")
                    break
                name = f"{job.experiment}, {job.label}, seed {record['seed']}"
                task = progress.add_task(name, total=1.0)
                started = time.perf_counter()
                context = Context(
                    data,
                    sizes,
                    record["seed"],
                    options.device,
                    lambda share, task=task: progress.update(task, completed=share),
                )
                found = self.run(job, context)
                progress.remove_task(task)
                progress.advance(whole)
                record |= {
                    "command": self._command(options),
                    "hardware": records.hardware(options.device),
                    "seconds": time.perf_counter() - started,
                    "results": found,
                }
                records.append(path, record)

    def _command(self, options: argparse.Namespace) -> str:
        """What runs this again, without paths of a machine."""
        words = [f"python examples/papers/{self.paper}.py", f"--preset {options.preset}"]
        if options.data is not None:
            words += ["--data DIR", f"--dataset {options.dataset}"]
        return " ".join([*words, f"--seeds {options.seeds}"])

    def _table(self, chosen: Sequence[records.Record]) -> Table:
        table = Table(title=self.paper, title_justify="left")
        for name in ("experiment", "setting", "figure", "mean ± standard error", "seeds"):
            table.add_column(name)
        for experiment, metric in self.headline.items():
            for label, runs in records.by_label(chosen, experiment).items():
                values = [r["results"].get(metric) for r in runs]
                values = [v for v in values if v is not None]
                shown = rounded(mean(values), 4) if values else "–"
                if len(values) > 1:
                    shown += f" ± {rounded(standard_error(values), 2)}"
                table.add_row(experiment, label, metric, shown, str(len(values)))
        return table

    def _parse(self, arguments: Sequence[str] | None) -> argparse.Namespace:
        parser = argparse.ArgumentParser(
            description=self.about.splitlines()[0],
            formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        )
        add = parser.add_argument
        add("action", nargs="?", choices=("run", "plot"), default="run", help="plot: no new runs")
        add("--preset", choices=sorted(self.presets), default="digits", help="sizes")
        add("--quick", action="store_true", help="preset quick, one seed, a folder of its own")
        add(
            "--data",
            type=Path,
            metavar="DIR",
            help=f"of .{self.suffix} files, not the default data",
        )
        files = f"the files DATASET*.{self.suffix} of --data"
        add("--dataset", default=self.dataset, help=files)
        add("--seeds", type=int, default=3, help="runs of each setting")
        add("--first-seed", type=int, default=0, help="to divide the seeds over machines")
        add("--only", nargs="+", metavar="EXPERIMENT", help="these experiments alone")
        add("--stop-after", type=float, metavar="SECONDS", help="start no run after so long")
        add("--results", type=Path, default=RESULTS, help="folder of records and figures")
        add("--device", default="cpu", help="of torch")
        add("--threads", type=int, default=1, help="of torch on the CPU")
        options = parser.parse_args(arguments)
        if options.seeds < 1 or options.threads < 1:
            parser.error("--seeds and --threads must be at least 1")
        if options.quick:
            options.preset, options.seeds = "quick", 1
            if options.results == RESULTS:
                options.results = Path(tempfile.mkdtemp(prefix="papers-"))
        return options
