"""Reading every tensor of a large file takes the memory of the largest one."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

COUNT, EACH = 16, 14 << 20
WRITE = {
    "safetensors": "from safetensors.numpy import save_file; save_file(arrays, path)",
    "pt": "import torch; torch.save({k: torch.from_numpy(v) for k, v in arrays.items()}, path)",
    "npz": "numpy.savez(path, **arrays)",
    "h5": """
import h5py
with h5py.File(path, "w") as file:
    for name, array in arrays.items():
        file[name] = array
""",
}
READ = """
import sys
import specops.checkpoints

def memory(field):
    for line in open("/proc/self/status"):
        if line.startswith(field):
            return int(line.split()[1]) << 10

with specops.checkpoints.open_checkpoint(sys.argv[1]) as checkpoint:
    assert checkpoint.streams and not checkpoint.problems
    before = memory("VmRSS")
    total = 0
    for entry in checkpoint.entries:
        array = checkpoint.read(entry.name)
        assert (array == int(entry.name[1:])).all()
        total += array.nbytes
        del array
print(total, memory("VmHWM") - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux")
@pytest.mark.parametrize("kind", WRITE)
def test_tensors_are_read_one_by_one(tmp_path: Path, kind: str) -> None:
    path = tmp_path / f"a.{kind}"
    write = (
        f"import numpy; path = {str(path)!r}\n"
        f"one = numpy.ones({EACH} // 4, numpy.float32)\n"
        f"arrays = {{f'w{{i}}': i * one for i in range({COUNT})}}\n"
    )
    subprocess.run([sys.executable, "-c", write + WRITE[kind]], check=True)
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", READ, str(path)],
        check=True,
        capture_output=True,
        text=True,
    )
    path.unlink()
    total, grown = map(int, done.stdout.split())
    assert total == COUNT * EACH
    # The comparison has an array of booleans too.
    assert grown <= 3 * EACH + (100 << 20), f"{grown >> 20} MB"
