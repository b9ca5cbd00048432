"""Kernels with structure: what training makes, and random normal kernels never show."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np

from specops import Conv, Dense
from tests import oracle
from tests.strategies import Case

_CLOSE = 4 * 2.0**-23
"""Relative distance of values that single precision hardly tells apart."""


def isometry(rng: np.random.Generator, rows: int, columns: int) -> np.ndarray:
    """A matrix all of whose singular values are 1."""
    q = np.linalg.qr(rng.standard_normal((max(rows, columns), min(rows, columns))))[0]
    return q if rows >= columns else q.T


def orthogonal(rng: np.random.Generator, rows: int, columns: int, taps: tuple[int, ...]):
    """A kernel (rows, columns, *taps) all of whose values are 1 on every torus.

    An isometry times factors P + (I − P)z, for projections P and shifts z along each axis.
    """
    kernel = np.zeros((rows, columns, *taps))
    kernel[(..., *[0] * len(taps))] = isometry(rng, rows, columns)
    for axis, k in enumerate(taps):
        for _ in range(k - 1):
            q = isometry(rng, rows, max(1, rows // 2))
            kept = np.tensordot(q @ q.T, kernel, 1)
            kernel = kept + np.roll(kernel - kept, 1, axis=2 + axis)
    return kernel


def _one_tap(rng: np.random.Generator, rows: int, columns: int, taps: tuple[int, ...]):
    kernel = np.zeros((rows, columns, *taps))
    kernel[(..., *(rng.integers(k) for k in taps))] = isometry(rng, rows, columns)
    return kernel


def _low_rank(rng: np.random.Generator, rows: int, columns: int, taps: tuple[int, ...]):
    return np.tensordot(
        rng.standard_normal((rows, 1)), rng.standard_normal((1, columns, *taps)), axes=1
    )


def _permutation(rng: np.random.Generator, rows: int, columns: int, taps: tuple[int, ...]):
    kernel = np.zeros((rows, columns, *taps))
    for i, j in zip(rng.permutation(rows), rng.permutation(columns), strict=False):
        kernel[(i, j, *(rng.integers(k) for k in taps))] = 1.0
    return kernel


def _blocks(rng: np.random.Generator, rows: int, columns: int, taps: tuple[int, ...]):
    kernel = rng.standard_normal((rows, columns, *taps))
    kernel[: rows // 2, columns // 2 :] = 0.0
    kernel[rows // 2 :, : columns // 2] = 0.0
    return kernel


def _nearly(rng: np.random.Generator, *sizes):
    kernel = orthogonal(rng, *sizes)
    return kernel + _CLOSE * rng.standard_normal(kernel.shape)


def _sum_of_two(rng: np.random.Generator, *sizes):
    return orthogonal(rng, *sizes) + orthogonal(rng, *sizes)


KINDS: dict[str, Callable[..., np.ndarray]] = {
    "orthogonal": orthogonal,
    "nearly orthogonal": _nearly,
    "sum of two orthogonal": _sum_of_two,
    "one tap": _one_tap,
    "low rank": _low_rank,
    "permutation": _permutation,
    "blocks": _blocks,
    "zero": lambda rng, rows, columns, taps: np.zeros((rows, columns, *taps)),
    "normal": lambda rng, rows, columns, taps: rng.standard_normal((rows, columns, *taps)),
}


def weight(case: Case, kind: str, scale: float, loud: bool) -> np.ndarray:
    """A kernel of that kind in the layout of the case; `loud`: 100 at taps never read."""
    rng = np.random.default_rng(case.seed)
    geometry = case.geometry
    if isinstance(geometry, Dense):
        rows, columns = case.shape
        return scale * KINDS[kind](rng, rows, columns, ())
    first = geometry.layout[0] != "*"
    full, part = (case.shape[0], case.shape[1]) if first else (case.shape[-1], case.shape[-2])
    taps = case.shape[2:] if first else case.shape[:-2]
    groups = geometry.groups
    kernel = np.concatenate([KINDS[kind](rng, full // groups, part, taps) for _ in range(groups)])
    if loud:
        for tap in unread(geometry, taps):
            kernel[(..., *tap)] = 100.0 * rng.standard_normal(kernel.shape[:2])
    kernel = scale * kernel
    return kernel if first else np.moveaxis(kernel, (0, 1), (-1, -2))


def unread(geometry: Conv, taps: tuple[int, ...]) -> list[tuple[int, ...]]:
    """The taps that no output reads inside the grid."""
    single = Conv(**{**_arguments(geometry), "groups": 1, "layout": "OI*"})
    found = []
    for tap in itertools.product(*map(range, taps)):
        probe = np.zeros((1, 1, *taps))
        probe[(0, 0, *tap)] = 1.0
        if not oracle.conv_matrix(probe, single).any():
            found.append(tap)
    return found


def _arguments(geometry: Conv) -> dict[str, object]:
    names = ("input_shape", "stride", "dilation", "transposed", "output_padding", "padding")
    return {name: getattr(geometry, name) for name in (*names, "boundary")}
