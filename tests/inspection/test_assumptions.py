"""Which map a tensor is taken for."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from specops import Conv, Dense
from specops.inspection.assumptions import Hints, assume


def guess(
    name: str, shape: Any, dtype: str = "float32", layout: str = "torch", **hints: Any
) -> Any:
    first = hints.pop("first", False)
    return assume(name, tuple(shape), dtype, layout, Hints(**hints), first)


@pytest.mark.parametrize(
    ("arguments", "geometry"),
    [
        (("fc.weight", (3, 4)), Dense(out_axes=(0,))),
        (("dense/kernel", (3, 4), "float32", "jax"), Dense(out_axes=(-1,))),
        (("wte.weight", (100, 4)), Dense(out_axes=(0,))),
        (("conv.weight", (8, 4, 3)), Conv(None)),
        (("conv.weight", (8, 4, 3, 3)), Conv(None)),
        (("conv.weight", (8, 4, 3, 3, 3)), Conv(None)),
        (("conv/kernel", (3, 3, 4, 8), "float32", "jax"), Conv(None, layout="*IO")),
        (("conv/kernel", (3, 3, 4, 8), "float32", "keras"), Conv(None, layout="*IO")),
        (("kernel", (3, 3, 16, 64), "float32", ""), Conv(None, layout="*IO")),
        (("kernel", (64, 16, 3, 3), "float32", ""), Conv(None)),
        (("dw.weight", (8, 1, 3, 3)), Conv(None, groups=8)),
        (("moe.experts.w1", (6, 8, 4)), Dense((1,), batch_axes=(0,))),
        (("w.weight", (6, 8, 64)), Dense((1,), batch_axes=(0,))),
        (("attn/query/kernel", (16, 4, 8), "float32", "jax"), Dense(out_axes=(-2, -1))),
        (("attn/out/kernel", (4, 8, 16), "float32", "jax"), Dense(out_axes=(-1,))),
        (("mha/query_dense/vars/0", (16, 4, 8), "float32", "keras"), Dense(out_axes=(-2, -1))),
        (("mha/output_dense/vars/0", (4, 8, 16), "float32", "keras"), Dense(out_axes=(-1,))),
    ],
)
def test_geometries(arguments: Any, geometry: Any) -> None:
    found = guess(*arguments)
    assert found.geometry == geometry
    assert found.why
    # It fits.
    shape = arguments[1]
    if isinstance(geometry, Conv):
        geometry.sizes(shape)
    else:
        geometry.check(shape)


def test_one_channel_images_are_not_depthwise() -> None:
    assert guess("conv1.weight", (8, 1, 3, 3), first=True).geometry == Conv(None)
    assert guess("x.dw.weight", (8, 1, 3, 3), first=True).geometry == Conv(None, groups=8)
    assert guess("conv1.weight", (8, 1, 3, 3), groups={"*": 1}).geometry == Conv(None)


@pytest.mark.parametrize(
    ("arguments", "reason", "harmless"),
    [
        (("b", (3,)), "1-d", True),
        (("n", ()), "scalar", True),
        (("e", (0, 3)), "empty", True),
        (("ids", (1, 512), "int64"), "indices", True),
        (("mask", (4, 4), "bool"), "flags", True),
        (("q", (4, 4), "int8"), "quantised", False),
        (("qweight", (4, 4), "int32"), "packed", False),
        (("q", (4, 4), "uint8"), "dequantise", False),
        (("x", (2,) * 6), "6-d", False),
        (("optimizer/vars/3", (4, 4)), "optimizer", True),
        (("opt_state.0.mu.kernel", (4, 4)), "optimizer", True),
    ],
)
def test_what_is_not_measured(arguments: Any, reason: str, harmless: bool) -> None:
    found = guess(*arguments)
    assert found.geometry is None
    assert reason in found.skipped
    assert found.harmless is harmless


@pytest.mark.parametrize("name", ["layers/depthwise_conv2d/vars/0", "separable_conv2d/vars/0"])
def test_depthwise_kernels_of_keras_are_seen_in_groups(name: str) -> None:
    found = guess(name, (3, 3, 8, 2), layout="keras")
    assert found.geometry == Conv(None, groups=8, layout="*IO")
    assert found.shape == (3, 3, 1, 16)
    found.geometry.sizes(found.shape)
    assert guess("separable_conv2d/vars/1", (1, 1, 8, 2), layout="keras").shape is None


def test_hints_that_do_not_fit_are_said() -> None:
    found = guess("c.weight", (8, 3, 3, 3), groups={"*": 3})
    assert found.geometry is None
    assert "group" in found.skipped
    found = guess("c.weight", (8, 3, 3), input_size={"*": (8, 8)})
    assert "spatial" in found.skipped
    assert guess("c.weight", (8, 3, 3), input_size={"*": (8,)}).geometry.grid == (8,)
    square = guess("c.weight", (8, 3, 5, 5), input_size={"*": (8,)}, stride={"*": 2}).geometry
    assert square == Conv((8, 8), stride=2, padding=(2, 2))
    even = guess("c.weight", (8, 3, 4, 4), input_size={"*": (8, 8)}).geometry
    assert even == Conv((8, 8))
    assert np.prod(square.grid) == 64
