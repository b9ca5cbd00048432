"""Checkpoints for the tests, written in the safetensors format."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np

_TYPES = {"float32": "F32", "float64": "F64", "float16": "F16", "int8": "I8", "int64": "I64"}


def written(path: Path, tensors: dict[str, np.ndarray], **metadata: str) -> Path:
    """Tensors as a safetensors file."""
    header: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    at = 0
    for name, value in tensors.items():
        header[name] = {
            "dtype": _TYPES[str(value.dtype)],
            "shape": list(value.shape),
            "data_offsets": [at, at + value.nbytes],
        }
        at += value.nbytes
    text = json.dumps(header).encode()
    data = b"".join(np.ascontiguousarray(v).tobytes() for v in tensors.values())
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def model(seed: int = 0) -> dict[str, np.ndarray]:
    """Some weights of a torch model, and what is no weight."""
    rng = np.random.default_rng(seed)

    def normal(*shape: int) -> np.ndarray:
        return rng.normal(size=shape).astype(np.float32)

    return {
        "conv1.weight": normal(6, 3, 3, 3),
        "conv1.bias": normal(6),
        "bn1.num_batches_tracked": np.array(7, np.int64),
        "dw.weight": normal(6, 1, 3, 3),
        "conv2.weight": normal(4, 6, 3, 3),
        "fc.weight": normal(5, 12),
        "flat.weight": np.outer(normal(4), normal(9)),
        "zero.weight": np.zeros((3, 4), np.float32),
        "half.weight": normal(8, 8).astype(np.float16),
        "experts.weight": normal(3, 5, 4),
    }
