"""What `specops inspect` takes for a large checkpoint: peak memory and time."""

from __future__ import annotations

import json
import re
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

_CODE = """
import re, sys
from specops.cli import main
status = main(sys.argv[1:])
peak = re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]
print(int(peak) / 1024, file=sys.stderr)
sys.exit(status)
"""


def run(repeats: int, quick: bool) -> None:
    """Print the peak beside what it may be: 6 times the largest tensor and 300 MB."""
    del repeats
    if not Path("/proc/self/status").exists():
        print("inspection of a checkpoint: skipped, no /proc")
        return
    side, count = (512, 6) if quick else (4096, 45)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "large.safetensors"
        _write(path, side, count)
        size = path.stat().st_size / 2**30
        start = time.perf_counter()
        done = subprocess.run(
            [sys.executable, "-c", _CODE, "inspect", str(path), "--json"],
            capture_output=True,
            text=True,
            check=True,
        )
        seconds = time.perf_counter() - start
    measured = json.loads(done.stdout)["totals"]["measured"]
    peak = float(re.findall(r"[\d.]+", done.stderr)[-1])
    allowed = 6 * side * side * 4 / 2**20 + 300
    print("\n### Inspecting a checkpoint\n")
    print("| safetensors | tensors, float32 | measured | peak | allowed | time |")
    print("|---|---|---|---|---|---|")
    print(
        f"| {size:.2f} GiB | {count} of {side}×{side} | {measured} | {peak:.0f} MiB | "
        f"{allowed:.0f} MiB | {seconds:.0f} s |"
    )


def _write(path: Path, side: int, count: int) -> None:
    """Random matrices, one of which is in memory at a time."""
    size = 4 * side * side
    header = {
        f"layers.{i}.weight": {
            "dtype": "F32",
            "shape": [side, side],
            "data_offsets": [i * size, (i + 1) * size],
        }
        for i in range(count)
    }
    text = json.dumps(header).encode()
    matrix = np.random.default_rng(0).standard_normal((side, side), dtype=np.float32)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for i in range(count):
            file.write(np.roll(matrix, i, axis=1).tobytes())
