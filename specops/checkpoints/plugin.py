"""The plugin with the readers of formats that belong to no framework."""

from __future__ import annotations

from pathlib import Path

from specops.checkpoints.base import Checkpoint, explained
from specops.checkpoints.first_bytes import head, zip_names
from specops.checkpoints.sharded import Open, open_folder
from specops.hookspecs import hookimpl

_HDF5 = b"\x89HDF\r\n\x1a\n"


@hookimpl(trylast=True)
def specops_open_checkpoint(path: Path, open_file: Open) -> Checkpoint | None:
    """A reader of safetensors, NumPy, Keras or Hugging Face files, if the path is one."""
    with explained(path):
        if path.is_dir() or path.name.endswith(".index.json"):
            return open_folder(path, open_file)
        return _open_file(path)


def _open_file(path: Path) -> Checkpoint | None:
    start, names = head(path), zip_names(path)
    if start.startswith(_HDF5) or "model.weights.h5" in names:
        from specops.checkpoints.keras import KerasCheckpoint

        return KerasCheckpoint(path)
    if start.startswith((b"\x93NUMPY", b"{")):
        from specops.checkpoints.numpy import LeavesCheckpoint, NpyCheckpoint, first_leaf

        if first_leaf(path) >= 0:
            return LeavesCheckpoint(path)
        if not start.startswith(b"{"):
            return NpyCheckpoint(path)
    if any(name.endswith(".npy") for name in names) or (
        path.suffix == ".npz" and start.startswith(b"PK") and not names
    ):
        from specops.checkpoints.numpy import NpzCheckpoint

        return NpzCheckpoint(path)
    if names:
        return None
    # The name decides only if the content is not recognised, for the sake of a precise error.
    if start[8:9] == b"{" or (path.suffix == ".safetensors" and not start.isascii()):
        from specops.checkpoints.safetensors import SafetensorsCheckpoint

        return SafetensorsCheckpoint(path)
    return None
