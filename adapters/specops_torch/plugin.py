"""Hooks through which specops finds this adapter; imports torch only for a torch model."""

from __future__ import annotations

import sys
from importlib import metadata, util
from typing import Any

from specops.errors import AdapterError
from specops.hookspecs import Adapter, AdapterStatus, hookimpl

_SUPPORTS = "weights, gradients, forward; checkpoints; compiled models"


@hookimpl
def specops_adapter(model: Any) -> Adapter | None:
    """This adapter, if the model is a torch module."""
    torch, keras = sys.modules.get("torch"), sys.modules.get("keras")
    if torch is None or not isinstance(model, torch.nn.Module):
        return None
    if keras is not None and isinstance(model, keras.Layer):
        raise AdapterError("Keras models have an adapter of their own: specops_keras")
    from specops_torch.adapter import TorchAdapter

    return TorchAdapter()


@hookimpl
def specops_adapter_status() -> AdapterStatus:
    """Whether torch is installed."""
    if util.find_spec("torch") is None:
        return AdapterStatus("torch", False, "torch is not installed: pip install 'specops[torch]'")
    return AdapterStatus("torch", True, f"torch {metadata.version('torch')}", _SUPPORTS)
