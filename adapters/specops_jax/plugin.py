"""Hooks through which specops finds this adapter; imports jax only for a JAX model."""

from __future__ import annotations

from importlib import metadata, util
from pathlib import Path
from typing import Any

from specops.checkpoints.base import Checkpoint, explained
from specops.checkpoints.first_bytes import head
from specops.errors import AdapterError
from specops.hookspecs import Adapter, AdapterStatus, hookimpl

_PACKAGES = {"jax", "jaxlib", "flax", "equinox", "haiku", "optax"}
_HOW = (
    "parameters of JAX are values, which no call can change in place: put "
    "specops_jax.constrain(rule_or_plan, geometries) last in the optax chain, or call "
    "specops_jax.project_params(params, plan, state) after optax.apply_updates; once, without "
    "training, params = specops_jax.enforce(params, plan, geometries)"
)
_MAPS = {bytes([first]) for first in (*range(0x81, 0x90), 0xDE, 0xDF)}
_STRINGS = {b"\xd9", b"\xda", b"\xdb"}
_SUPPORTS = "weights, gradients, forward; checkpoints; jit, vmap, scan"


@hookimpl
def specops_adapter(model: Any, optimizer: Any) -> Adapter | None:
    """Say what to use instead, if the model or optimizer is of a JAX library."""
    if {_package(model), _package(optimizer)} & _PACKAGES:
        raise AdapterError(_HOW)
    return None


@hookimpl
def specops_adapter_status() -> AdapterStatus:
    """Whether JAX and optax are installed."""
    missing = [name for name in ("jax", "optax") if util.find_spec(name) is None]
    if missing:
        names = " and ".join(missing)
        return AdapterStatus("jax", False, f"{names} not installed: pip install 'specops[jax]'")
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in ("jax", "optax"))
    return AdapterStatus("jax", True, versions, _SUPPORTS)


@hookimpl
def specops_open_checkpoint(path: Path) -> Checkpoint | None:
    """A reader, if the path is a folder of orbax or a file of flax.serialization."""
    if path.is_dir():
        from specops_jax.checkpoints import open_orbax

        return open_orbax(path)
    # A map of msgpack whose first key is a string.
    with explained(path):
        start = head(path, 6)
    key = start[{0xDE: 3, 0xDF: 5}.get(start[0], 1) :][:1] if start else b""
    if start[:1] not in _MAPS or not (b"\xa0" <= key <= b"\xbf" or key in _STRINGS):
        return None
    from specops_jax.checkpoints import FlaxCheckpoint

    return FlaxCheckpoint(path)


def _package(thing: Any) -> str:
    """The top package of an object's type, looking at the leaves of plain containers."""
    while isinstance(thing, dict | list | tuple) and thing and type(thing) in (dict, list, tuple):
        thing = next(iter(thing.values())) if isinstance(thing, dict) else thing[0]
    return type(thing).__module__.partition(".")[0]
