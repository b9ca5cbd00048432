"""What the adapter's tests run on: NumPy and the strict library as stand-ins, CuPy on a device."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

from specops_cupy.device import find

CUPY, WHY = find()
needs_device = pytest.mark.skipif(CUPY is None, reason=WHY)


def fake_cupy(devices: int = 1) -> Any:
    """A module that answers as cupy does; its arrays are NumPy's."""
    module: Any = ModuleType("cupy")
    module.__spec__ = ModuleSpec("cupy", None)
    module.__version__ = "99.0"
    module.entered = []

    class Device:
        id = 3

        def __enter__(self) -> None:
            module.entered.append(self.id)

        def __exit__(self, *_: object) -> None:
            module.entered.append(None)

    class ndarray(np.ndarray):
        device = Device()

        def get(self) -> np.ndarray:
            return self.view(np.ndarray)

    ndarray.__module__ = "cupy"
    module.ndarray = ndarray
    module.asarray = lambda values: np.array(values).view(ndarray)
    module.from_dlpack = lambda x: np.from_dlpack(x).view(ndarray)
    module.cuda = SimpleNamespace(
        is_available=lambda: devices > 0,
        runtime=SimpleNamespace(
            getDeviceCount=lambda: devices,
            getDeviceProperties=lambda index: {"name": b"Fake 9000"},
        ),
    )
    return module


def fake_cupyx() -> Any:
    """Its companion, whose settings change nothing."""
    module: Any = ModuleType("cupyx")
    module.errstate = lambda **_: nullcontext()
    return module


@contextmanager
def absent(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No cupy, installed or not."""
    from importlib import util

    with monkeypatch.context() as patch:
        patch.delitem(sys.modules, "cupy", raising=False)
        patch.setattr(util, "find_spec", lambda name: None)
        yield
