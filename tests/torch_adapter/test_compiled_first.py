"""Compilers that meet specops before anything else has, in a process of their own."""

from __future__ import annotations

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


@new_compilers
@pytest.mark.slow
@pytest.mark.parametrize(
    "program",
    [MODEL, *(FUNCTION.format(name=name) for name in FUNCTIONS)],
    ids=["model", *FUNCTIONS],
)
def test_in_a_fresh_process(program: str) -> None:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-W", "ignore", "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
