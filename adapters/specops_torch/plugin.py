"""Hooks through which specops finds this adapter; torch is imported only if one has to use it."""

from __future__ import annotations

import sys
from importlib import metadata, util
from pathlib import Path
from typing import Any

from specops.checkpoints.base import Checkpoint, explained
from specops.checkpoints.first_bytes import head, zip_names
from specops.errors import AdapterError, CheckpointError
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


@hookimpl
def specops_open_checkpoint(path: Path) -> Checkpoint | None:
    """A reader, if the file is what torch.save writes: a zip file with a pickle, or a pickle.

    Or a folder of torch.distributed.checkpoint.
    """
    if path.is_dir():
        if not (path / ".metadata").is_file():
            return None
        from specops_torch.distributed import DistributedCheckpoint

        return DistributedCheckpoint(path)
    if path.suffix == ".distcp":
        raise CheckpointError(f"{path}: a shard of torch.distributed.checkpoint; name its folder")
    with explained(path):
        start = head(path, 2)
        zipped = any(name.endswith("/data.pkl") for name in zip_names(path))
    if not zipped and not (start[:1] == b"\x80" and start[1:] in {b"\2", b"\3", b"\4", b"\5"}):
        return None
    from specops_torch.checkpoint import open_torch

    return open_torch(path, zipped)
