"""What `import specops` costs beyond its dependencies."""

from __future__ import annotations

import subprocess
import sys

from tests.benchmarks.harness import Results, pair


def _fresh(statement: str) -> None:
    subprocess.run([sys.executable, "-c", statement], check=True)


def run(repeats: int, quick: bool) -> None:
    """Print the table; a speed-up of 0.8 means 1.25 times the time of the dependencies."""
    results = Results("import in a fresh interpreter", "dependencies")
    dependencies = "import numpy, array_api_compat, pluggy"
    everything = "import specops; [getattr(specops, name) for name in specops.__all__]"
    cases = [
        ("specops", f"{dependencies}; import specops"),
        ("specops, every name used", everything),
        ("the dependencies again", dependencies),
    ]
    for case, ours in cases:
        results.add(
            case,
            pair(
                lambda: _fresh(dependencies),
                lambda ours=ours: _fresh(ours),
                1 if quick else 3 * repeats,
            ),
        )
    results.show()
