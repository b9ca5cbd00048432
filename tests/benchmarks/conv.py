"""The full spectrum of convolutions against the two NumPy lines of Sedghi et al."""

from __future__ import annotations

import numpy as np

import specops
from specops import Conv
from tests.benchmarks.harness import Results, pair

CASES = [(3, 64, 32), (3, 256, 16)]


def two_lines(kernel: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
    """Sedghi, Gupta & Long 2019, section 1, on a kernel (height, width, in, out)."""
    transforms = np.fft.fft2(kernel, grid, axes=[0, 1])
    return np.linalg.svd(transforms, compute_uv=False)


def run(repeats: int, quick: bool) -> None:
    """Print the table."""
    results = Results("full spectrum of a convolution, NumPy, float32", "two lines", "max error")
    for k, channels, n in CASES[:1] if quick else CASES:
        w = np.random.default_rng(0).standard_normal((channels, channels, k, k), np.float32)
        theirs = np.ascontiguousarray(w.transpose(2, 3, 1, 0))
        geometry = Conv((n, n), boundary="circular")
        expected = np.sort(two_lines(theirs, (n, n)).ravel())[::-1]
        error = np.abs(specops.singular_values(w, geometry) - expected).max() / expected[0]
        timed = pair(
            lambda theirs=theirs, n=n: two_lines(theirs, (n, n)),
            lambda w=w, geometry=geometry: specops.singular_values(w, geometry),
            repeats,
        )
        results.add(f"{k}×{k}, {channels} channels, {n}×{n}", timed, f"{error:.1e}")
    results.show()
