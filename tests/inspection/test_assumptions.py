"""Which map a tensor is taken for."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from specops import Conv, Dense
from specops.checkpoints import Entry
from specops.inspection.assumptions import assume
from specops.inspection.hints import Context, Hints, bare_name


def guess(
    name: str, shape: Any, dtype: str = "float32", layout: str = "torch", **hints: Any
) -> Any:
    one, others = hints.pop("one", False), hints.pop("others", ())
    context = Context(frozenset({name, *others}), layout, Hints(**hints), one)
    return assume(name, tuple(shape), dtype, context)


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
    assert guess("conv1.weight", (8, 1, 3, 3), one=True).geometry == Conv(None)
    assert guess("x.dw.weight", (8, 1, 3, 3), one=True).geometry == Conv(None, groups=8)
    assert guess("conv1.weight", (8, 1, 3, 3), groups={"*": 1}).geometry == Conv(None)


@pytest.mark.parametrize(
    ("arguments", "reason", "harmless"),
    [
        (("b", (3,)), "1-d", True),
        (("n", ()), "scalar", True),
        (("e", (0, 3)), "empty", True),
        (("ids", (1, 512), "int64"), "indices", True),
        (("mask", (4, 4), "bool"), "flags", True),
        (("q.weight", (4, 4), "int8"), "quantised", False),
        (("q.qweight", (4, 4), "int32"), "packed", False),
        (("q.weight", (4, 4), "uint8"), "dequantise", False),
        (("images", (4, 4), "uint8"), "no weights", True),
        (("h.0.attn.bias", (1, 1, 64, 64)), "bias or mask", True),
        (("causal", (1, 1, 64, 64)), "mask or table", True),
        (("attn.query.bias", (4, 8), "float32", "jax"), "bias", True),
        (("mha/query_dense/vars/1", (4, 8), "float32", "keras"), "bias", True),
        (("conv.weight", (1, 1, 25, 25, 25)), "too many", False),
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


def test_quantised_weights_are_known_by_their_scales() -> None:
    others = ("a.weight", "a.weight_scale_inv", "q.qweight", "q.scales")
    weight = guess("a.weight", (8, 8), "float8_e4m3fn", others=others)
    assert not weight.harmless
    assert "quantised" in weight.skipped
    for name in ("a.weight_scale_inv", "q.scales"):
        scales = guess(name, (2, 2), others=others)
        assert scales.skipped == "scales of a quantised weight"
        assert scales.harmless
    assert guess("a.weight", (8, 8), "float8_e4m3fn").geometry == Dense()
    assert guess("own.scales", (8, 8)).geometry == Dense()


def test_parts_of_reparametrised_weights_say_so() -> None:
    others = ("c.weight_g", "c.weight_v")
    assert "lengths" in guess("c.weight_g", (64, 1, 1, 1), others=others).skipped
    found = guess("c.weight_v", (64, 3, 3, 3), others=others)
    assert found.geometry == Conv(None)
    assert "reparametrised" in found.why
    assert "reparametrised" not in guess("c.weight_v", (64, 3, 3, 3)).why
    original = guess("c.parametrizations.weight.original1", (64, 3))
    assert "reparametrised" in original.why


@pytest.mark.parametrize(
    ("name", "layout", "expected"),
    [
        ("layers/conv2d_transpose/vars/0", "keras", "*OI"),
        ("ConvTranspose_0/kernel", "jax", "*IO"),
        ("deconv1.weight", "torch", "IO*"),
    ],
)
def test_transposed_convolutions_are_known_by_name(name: str, layout: str, expected: str) -> None:
    found = guess(name, (3, 3, 4, 5) if layout != "torch" else (4, 5, 3, 3), layout=layout)
    assert found.geometry == Conv(None, transposed=True, layout=expected)  # type: ignore[arg-type]
    assert "transposed by its name" in found.why


def test_one_channel_does_not_depend_on_the_order_of_the_file() -> None:
    def context(*shapes: tuple[int, ...]) -> bool:
        entries = [Entry(f"w{i}", shape, "float32") for i, shape in enumerate(shapes)]
        both = {Context.of(e, "torch", Hints()).one_channel for e in (entries, entries[::-1])}
        assert len(both) == 1
        return both.pop()

    assert context((6, 1, 3, 3), (8, 6, 3, 3))
    assert not context((32, 1, 3, 3), (32, 1, 3, 3), (32, 3, 3, 3))
    assert not context((32, 1, 3, 3), (32, 3, 3, 3))
    assert not context((8, 6, 3, 3))


def test_bare_names() -> None:
    assert bare_name("_orig_mod.module.model.fc.weight") == "fc.weight"
    assert bare_name("models.fc") == "models.fc"
    hints = Hints(stride={"fc*": 2})
    assert hints.of("module.fc.weight", "stride") == 2
