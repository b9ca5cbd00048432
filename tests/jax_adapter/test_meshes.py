"""Sharded weights: the figures of one device, the layout they came with, stacks left in place."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("jax")
pytest.importorskip("optax")

pytestmark = pytest.mark.slow
from tests import compiling  # noqa: E402
from tests.backends import EVERY_CASE  # noqa: E402

HERE = Path(__file__).parent
Found = list[tuple[str, dict[str, Any]]]


@pytest.fixture(scope="module")
def told() -> Found:
    """What the process says of the example and of each case."""
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8 "
        f"--xla_llvm_disable_expensive_passes=true {compiling.XLA_FLAGS}",
        "OMP_NUM_THREADS": "1",
        "NPROC": "32",  # threads for eight devices to wait for each other in
        # No program here is met twice, and keeping them takes a third of the time.
        "JAX_ENABLE_COMPILATION_CACHE": "false",
    }
    run = subprocess.run(
        [sys.executable, str(HERE / "on_meshes.py")],
        env=environment,
        capture_output=True,
        text=True,
        timeout=600 if not EVERY_CASE else 3600,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-4000:]
    return [json.loads(line) for line in run.stdout.splitlines()]


@pytest.fixture(scope="module")
def found(told: Found) -> Found:
    """Of each case alone."""
    return told[1:]


def test_the_example_learns_inside_the_ball(told: Found) -> None:
    name, result = told[0]
    assert name == "example"
    assert len(result["losses"]) == 10
    assert result["losses"][-1] < result["losses"][0]
    assert 0.5 < min(result["norms"].values()) <= max(result["norms"].values()) <= 1.0 + 1e-6


def test_weights_are_those_of_one_device(found: Found) -> None:
    off = {name: result["off"] for name, result in found}
    assert len(off) == (16 if not EVERY_CASE else 182)
    assert {name: x for name, x in off.items() if not x <= 1e-6} == {}


def test_weights_stay_laid_out_as_they_were(found: Found) -> None:
    assert {name: result["lost"] for name, result in found if result["lost"]} == {}


def test_stacks_are_handled_where_they_lie(found: Found) -> None:
    """No matrix moves, and nothing at all within an iteration."""
    stacks = {name: result for name, result in found if "; stack;" in name}
    assert {name: r for name, r in stacks.items() if r["matrices"] or r["loops"]} == {}
    assert len(stacks) == (5 if not EVERY_CASE else 26)
    split = dict(found)["constrain; several; Auto"]
    assert split["loops"]  # so that these are seen where they are
    assert split["matrices"]
