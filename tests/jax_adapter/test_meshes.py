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
HERE = Path(__file__).parent
Found = list[tuple[str, dict[str, Any]]]


@pytest.fixture(scope="module")
def found() -> Found:
    """What the process says of each case."""
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8 "
        "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true",
        "OMP_NUM_THREADS": "1",
    }
    run = subprocess.run(
        [sys.executable, str(HERE / "on_meshes.py")],
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-4000:]
    return [json.loads(line) for line in run.stdout.splitlines()]


def test_weights_are_those_of_one_device(found: Found) -> None:
    off = {name: result["off"] for name, result in found}
    assert len(off) == 14
    assert {name: x for name, x in off.items() if not x <= 1e-6} == {}


def test_weights_stay_laid_out_as_they_were(found: Found) -> None:
    assert {name: result["lost"] for name, result in found if result["lost"]} == {}


def test_no_weights_move_within_an_iteration_on_a_stack(found: Found) -> None:
    """What ends a loop is a flag of the whole stack; nothing larger than it is exchanged."""
    stacks = {name: result for name, result in found if "; stack;" in name}
    assert sum(result["loops"] for result in stacks.values()) > 0
    moved = {
        n: [x for x in r["collectives"] if " = pred[] all-reduce" not in x]
        for n, r in stacks.items()
    }
    assert {name: lines for name, lines in moved.items() if lines} == {}
    split = dict(found)["constrain; several; Auto"]
    assert split["collectives"]  # so that these are seen where they are
