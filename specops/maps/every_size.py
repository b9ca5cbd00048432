"""The symbol that bounds a layer: of its own size, or of every size of input at once."""

from __future__ import annotations

import math
from dataclasses import replace

from specops.geometry import Conv, ConvSizes
from specops.maps.symbol import Symbol, symbol_of

_ANY_SIZE_GRID = 32
"""Fewest points per axis. The certificate then over-estimates the norm for 3² taps by at most 1 %
(4 % with 16 points, 0.24 % with 64). Longer kernels get eight points for each tap after the first,
with which it over-estimates by 2 % per axis."""


def certified_symbol(sizes: ConvSizes, conjugate_pairs: bool) -> tuple[Symbol, float]:
    """A symbol and a factor such that ‖layer‖ ≤ max over its grid / factor.

    The factor is 1 on the torus that contains a layer of known size. For every size at once it
    is the cosine certificate ∏ cos(π(k' − 1)/(2N)) on a coarse grid of N points per axis, where
    k' = ⌈k·gcd(s, d)/s⌉ taps share a phase. A circular stride that does not divide its grid,
    which "every size" includes, is bounded by the same convolution at stride 1 along that axis,
    of which it is a choice of rows; the polyphase symbol does not bound it.
    """
    if sizes.circular and (sizes.fine is None or not sizes.stride_divides):
        sizes = sizes.with_dividing_strides()
    if sizes.fine is not None:
        return symbol_of(sizes, sizes.enclosing_torus(), conjugate_pairs), 1.0
    factor, torus, strides = 1.0, [], []
    for stride, taps in _phases(sizes):
        points = max(_ANY_SIZE_GRID, 8 * (taps - 1)) if taps > 1 else 1
        factor *= math.cos(math.pi * (taps - 1) / (2 * points))
        torus.append(points * stride)
        strides.append(stride)
    plain = replace(sizes, stride=tuple(strides), dilation=(1,) * len(strides), circular=True)
    return symbol_of(plain, tuple(torus), conjugate_pairs), factor


def on_a_torus(geometry: Conv, shape: tuple[int, ...]) -> Conv:
    """The layer on the small torus that `certified_symbol` uses: its norm is a lower bound."""
    sizes = geometry.sizes(shape)
    phases = _phases(sizes.with_dividing_strides() if sizes.circular else sizes)
    points = [max(1, 8 * (taps - 1)) for _, taps in phases]
    if not geometry.transposed:
        points = [n * stride for n, (stride, _) in zip(points, phases, strict=True)]
    return replace(
        geometry,
        input_shape=tuple(points),
        stride=tuple(stride for stride, _ in phases),
        dilation=1,
        padding="same",
        output_padding=0,
        boundary="circular",
    )


def _phases(sizes: ConvSizes) -> list[tuple[int, int]]:
    """(stride, taps that share a phase) of each axis, at dilation 1."""
    strides = [s // math.gcd(s, d) for s, d in zip(sizes.stride, sizes.dilation, strict=True)]
    return [(s, -(-k // s)) for k, s in zip(sizes.kernel, strides, strict=True)]
