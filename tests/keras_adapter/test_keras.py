"""The example adapter's own tests, kit included, on each backend of Keras."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TESTS = Path("examples") / "adapter_keras" / "tests"


def run(backend: str, *command: str) -> subprocess.CompletedProcess[str]:
    for name in ("keras", backend):
        if find_spec(name) is None:
            pytest.skip(f"{name} is not installed")
    try:
        version("specops_keras")
    except PackageNotFoundError:
        pytest.skip("specops_keras is not installed: pip install -e examples/adapter_keras")
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
    environment |= {"KERAS_BACKEND": backend}
    return subprocess.run(
        [sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True
    )


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["torch", "jax"])
def test_its_own_tests_pass(backend: str) -> None:
    done = run(backend, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(TESTS))
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    assert " passed" in done.stdout or "[100%]" in done.stdout


def test_listing_adapters_imports_no_keras() -> None:
    code = (
        "import sys; from specops import plugins; found = plugins.statuses(); "
        "assert any(s.name == 'keras' and s.available for s in found), found; "
        "assert 'keras' not in sys.modules and 'torch' not in sys.modules"
    )
    done = run("torch", "-c", code)
    assert done.returncode == 0, done.stderr
