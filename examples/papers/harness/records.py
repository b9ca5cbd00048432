"""Results as JSON lines: one for each run, found again by what was run."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch

Record = dict[str, Any]


def read(path: Path) -> list[Record]:
    """All records of a file; none of one that is not there."""
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines if line.strip()]


def append(path: Path, record: Record) -> None:
    """One more line, on the disk when this returns."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(_plain(record), ensure_ascii=False) + "\n")
        file.flush()
        os.fsync(file.fileno())


def key(record: Record) -> str:
    """What makes two records those of the same run."""
    names = ("experiment", "label", "settings", "preset", "data", "seed")
    return json.dumps([_plain(record[name]) for name in names], sort_keys=True)


def hardware(device: str) -> str:
    """In words: the processor count, or the name of the accelerator."""
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    return f"{os.cpu_count()} CPU cores, {torch.get_num_threads()} used"


QUANTILES = 60


def quantiles(values: Any, count: int = QUANTILES) -> list[float]:
    """A sample in short."""
    values = np.asarray(values, dtype=np.float64)
    values = values[np.isfinite(values)]
    if not len(values):
        return []
    return [float(q) for q in np.quantile(values, np.linspace(0, 1, count))]


def by_label(records: Iterable[Record], experiment: str) -> dict[str, list[Record]]:
    """The records of an experiment, in the order in which labels first appear."""
    found: dict[str, list[Record]] = {}
    for record in records:
        if record["experiment"] == experiment:
            found.setdefault(record["label"], []).append(record)
    return found


def _plain(value: Any) -> Any:
    """As JSON has it: five digits, no NaN."""
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    if isinstance(value, bool | str | int) or value is None:
        return value
    number = float(value)
    return float(f"{number:.5g}") if math.isfinite(number) else None
