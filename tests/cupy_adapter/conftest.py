"""Fixtures of the CuPy adapter's tests."""

from __future__ import annotations

import sys
from typing import Any

import pytest

from tests.cupy_adapter.libraries import CUPY, fake_cupy, fake_cupyx, needs_device


@pytest.fixture(
    params=["array_api_compat.numpy", "array_api_strict", pytest.param("cupy", marks=needs_device)]
)
def xp(request: pytest.FixtureRequest) -> Any:
    """Libraries whose arrays can be written to in place."""
    return CUPY if request.param == "cupy" else pytest.importorskip(request.param)


@pytest.fixture
def cupy(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A fake of the module, for as long as the test runs."""
    module = fake_cupy()
    monkeypatch.setitem(sys.modules, "cupy", module)
    monkeypatch.setitem(sys.modules, "cupyx", fake_cupyx())
    return module
