"""The explicit matrix of every geometry, straight from its definition and nothing else."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np

from specops import Conv, Dense


def dense_matrix(w: np.ndarray, geometry: Dense) -> np.ndarray:
    """The matrices of a Dense geometry, (*batch, out, in)."""
    ndim = w.ndim
    batch = [a % ndim for a in geometry.batch_axes]
    out = [a % ndim for a in geometry.out_axes]
    inn = [a for a in range(ndim) if a not in batch + out]
    if geometry.in_axes is not None:
        inn = [a % ndim for a in geometry.in_axes]
    lead = [w.shape[a] for a in batch]
    rows = int(np.prod([w.shape[a] for a in out]))
    return np.transpose(w, batch + out + inn).reshape(*lead, rows, -1)


def pads(conv: Conv, kernel: tuple[int, ...]) -> list[tuple[int, int]]:
    """(lower, upper) padding per axis of the convolution that maps fine to coarse."""
    result = []
    for t, (n, k) in enumerate(zip(conv.grid, kernel, strict=True)):
        span = conv.dilation[t] * (k - 1) + 1
        s = conv.stride[t]
        if conv.padding == "valid":
            result.append((0, 0))
        elif conv.padding == "same":
            outputs, fine = (n, n * s) if conv.transposed else (-(-n // s), n)
            total = max((outputs - 1) * s + span - fine, 0)
            result.append((total // 2, total - total // 2))
        else:
            entry = conv.padding[t]
            result.append(entry if isinstance(entry, tuple) else (entry, entry))
    return result


def grids(conv: Conv, kernel: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """(input, output) sizes of the layer."""
    outputs = []
    for t, (n, (low, high)) in enumerate(zip(conv.grid, pads(conv, kernel), strict=True)):
        span = conv.dilation[t] * (kernel[t] - 1) + 1
        s = conv.stride[t]
        if not conv.transposed:
            outputs.append((n + low + high - span) // s + 1)
        elif conv.padding == "same" or conv.boundary == "circular":
            outputs.append(n * s)
        elif conv.padding == "valid":
            outputs.append((n - 1) * s + max(span, s))
        else:
            outputs.append((n - 1) * s + span - low - high + conv.output_padding[t])
    return conv.grid, tuple(outputs)


def conv_matrix(w: np.ndarray, conv: Conv) -> np.ndarray:
    """The explicit matrix of a convolution layer, entry by entry, in float64."""
    if conv.layout in ("*IO", "*OI"):
        w = np.moveaxis(w, (-2, -1), (1, 0))
    out_first = conv.layout in ("OI*", "*IO")
    groups, kernel = conv.groups, w.shape[2:]
    full, part = w.shape[:2]
    outputs, inputs = (full, part * groups) if out_first else (part * groups, full)
    grid_in, grid_out = grids(conv, kernel)
    low = [p[0] for p in pads(conv, kernel)]
    matrix = np.zeros((outputs, *grid_out, inputs, *grid_in), dtype=np.result_type(w, np.float64))
    coarse, fine = (grid_in, grid_out) if conv.transposed else (grid_out, grid_in)
    f, p = np.indices((full, part))
    beside = f // (full // groups) * part + p
    o, i = (f, beside) if out_first else (beside, f)
    for position in itertools.product(*map(range, coarse)):
        for tap in itertools.product(*map(range, kernel)):
            read = [
                conv.stride[t] * position[t] + conv.dilation[t] * tap[t] - low[t]
                for t in range(len(kernel))
            ]
            if conv.boundary == "circular":
                read = [r % n for r, n in zip(read, fine, strict=True)]
            elif any(not 0 <= r < n for r, n in zip(read, fine, strict=True)):
                continue
            index: tuple[Any, ...] = (o, *position, i, *read)
            if conv.transposed:
                index = (o, *read, i, *position)
            matrix[index] += w[(f, p, *tap)]
    return matrix.reshape(outputs * int(np.prod(grid_out)), -1)


def read_taps(conv: Conv, kernel: tuple[int, ...]) -> np.ndarray:
    """Booleans of the kernel's shape: which taps some output reads inside the grid."""
    grid_in, grid_out = grids(conv, kernel)
    coarse, fine = (grid_in, grid_out) if conv.transposed else (grid_out, grid_in)
    read = np.zeros(kernel, dtype=bool)
    for tap in itertools.product(*map(range, kernel)):
        for position in itertools.product(*map(range, coarse)):
            at = [
                conv.stride[t] * position[t] + conv.dilation[t] * tap[t] - low
                for t, (low, _) in enumerate(pads(conv, kernel))
            ]
            inside = all(0 <= a < n for a, n in zip(at, fine, strict=True))
            read[tap] = read[tap] or inside or conv.boundary == "circular"
    return read


def only_read(w: np.ndarray, conv: Conv) -> np.ndarray:
    """The weight with zeros at the taps that are never read."""
    first = conv.layout[0] != "*"
    read = read_taps(conv, w.shape[2:] if first else w.shape[:-2])
    return np.where(read if first else read[..., None, None], w, 0.0)


def spectrum(w: np.ndarray, geometry: Dense | Conv) -> np.ndarray:
    """Singular values of the explicit matrix."""
    build = dense_matrix if isinstance(geometry, Dense) else conv_matrix
    return np.linalg.svd(build(w, geometry), compute_uv=False)
