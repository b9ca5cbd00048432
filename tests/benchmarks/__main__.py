"""Run the benchmarks whose names are given, or all."""

from __future__ import annotations

import argparse

from tests.benchmarks import (
    busy,
    conv,
    distributed,
    imports,
    inspection,
    padded,
    project,
    step,
    training,
)
from tests.benchmarks.harness import environment

BENCHMARKS = {
    "busy": busy.run,
    "conv": conv.run,
    "distributed": distributed.run,
    "import": imports.run,
    "inspect": inspection.run,
    "padded": padded.run,
    "project": project.run,
    "step": step.run,
    "training": training.run,
}


def main() -> None:
    """Print one table per benchmark."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(BENCHMARKS))
    parser.add_argument("--repeats", type=int, default=7, help="pairs of runs per row")
    parser.add_argument("--quick", action="store_true", help="smallest cases, two pairs")
    options = parser.parse_args()
    unknown = set(options.names) - set(BENCHMARKS)
    if unknown:
        parser.error(f"no benchmark called {', '.join(sorted(unknown))}: {', '.join(BENCHMARKS)}")
    print(environment())
    for name in options.names or BENCHMARKS:
        BENCHMARKS[name](2 if options.quick else options.repeats, options.quick)


if __name__ == "__main__":
    main()
