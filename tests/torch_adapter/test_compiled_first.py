"""Compilers that meet specops before anything else has, in a process of their own."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from tests.torch_adapter.models import new_compilers

MODEL = """
import numpy as np, torch, specops
from torch import nn

model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4))
specops.attach(None, model, specops.SpectralNormalization(norm="reshaped"))
graphs = []

def backend(graph, inputs):
    graphs.append(graph)
    return graph.forward

compiled, x = torch.compile(model, backend=backend, fullgraph=True), torch.randn(3, 6)
torch.testing.assert_close(compiled(x), model(x))
specops.project_spectral_ball(2 * np.eye(3), np.float32(1))
specops.spectral_norm(torch.nn.Parameter(torch.eye(3)))
compiled(x)
assert len(graphs) == 1, len(graphs)
"""
FUNCTION = """
import torch, specops

w = torch.nn.Parameter(torch.randn(5, 4))
function = specops.{name}
found = torch.compile(lambda w: function(w), fullgraph=True, backend="eager")(w)
torch.testing.assert_close(found, function(w), rtol=1e-4, atol=1e-5)
"""
FUNCTIONS = ("spectral_norm", "singular_values", "effective_rank", "stable_rank", "polar_factor")


PROGRAMS = {"model": MODEL} | {name: FUNCTION.format(name=name) for name in FUNCTIONS}
EACH_AFTER_IMPORTS = """
import json, os, sys, traceback
import torch

torch.compile(lambda x: x + 1, backend="eager")(torch.ones(1))
assert not any(name.startswith("specops") for name in sys.modules)
said = {}
for name, program in json.loads(sys.stdin.read()).items():
    reading, writing = os.pipe()
    if os.fork() == 0:
        error = ""
        try:
            exec(program, {})
        except BaseException:
            error = traceback.format_exc()
        os.write(writing, error[-4000:].encode() or b"passed")
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as told:
        said[name] = told.read()
print(json.dumps(said))
"""


@pytest.fixture(scope="module")
def said() -> dict[str, str]:
    """What each program said, in a fork of one process that has imported torch alone."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-W", "ignore", "-c", EACH_AFTER_IMPORTS]
    done = subprocess.run(
        command, input=json.dumps(PROGRAMS), capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, str] = json.loads(done.stdout.splitlines()[-1])
    return found


@new_compilers
@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="no processes that go on from here")
@pytest.mark.parametrize("name", PROGRAMS)
def test_in_a_fresh_process(said: dict[str, str], name: str) -> None:
    assert said[name] == "passed"
