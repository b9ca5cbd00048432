"""Convolutions on the torus against the two NumPy lines of Sedghi et al., and their likes."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import numpy as np

import specops
from specops import Conv
from tests.benchmarks.harness import Results, pair

CASES = [
    (3, 64, 32),
    (3, 256, 16),
    (3, 512, 8),
    (11, 64, 64),
    (3, 64, 56),
    (3, 128, 28),
    (3, 256, 14),
    (3, 512, 7),
]


def two_lines(kernel: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
    """Sedghi, Gupta & Long 2019, section 1, on a kernel (height, width, in, out)."""
    transforms = np.fft.fft2(kernel, grid, axes=[0, 1])
    return np.linalg.svd(transforms, compute_uv=False)


def torch_lines(kernel: Any, grid: tuple[int, int]) -> Any:
    """The same in torch, on a kernel (out, in, height, width)."""
    import torch

    return torch.linalg.svdvals(torch.fft.fft2(kernel, grid).permute(2, 3, 0, 1))


def jax_lines(grid: tuple[int, int]) -> Callable[[Any], Any]:
    """The same in JAX, compiled."""
    import jax

    def lines(kernel: Any) -> Any:
        transforms = jax.numpy.fft.fft2(kernel, grid).transpose(2, 3, 0, 1)
        return jax.numpy.linalg.svd(transforms, compute_uv=False)

    return jax.jit(lines)


def kernel_of(k: int, channels: int) -> np.ndarray:
    """A normal kernel (out, in, height, width)."""
    return np.random.default_rng(0).standard_normal((channels, channels, k, k), np.float32)


def run(repeats: int, quick: bool) -> None:
    """Print the tables."""
    cases = CASES[:1] if quick else CASES
    _numpy(cases, repeats)
    _torch(cases, repeats)
    _jax(cases[:1] if quick else CASES[:2], repeats)
    _memory(cases)


def label(k: int, channels: int, n: int) -> str:
    """A case in words."""
    return f"{k}×{k}, {channels} channels, {n}×{n}"


def _numpy(cases: list[tuple[int, int, int]], repeats: int) -> None:
    spectrum = Results("full spectrum, NumPy, float32", "two lines", "max error / σ₁")
    largest = Results("σ₁ alone, NumPy, float32", "two lines", "relative error")
    for k, channels, n in cases:
        w = kernel_of(k, channels)
        theirs = np.ascontiguousarray(w.transpose(2, 3, 1, 0)).astype(np.float64)
        expected = np.sort(two_lines(theirs, (n, n)).ravel())[::-1]
        theirs = theirs.astype(np.float32)
        geometry = Conv((n, n), boundary="circular")
        baseline = lambda theirs=theirs, n=n: two_lines(theirs, (n, n))  # noqa: E731
        for results, function in (
            (spectrum, specops.singular_values),
            (largest, specops.spectral_norm),
        ):
            got = function(w, geometry)
            wanted = expected if results is spectrum else expected[0]
            error = np.abs(got - wanted).max() / expected[0]
            ours = lambda f=function, w=w, g=geometry: f(w, g)  # noqa: E731
            results.add(label(k, channels, n), pair(baseline, ours, repeats), f"{error:.1e}")
    spectrum.show()
    largest.show()


def _torch(cases: list[tuple[int, int, int]], repeats: int) -> None:
    import torch

    results = Results("full spectrum, torch on the CPU, float32", "fft2 + svdvals")
    for k, channels, n in cases:
        w = torch.asarray(kernel_of(k, channels))
        geometry = Conv((n, n), boundary="circular")
        results.add(
            label(k, channels, n),
            pair(
                lambda w=w, n=n: torch_lines(w, (n, n)),
                lambda w=w, g=geometry: specops.singular_values(w, g),
                repeats,
            ),
        )
    results.show()


def _jax(cases: list[tuple[int, int, int]], repeats: int) -> None:
    import jax

    results = Results("full spectrum, JAX under jit, float32", "jitted two lines")
    for k, channels, n in cases:
        w = jax.numpy.asarray(kernel_of(k, channels))
        theirs = jax_lines((n, n))
        geometry = Conv((n, n), boundary="circular")
        ours = jax.jit(lambda w, g=geometry: specops.singular_values(w, g))
        results.add(
            label(k, channels, n),
            pair(
                lambda f=theirs, w=w: f(w).block_until_ready(),
                lambda f=ours, w=w: f(w).block_until_ready(),
                repeats,
            ),
        )
    results.show()


_PEAK = """
import re, sys
import numpy as np, specops
from tests.benchmarks.conv import Conv, kernel_of, two_lines

def status(field):
    return int(re.search(field + r":\\s+(\\d+) kB", open("/proc/self/status").read()).group(1))

k, channels, n, ours = map(int, sys.argv[1:])
w = kernel_of(k, channels)
theirs = np.ascontiguousarray(w.transpose(2, 3, 1, 0))
specops.singular_values(kernel_of(3, 2), Conv((4, 4), boundary="circular"))
two_lines(np.ones((3, 3, 2, 2), np.float32), (4, 4))
before = status("VmRSS")
if ours:
    specops.singular_values(w, Conv((n, n), boundary="circular"))
else:
    two_lines(theirs, (n, n))
print(status("VmHWM") - before)
"""
"""The kernel's own high-water mark: ru_maxrss would include that of the parent process."""


def _memory(cases: list[tuple[int, int, int]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(
        title="peak memory of the full spectrum above import, NumPy, fresh process",
        title_justify="left",
        title_style="bold",
    )
    for header in ("case", "two lines", "specops", "share"):
        table.add_column(header, justify="left" if header == "case" else "right")
    for case in cases:
        theirs, ours = (_peak(case, side) for side in (0, 1))
        table.add_row(
            label(*case), f"{theirs:.0f} MiB", f"{ours:.0f} MiB", f"{ours / max(theirs, 1e-9):.2f}"
        )
    Console(width=120).print(table)


def _peak(case: tuple[int, int, int], ours: int) -> float:
    command = [sys.executable, "-c", _PEAK, *map(str, case), str(ours)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return float(done.stdout) / 1024
