"""Hooks through which specops finds this adapter; imports keras only for a keras model."""

from __future__ import annotations

import sys
from importlib import metadata, util
from typing import Any

from specops.authors import Adapter, AdapterError, AdapterStatus, hookimpl

_BACKENDS = ("torch", "jax")


# First, because with the torch backend a Keras layer is a torch module too.
@hookimpl(tryfirst=True)
def specops_adapter(model: Any) -> Adapter | None:
    """This adapter, if the model is a Keras layer or model."""
    keras = sys.modules.get("keras")
    if keras is None or not isinstance(model, getattr(keras, "Layer", ())):
        return None
    if _backend() not in _BACKENDS:
        raise AdapterError(_unusable())
    from specops_keras.adapter import KerasAdapter

    return KerasAdapter()


@hookimpl
def specops_adapter_status() -> AdapterStatus:
    """Whether keras is installed with a backend, and if it is imported, which."""
    if util.find_spec("keras") is None:
        return AdapterStatus("keras", False, "keras is not installed: pip install 'keras>=3.5'")
    if not any(util.find_spec(name) for name in _BACKENDS):
        needs = "keras needs a backend here: pip install jax, and set KERAS_BACKEND=jax (or torch)"
        return AdapterStatus("keras", False, needs)
    backend = _backend()
    if backend and backend not in _BACKENDS:
        return AdapterStatus("keras", False, _unusable())
    running = f", backend {backend}" if backend else ""
    version = f"keras {metadata.version('keras')}{running}"
    return AdapterStatus("keras", True, version, supports="weights; checkpoints")


def _backend() -> str:
    """The backend of the keras that is imported; empty if none is."""
    backend = getattr(sys.modules.get("keras"), "backend", None)
    return "" if backend is None else str(backend.backend())


def _unusable() -> str:
    return (
        f"keras runs on the {_backend()} backend, whose arrays specops cannot measure: set "
        f"KERAS_BACKEND=torch or KERAS_BACKEND=jax before keras is imported"
    )
