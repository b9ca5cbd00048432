"""Hooks through which specops finds this adapter."""

from __future__ import annotations

from importlib import util
from typing import Any

from specops.errors import AdapterError
from specops.hookspecs import Adapter, AdapterStatus, hookimpl

_NOT_THERE = (
    "attaching to CuPy arrays is not there yet. The core functions take CuPy arrays: call "
    "specops.project_spectral_ball on each of them"
)


@hookimpl
def specops_adapter(model: Any) -> Adapter | None:
    """Say what is missing, if the model is a CuPy array or a dict of them."""
    leaf = next(iter(model.values()), None) if isinstance(model, dict) else model
    if type(leaf).__module__.partition(".")[0] == "cupy":
        raise AdapterError(_NOT_THERE)
    return None


@hookimpl
def specops_adapter_status() -> AdapterStatus:
    """Whether CuPy is installed."""
    if util.find_spec("cupy") is None:
        return AdapterStatus("cupy", False, "cupy is not installed: pip install 'specops[cupy]'")
    return AdapterStatus("cupy", False, _NOT_THERE)
