"""Random geometries with kernels that fit them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from hypothesis import strategies as st

from specops import Conv, Dense

_LARGEST = 40_000


@dataclass(frozen=True)
class Case:
    """A geometry and an array that has it."""

    geometry: Any
    shape: tuple[int, ...]
    complex: bool
    seed: int

    def weight(self) -> np.ndarray:
        """Normal entries, in double precision."""
        rng = np.random.default_rng(self.seed)
        w = rng.standard_normal(self.shape)
        return w + 1j * rng.standard_normal(self.shape) if self.complex else w


@st.composite
def convolutions(draw: Any, boundary: str | None = None) -> Case:
    """Convolutions in one, two and three dimensions, every option of `Conv` included."""
    ndim = draw(st.sampled_from([1, 2, 2, 3]))
    boundary = boundary or draw(st.sampled_from(["circular", "zeros"]))
    transposed = draw(st.booleans())
    groups = draw(st.sampled_from([1, 1, 2, 3]))
    layout = draw(st.sampled_from(["OI*", "IO*", "*IO", "*OI"]))
    channels = draw(st.tuples(st.integers(1, 3), st.integers(1, 3)))
    small = 2 if ndim == 3 else 5
    axes = [
        (
            draw(st.integers(1, 3 if ndim == 3 else 4)),
            draw(st.integers(1, 3)),
            draw(st.integers(1, 3)),
            draw(st.integers(1, small)),
        )
        for _ in range(ndim)
    ]
    kernel, stride, dilation, size = (tuple(a[i] for a in axes) for i in range(4))
    if boundary == "circular" and not transposed:
        size = tuple(n * s for n, s in zip(size, stride, strict=True))
    padding: Any = "same"
    extra: Any = 0
    if boundary == "zeros":
        spans = [d * (k - 1) + 1 for d, k in zip(dilation, kernel, strict=True)]
        kind = draw(st.sampled_from(["same", "valid", "ints", "pairs"]))
        if kind == "valid":
            padding = "valid"
            size = (
                size if transposed else tuple(n + s - 1 for n, s in zip(size, spans, strict=True))
            )
        elif kind == "ints":
            padding = tuple(draw(st.integers(0, (s - 1) // 2)) for s in spans)
            if not transposed:
                size = tuple(
                    n + s - 1 - 2 * p for n, s, p in zip(size, spans, padding, strict=True)
                )
                size = tuple(max(n, 1) for n in size)
            else:
                extra = tuple(draw(st.integers(0, s - 1)) for s in stride)
        elif kind == "pairs":
            padding = tuple((draw(st.integers(0, s - 1)), s - 1) for s in spans)
            if transposed:
                padding = tuple((low, 0) for low, _ in padding)
    geometry = Conv(
        size,
        stride=stride,
        dilation=dilation,
        groups=groups,
        transposed=transposed,
        output_padding=extra,
        padding=padding,
        boundary=boundary,
        layout=layout,
    )
    full, part = channels[0] * groups, channels[1]
    shape = (full, part, *kernel) if layout[0] != "*" else (*kernel, part, full)
    return Case(geometry, shape, draw(st.booleans()), draw(st.integers(0, 2**16)))


@st.composite
def denses(draw: Any) -> Case:
    """Matrices, stacks and reshaped kernels, axes in any order."""
    ndim = draw(st.integers(2, 5))
    order = draw(st.permutations(range(ndim)))
    outs = draw(st.integers(1, ndim - 1))
    ins = draw(st.integers(1, ndim - outs))
    sign = [draw(st.booleans()) for _ in range(ndim)]
    axes = [a - ndim if s else a for a, s in zip(order, sign, strict=True)]
    shape = tuple(draw(st.integers(1, 4)) for _ in range(ndim))
    geometry = Dense(
        out_axes=tuple(axes[:outs]),
        in_axes=tuple(axes[outs : outs + ins]),
        batch_axes=tuple(axes[outs + ins :]),
    )
    return Case(geometry, shape, draw(st.booleans()), draw(st.integers(0, 2**16)))
