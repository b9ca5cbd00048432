"""The examples in docstrings are true."""

from __future__ import annotations

import doctest
import importlib
import pkgutil

import pytest

import specops

MODULES = sorted(m.name for m in pkgutil.walk_packages(specops.__path__, "specops."))
OF_TORCH = ("geometry", "baselines", "collecting", "jacobian_penalties", "lipschitz")


@pytest.mark.parametrize("name", [*MODULES, *(f"specops_torch.{n}" for n in OF_TORCH)])
def test_examples(name: str) -> None:
    if name.startswith("specops_torch"):
        pytest.importorskip("torch")
    results = doctest.testmod(importlib.import_module(name))
    assert results.failed == 0


def test_every_public_function_shows_an_example() -> None:
    without = {"errors", "attach", "project", "Monitor", "ClipSpectralNorm"}
    for name in set(specops.__all__) - without:
        assert ">>> " in (getattr(specops, name).__doc__ or ""), name
