"""Opening a checkpoint with the reader that knows its format."""

from __future__ import annotations

import os
import threading
from pathlib import Path

from specops.checkpoints import plugin
from specops.checkpoints.base import Checkpoint, explained
from specops.checkpoints.first_bytes import head
from specops.errors import CheckpointError, SpecopsError
from specops.hookspecs import PROJECT
from specops.plugins import answers, manager

_SUFFIXES = (
    *(".safetensors", ".npz", ".npy", ".h5", ".keras", ".pt", ".pth", ".bin", ".ckpt"),
    *(".msgpack", ".eqx"),
)
_KNOWN = (
    f"{', '.join(_SUFFIXES)}, and folders of orbax, torch.distributed.checkpoint or Hugging Face "
    f"shards"
)
_OTHERS = {
    b"GGUF": "a GGUF file, whose weights are packed for inference; export those it was made of as "
    "safetensors (transformers: save_pretrained)",
    b"TFL3": "a TFLite program, whose weights are folded and packed; save the Keras model it was "
    "made of: model.save_weights('model.weights.h5')",
    b".onnx": "an ONNX program, in which layers are fused and nameless; save the weights it was "
    "made of: torch.save(model.state_dict(), 'model.pt')",
}
"""Formats that are recognised but not read, and what to export instead."""
_registering = threading.Lock()


def open_checkpoint(path: str | os.PathLike[str]) -> Checkpoint:
    """Open a saved model and list its tensors, without reading them if the format allows.

    No code in the file is run: pickles are read by torch's ``weights_only`` unpickler, arrays of
    objects not at all.

    Parameters
    ----------
    path : path-like
        A file, or a folder of orbax or of Hugging Face shards. Its content determines the format;
        its name counts only where the content does not tell.

    Returns
    -------
    Checkpoint
        With `entries`, `problems` and `read`; close it, or use it in a ``with`` statement.

    Raises
    ------
    CheckpointError
        The file cannot be opened. One line gives the path, what is wrong, and what to do.
    """
    if not os.fspath(path):
        raise CheckpointError("no path given")
    path = Path(path)
    with explained(path):
        path = path.expanduser()
        try:
            size = path.stat().st_size
        except (FileNotFoundError, NotADirectoryError):
            raise CheckpointError(f"{path}: there is no such file or folder") from None
        if not path.is_dir():
            if not path.is_file():
                raise CheckpointError(f"{path}: neither a file nor a folder")
            if size == 0:
                raise CheckpointError(f"{path}: the file is empty; copy or download it again")
            start = head(path, 64)
        else:
            start = b""
            os.listdir(path)
    found = _by_whoever_knows(path)
    if found is None:
        raise CheckpointError(f"{path}: {_unknown(path, start)}")
    return found


def _by_whoever_knows(path: Path) -> Checkpoint | None:
    """An open reader that knows this file or folder: an adapter's, or else a built-in one."""
    with _registering:
        if not manager().has_plugin(PROJECT):
            manager().register(plugin, name=PROJECT)
    refusals: list[SpecopsError] = []
    given = {"path": path, "open_file": open_checkpoint}
    for found in answers("specops_open_checkpoint", Checkpoint, refusals, **given):
        return found  # type: ignore[no-any-return]
    if refusals:
        raise refusals[0]
    return None


def _unknown(path: Path, start: bytes) -> str:
    if path.is_dir() and (path / "saved_model.pb").is_file():
        return "a SavedModel, a program of TensorFlow; save the weights: model.save_weights(...)"
    if path.is_dir():
        files = sorted(p.name for p in path.iterdir() if p.is_file() and p.suffix in _SUFFIXES)
        if files:
            listed = ", ".join(files[:5]) + (" ..." if len(files) > 5 else "")
            return f"the folder is no checkpoint itself; name one of its files: {listed}"
        return f"no checkpoint that is known is in this folder; known are {_KNOWN}"
    for kind in (start[:4], start[4:8], path.suffix.encode()):
        if kind in _OTHERS:
            return _OTHERS[kind]
    if start.startswith(b"version https://git-lfs"):
        return "a Git LFS pointer and not the weights; run git lfs pull"
    text = all(byte >= 32 or byte in b"\t\r\n" for byte in start) and start.isascii()
    return f"{'a text file' if text else 'a file'} that no reader knows; known are {_KNOWN}"
