"""Hooks through which specops finds this adapter."""

from __future__ import annotations

from importlib import metadata, util
from typing import Any

from specops.errors import AdapterError
from specops.hookspecs import Adapter, AdapterStatus, hookimpl

_PACKAGES = {"jax", "jaxlib", "flax", "equinox", "haiku", "optax"}
_NOT_THERE = (
    "attaching to JAX models is not there yet. The core functions take JAX arrays, also under "
    "jit: call specops.project_spectral_ball on the parameters after optax.apply_updates"
)


@hookimpl
def specops_adapter(model: Any, optimizer: Any) -> Adapter | None:
    """Say what is missing, if the model or optimizer is of a JAX library."""
    if {_package(model), _package(optimizer)} & _PACKAGES:
        raise AdapterError(_NOT_THERE)
    return None


@hookimpl
def specops_adapter_status() -> AdapterStatus:
    """Whether JAX is installed."""
    if util.find_spec("jax") is None:
        return AdapterStatus("jax", False, "jax is not installed: pip install 'specops[jax]'")
    return AdapterStatus("jax", False, f"jax {metadata.version('jax')}: {_NOT_THERE}")


def _package(thing: Any) -> str:
    """The top package of an object's type, looking at the leaves of plain containers."""
    while isinstance(thing, dict | list | tuple) and thing and type(thing) in (dict, list, tuple):
        thing = next(iter(thing.values())) if isinstance(thing, dict) else thing[0]
    return type(thing).__module__.partition(".")[0]
