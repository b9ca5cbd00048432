"""Convolutions of flax, whose linen and nnx layers have the same attributes."""

from __future__ import annotations

from typing import Any

from specops.training.role import Role
from specops_jax.layers import convolution, transposed_convolution


def flax_convolution(layer: Any, shape: tuple[int, ...] | None, *, transposed: bool) -> Role:
    """The role of a kernel, at an input size or at all of them."""
    common = {
        "kernel": sizes(layer.kernel_size),
        "stride": layer.strides,
        "dilation": layer.kernel_dilation,
        "padding": layer.padding,
        "input_shape": shape,
        "masked": layer.mask is not None,
    }
    if transposed:
        flipped = layer.transpose_kernel
        layout = "*OI" if flipped else "*IO"
        return transposed_convolution(**common, layout=layout, flipped=flipped)
    return convolution(
        **common,
        layout="*IO",
        groups=layer.feature_group_count,
        input_dilation=layer.input_dilation,
    )


def sizes(kernel_size: Any) -> tuple[int, ...]:
    """A kernel's sizes; linen takes one number for a single axis."""
    return (kernel_size,) if isinstance(kernel_size, int) else tuple(kernel_size)
