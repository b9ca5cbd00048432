"""The norm of zero-padded convolutions against ARPACK's on the same operator."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

import specops
from specops import Conv
from specops.maps.convolution import ConvOperator
from tests import structured
from tests.benchmarks.harness import Results, pair

SIZES = [(16, 32), (32, 16), (64, 8)]
"""Channels and grid of the three stages of a ResNet for CIFAR."""
_TOLERANCES = (1e-2, 1e-4, 1e-6, 1e-8, 0.0)
_AGREE = {"float32": 1e-6, "float64": 1e-13}
"""Relative distance at which ARPACK's value counts as ours, from below."""
_LEADER = 2.0
"""σ₁ of a part of rank one added to normal kernels, over their own norm: trained ones have values
apart as these do."""


def kernels(channels: int) -> dict[str, np.ndarray]:
    """Kernels (out, in, 3, 3) by what their largest values are like."""
    rng = np.random.default_rng(channels)
    taps = (channels, channels, 3, 3)
    normal = rng.standard_normal(taps)
    orthogonal = structured.orthogonal(rng, channels, channels, (3, 3))
    u, v, tap = (structured.isometry(rng, n, 1) for n in (channels, channels, 9))
    leader = np.einsum("o,i,t->oit", u[:, 0], v[:, 0], tap[:, 0]).reshape(taps)
    return {
        "normal": normal,
        "one leading": normal + _LEADER * 6.0 * math.sqrt(channels) * leader,
        "orthogonal": orthogonal,
        "nearly orthogonal": orthogonal + 1e-3 * rng.standard_normal(taps),
    }


def arpack(w: np.ndarray, geometry: Conv, tolerance: float) -> float:
    """The same by scipy, whose vectors are random."""
    from scipy.sparse.linalg import LinearOperator, svds

    a = specops.linear_operator(w, geometry)
    products: Any = LinearOperator(a.shape, matvec=a.matvec, rmatvec=a.rmatvec, dtype=w.dtype)
    found = svds(products, k=1, tol=tolerance, return_singular_vectors=False, random_state=0)
    return float(found[0])


class _Counted:
    """Products with A while it lasts."""

    def __enter__(self) -> _Counted:
        self.count, self.plain = 0, ConvOperator.matvec

        def matvec(operator: ConvOperator, x: Any) -> Any:
            self.count += 1
            return self.plain(operator, x)

        ConvOperator.matvec = matvec  # type: ignore[method-assign]
        return self

    def __exit__(self, *_: object) -> None:
        ConvOperator.matvec = self.plain  # type: ignore[method-assign]


def run(repeats: int, quick: bool) -> None:
    """Print the table: ARPACK at the loosest tolerance at which it reaches our value."""
    try:
        import scipy
    except ImportError:
        print("norms of zero-padded convolutions: skipped, no scipy")
        return
    del scipy
    for dtype in ("float64",) if quick else ("float64", "float32"):
        title = f"σ₁ of zero-padded 3×3 convolutions, NumPy, {dtype}"
        results = Results(title, "ARPACK", "products, ARPACK", "ours", "ARPACK below ours")
        for channels, n in [(16, 8)] if quick else SIZES:
            for kind, kernel in kernels(channels).items():
                _row(results, f"{channels}, {n}×{n}, {kind}", kernel.astype(dtype), n, repeats)
        results.show()


def _row(results: Results, label: str, w: np.ndarray, n: int, repeats: int) -> None:
    geometry = Conv((n, n), padding=1)
    with _Counted() as ours:
        value = float(specops.spectral_norm(w, geometry))
    for tolerance in _TOLERANCES:
        with _Counted() as theirs:
            found = arpack(w, geometry, tolerance)
        if found >= value * (1.0 - _AGREE[w.dtype.name]):
            break
    timed = pair(
        lambda: arpack(w, geometry, tolerance),
        lambda: specops.spectral_norm(w, geometry),
        repeats,
    )
    below = f"{1.0 - found / value:.0e}"
    results.add(label, timed, str(theirs.count), str(ours.count), below)
