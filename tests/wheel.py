"""Build the wheel, install it in an empty environment, and use it outside the repository.

python -m tests.wheel
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import venv
from pathlib import Path

ROOT = Path(__file__).parents[1]
SMOKE = """
import sys, warnings
from importlib.metadata import files, version
from pathlib import Path

warnings.simplefilter("error")
import specops
from specops import Conv, Dense, errors, plugins

assert Path(specops.__file__).is_relative_to(sys.prefix), specops.__file__
assert specops.__version__ == version("specops")
names = {str(f) for f in files("specops")}
for package in ("specops", "specops_torch", "specops_jax", "specops_cupy"):
    assert f"{package}/py.typed" in names, package
assert not any(n.startswith(("tests", "examples", "adapters")) for n in names), sorted(names)
assert not any(n.endswith("README.md") for n in names), sorted(names)
for name in specops.__all__:
    getattr(specops, name)

import numpy as np

w = np.random.default_rng(0).standard_normal((4, 3, 3, 3))
clipped = specops.project_spectral_ball(w, 1.0, Conv((8, 8)))
assert specops.spectral_norm(clipped, Conv((8, 8))) <= 1.0
from specops.cli import main

assert main(["adapters"]) == 0
np.savez("weights.npz", w=np.eye(3))
assert main(["inspect", "weights.npz", "--html", "page.html"]) == 0
assert Path("page.html").stat().st_size > 1000
try:
    import specops.testing
except ImportError as error:
    assert "specops[testing]" in str(error)
else:
    raise AssertionError("the kit without pytest")
assert not {"torch", "jax", "cupy"} & set(sys.modules)
for status in plugins.statuses():
    assert not status.available, status
    assert f"specops[{status.name}]" in status.detail, status
try:
    specops.attach(None, object(), specops.Monitor())
except errors.AdapterError as error:
    assert "pip install" in str(error)
else:
    raise AssertionError("attached to an object")
print("the wheel works outside the repository")
"""


def main() -> None:
    """Raise if any step fails."""
    with tempfile.TemporaryDirectory() as folder:
        where = Path(folder)
        build = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", folder, str(ROOT)]
        subprocess.run(build, check=True)
        (wheel,) = where.glob("*.whl")
        venv.create(where / "empty", with_pip=True)
        python = where / "empty" / "bin" / "python"
        subprocess.run([python, "-m", "pip", "install", "-q", str(wheel)], check=True)
        subprocess.run([python, "-I", "-c", SMOKE], check=True, cwd=folder)


if __name__ == "__main__":
    main()
