"""Which map a tensor is taken for."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from specops import Conv, Dense
from specops.inspection.assumptions import Context, assume
from specops.inspection.configuration import Configuration
from specops.inspection.hints import Hints, bare_name, matches


def guess(
    name: str, shape: Any, dtype: str = "float32", layout: str = "torch", **hints: Any
) -> Any:
    """The assumption on one tensor; `before` and `others` are names and shapes around it."""
    before, others = hints.pop("before", {}), hints.pop("others", {})
    configuration = hints.pop("configuration", Configuration())
    shapes = {**before, name: tuple(shape), **others}
    context = Context(shapes, layout, Hints(**hints), configuration, layout == "torch")
    return assume(name, tuple(shape), dtype, context)


class Looked(dict[str, tuple[int, ...]]):
    """Shapes that count how often all of them are gone through."""

    times = 0

    def __iter__(self) -> Any:
        self.times += 1
        return super().__iter__()

    def items(self) -> Any:
        self.times += 1
        return super().items()


def geometries(found: Any) -> list[Any]:
    return [reading.geometry for reading in found.readings]


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
        (("att.query.kernel.value", (16, 4, 8), "float32", "jax"), Dense(out_axes=(-2, -1))),
        (("mha/value/kernel:0", (16, 4, 8), "float32", "keras"), Dense(out_axes=(-2, -1))),
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
    others = {"conv2.weight": (16, 8, 3, 3)}
    assert guess("conv1.weight", (8, 1, 3, 3), others=others).geometry == Conv(None)
    named = guess("x.dw.weight", (8, 1, 3, 3), others=others)
    assert geometries(named) == [Conv(None, groups=8)]
    assert guess("conv1.weight", (8, 1, 3, 3), groups={"*": 1}).geometry == Conv(None)


STEM = {"conv1.weight": (8, 3, 3, 3)}


@pytest.mark.parametrize(
    ("shape", "around", "groups"),
    [
        # Nothing gives it 8 channels, or one channel: both.
        ((8, 1, 3, 3), {}, [8, 1]),
        ((8, 1, 3, 3), {"others": {"b.weight": (8, 1, 3, 3), "c.weight": (4, 8, 1, 1)}}, [1]),
        ((8, 1, 3, 3), {"before": STEM}, [8]),
        # Audio behind something else, and a decoder's last layer.
        ((8, 1, 9), {"before": {"enc.weight": (32, 4, 3)}}, [8, 1]),
        ((8, 1, 3, 3), {"before": {**STEM, "a.weight": (1, 8, 3, 3)}}, [8, 1]),
        # A multiplier, grouped as in ResNeXt, and a shortcut that is not grouped.
        ((16, 1, 3, 3), {"before": STEM}, [8, 16, 1]),
        ((8, 2, 3, 3), {"before": STEM}, [4]),
        ((16, 4, 1, 1), {"before": {"a.weight": (4, 3, 3, 3), "b.weight": (8, 4, 3, 3)}}, [1]),
    ],
)
def test_groups_by_the_channels_of_neighbours(
    shape: tuple[int, ...], around: Any, groups: list[int]
) -> None:
    found = guess("w.weight" if len(shape) == 4 else "conv.weight", shape, **around)
    assert geometries(found) == [Conv(None, groups=n) for n in groups]


def test_one_group_is_said_to_be_assumed_where_little_tells_of_it() -> None:
    """The stem before it has twice the channels, as for two groups."""
    up = {"up.bias": (4,)}
    found = guess("block.weight", (8, 4, 3, 3), before={"stem.weight": (8, 3, 3, 3)}, others=up)
    assert found.geometry == Conv(None)
    assert "one group assumed" in found.readings[0].why
    narrow = {"stem.weight": (4, 3, 3, 3), "wide.weight": (8, 4, 3, 3)}
    found = guess("block.weight", (8, 4, 3, 3), before=narrow, others=up)
    assert "assumed" not in found.readings[0].why.replace("stride 1 assumed", "")


def test_biases_tell_transposed_layers() -> None:
    found = guess("3.weight", (16, 1, 3, 3), others={"3.bias": (1,)})
    assert geometries(found) == [Conv(None, transposed=True, layout="IO*")]
    grouped = guess("3.weight", (16, 2, 3, 3), others={"3.bias": (8,)})
    assert geometries(grouped) == [Conv(None, transposed=True, layout="IO*", groups=4)]
    conv1d = guess("c_fc.weight", (4, 12), others={"c_fc.bias": (12,)})
    assert geometries(conv1d) == [Dense(out_axes=(-1,))]


def test_three_axes_are_a_stack_or_a_kernel_or_both() -> None:
    stack, kernel = Dense((1,), batch_axes=(0,)), Conv(None)
    assert geometries(guess("w.weight", (6, 8, 3))) == [kernel, stack]
    assert geometries(guess("w.weight", (6, 8, 64))) == [stack, kernel]
    assert geometries(guess("w.weight", (6, 8, 3), others={"w.bias": (6,)})) == [kernel]
    assert geometries(guess("w.weight", (6, 8, 9), others={"w.bias": (6, 8)})) == [stack]
    assert geometries(guess("w.weight", (6, 8, 64), stride={"w*": 2})) == [Conv(None, stride=2)]
    scanned = guess("layers/wi/kernel", (12, 4, 8), layout="jax")
    assert geometries(scanned) == [Dense((-1,), batch_axes=(0,))]
    numbered = guess("layers.0.wi.kernel", (3, 4, 8), layout="jax")
    assert geometries(numbered) == [Conv(None, layout="*IO"), Dense((-1,), batch_axes=(0,))]
    heads = guess("layers/attn/query/kernel", (12, 16, 4, 8), layout="jax")
    assert geometries(heads) == [Dense((-2, -1), batch_axes=(0,))]


def test_two_sizes_imply_a_stride() -> None:
    around = {"others": {"c2.weight": (8, 8, 3, 3)}}
    sizes = {"input_size": {"*": (32, 32), "c2*": (16, 16)}}
    found = guess("c1.weight", (8, 3, 3, 3), **around, **sizes)
    assert [g.stride for g in geometries(found)] == [(2, 2), (1, 1)]
    # As of a ResNet: a stride and pooling behind it.
    stem = guess("c1.weight", (8, 3, 3, 3), **around, input_size={"*": (64, 64), "c2*": (16, 16)})
    assert [g.stride for g in geometries(stem)] == [(4, 4), (2, 2), (1, 1)]
    same = guess("c1.weight", (8, 3, 3, 3), **around, input_size={"*": (32, 32)})
    assert [g.stride for g in geometries(same)] == [(1, 1)]
    block = {"others": {"l.0.conv2.weight": (8, 8, 3, 3), "l.0.downsample.0.weight": (8, 3, 1, 1)}}
    size = {"input_size": {"*": (32, 32), "*conv2*": (16, 16)}}
    agreed = guess("l.0.conv1.weight", (8, 3, 3, 3), **block, **size)
    assert [g.stride for g in geometries(agreed)] == [(2, 2)]
    given = guess("c1.weight", (8, 3, 3, 3), **around, **sizes, stride={"c1*": 1})
    assert [g.stride for g in geometries(given)] == [(1, 1)]


@pytest.mark.parametrize(
    ("own", "next_one", "strides"),
    [((16, 8), (16, 16), [2, 1]), ((8, 8), (16, 8), [1, 2]), ((16, 8), (32, 16), [2, 1])],
)
def test_channels_say_whether_a_stride_or_pooling_is_likelier(
    own: Any, next_one: Any, strides: Any
) -> None:
    found = guess(
        "c1.weight",
        (*own, 3, 3),
        before={"c0.weight": (8, 3, 3, 3)},
        others={"c2.weight": (*next_one, 3, 3)},
        input_size={"*": (32, 32), "c2*": (16, 16)},
    )
    assert [g.stride[0] for g in geometries(found)] == strides


GATES = {"weight_hh_l0": (20, 5), "bias_hh_l0": (20,)}


@pytest.mark.parametrize(
    ("name", "shape", "around", "splits"),
    [
        ("weight_ih_l0", (20, 6), GATES, (5,) * 4),
        ("rnn.weight_ih_l1", (15, 6), {"rnn.weight_hh_l1": (15, 5)}, (5,) * 3),
        ("weight_ih", (5, 6), {"weight_hh": (5, 5)}, None),
        ("weight_hh_l0", (20, 3), {"weight_hr_l0": (3, 5)}, (5,) * 4),
        ("attn.in_proj_weight", (12, 4), {}, (4,) * 3),
        ("weight_ih_l0_reverse", (20, 6), {"weight_hh_l0_reverse": (20, 5)}, (5,) * 4),
        (
            "h.0.attn.c_attn.weight",
            (4, 12),
            {"h.0.attn.c_attn.bias": (12,), "h.0.attn.c_proj.weight": (4, 4)},
            (4,) * 3,
        ),
        (
            "h.0.cross.c_attn.weight",
            (4, 8),
            {"h.0.cross.c_attn.bias": (8,), "h.0.cross.q_attn.weight": (4, 4)},
            (4,) * 2,
        ),
        ("b.0.mixer.x_proj.weight", (9, 6),
         {"b.0.mixer.dt_proj.weight": (6, 1), "b.0.mixer.A_log": (6, 4)}, (1, 4, 4)),
        ("ff.net.0.proj.weight", (12, 8), {"ff.net.2.weight": (8, 6)}, (6, 6)),
        ("a.qkv_proj.weight", (16, 8), {"a.o_proj.weight": (8, 8)}, (8, 4, 4)),
        ("mlp.gate_up_proj.weight", (16, 8), {"mlp.down_proj.weight": (8, 8)}, (8, 8)),
    ],
)  # fmt: skip
def test_fused_maps_are_taken_apart(
    name: str, shape: tuple[int, int], around: Any, splits: Any
) -> None:
    (geometry,) = geometries(guess(name, shape, others=around))
    assert geometry.splits == splits
    geometry.check(shape)


def test_groups_of_regnet_are_in_its_configuration() -> None:
    name = "encoder.stages.1.layers.0.layer.1.convolution.weight"
    told = Configuration("config.json", {"model_type": "regnet", "groups_width": 4})
    (geometry,) = geometries(guess(name, (16, 4, 3, 3), configuration=told))
    assert geometry.groups == 4
    (geometry,) = geometries(guess(name, (2, 2, 3, 3), configuration=told))
    assert geometry.groups == 1


@pytest.mark.parametrize("gates", [3, 4, 1])
def test_gates_of_cells_of_nnx(gates: int) -> None:
    names = [f"cell.dense_{x}.kernel.value" for x in "ih"]
    shapes = [(6, 5 * gates), (5, 5 * gates)]
    found = guess(names[0], shapes[0], layout="jax", others={names[1]: shapes[1]})
    assert geometries(found) == [Dense((-1,), splits=(5,) * gates if gates > 1 else None)]


def test_heads_of_one_matrix_are_known_by_the_configuration() -> None:
    name = "layers.0.attention.query_key_value.weight"
    config = Configuration("config.json", {"model_type": "gpt_neox", "num_attention_heads": 4})
    found = guess(name, (96, 32), configuration=config)
    assert geometries(found) == [Dense(splits=(8, 8, 8), repeats=4)]
    unknown = guess(name, (96, 32))
    assert geometries(unknown) == [Dense()]
    assert "nothing says how they lie" in unknown.why


@pytest.mark.parametrize(
    ("shape", "down", "out"),
    [((2, 8, 8), (2, 8, 4), 1), ((2, 8, 8), (2, 4, 8), 2), ((2, 8, 6), (), 0)],
)
def test_gates_of_stacked_experts_are_taken_apart(shape: Any, down: Any, out: int) -> None:
    stem = "layers.0.mlp.experts."
    found = guess(f"{stem}gate_up_proj", shape, others={f"{stem}down_proj": down} if down else {})
    if out:
        assert geometries(found) == [Dense((out,), batch_axes=(0,), splits=(4, 4))]
    else:
        assert geometries(found) == [Dense((1,), batch_axes=(0,))]
        assert "nothing says which axis" in found.why


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
        (("experts.down_proj_bias", (4, 8)), "bias", True),
        (("attn.relative_position_bias_table", (9, 4)), "bias", True),
        (("gru/cell/vars/2", (2, 15), "float32", "keras"), "bias", True),
        (("gru/gru/bias:0", (2, 15), "float32", "keras"), "bias", True),
        (("att.key.bias.value", (2, 4), "float32", "jax"), "bias", True),
        (("layers/norm/scale", (12, 8), "float32", "jax"), "scales", True),
        (("mixer.A_log", (16, 8)), "state space", True),
        (("embeddings.cls_token", (1, 1, 8)), "learnt input", True),
        (("embeddings.position_embeddings", (1, 17, 8)), "learnt input", True),
        (("c.weight_g", (8, 1, 1)), "lengths", True),
        (("c.parametrizations.weight.0.base", (8, 8)), "parametrisation", True),
        (("swin.attn_mask", (4, 9, 9)), "mask", True),
        (("rope.cos_cached", (64, 8)), "constants", True),
        (("quantizer.codevectors", (1, 20, 8)), "learnt input", True),
        (("time_maa_x", (1, 1, 8)), "learnt input", True),
        (("block.layer_scale", (8, 1, 1)), "a scale", True),
        (("optimizer_weights/adam/dense/kernel", (4, 3)), "optimizer", True),
        (("mha/query_dense/vars/1", (4, 8), "float32", "keras"), "bias", True),
        (("conv.weight", (1, 1, 25, 25, 25)), "too many", False),
        (("x", (2,) * 6), "6-d", False),
        (("optimizer/vars/3", (4, 4)), "optimizer", True),
        (("opt_state.0.mu.kernel", (4, 4)), "optimizer", True),
        (("opt.state.0.weight.exp_avg", (4, 4)), "optimizer", True),
        (("opt.acc_grads.dense.kernel", (4, 4), "float32", "jax"), "optimizer", True),
        (("opt.params0.dense.kernel", (4, 4), "float32", "jax"), "optimizer", True),
        (("opt.base_optimizer_state.0.nu.out.kernel", (4, 4)), "optimizer", True),
        (("attn.attention_biases", (4, 9)), "bias", True),
        (("experts.down_proj_blocks", (4, 8, 2, 16), "uint8"), "packed", False),
        (("fc.weight._data", (4, 4), "int8"), "packed", False),
        (("fc.W_q", (4, 4), "uint8"), "packed", False),
        (("0._flat_param", (40,)), "flattens", False),
    ],
)
def test_what_is_not_measured(arguments: Any, reason: str, harmless: bool) -> None:
    found = guess(*arguments)
    assert found.geometry is None
    assert reason in found.skipped
    assert found.harmless is harmless


def test_moments_of_optax_are_known_by_the_parameters_beside_them() -> None:
    beside = {"params.dense.kernel": (8, 6), "params.heads.1.out.kernel": (8, 6)}
    beside |= {"opt.0.count": (), "opt.0.nu.dense.kernel": (8, 6)}
    for name in ("opt.0.mu.dense.kernel", "opt.1.0.nu.dense.kernel", "s/0/trace/dense/kernel"):
        assert "optimizer" in guess(name, (8, 6), layout="jax", others=beside).skipped
    deeper = {"model.params.dense.kernel": (8, 6), "opt.0.count": ()}
    found = guess("opt.0.mu.dense.kernel", (8, 6), layout="jax", others=deeper)
    assert "optimizer" in found.skipped
    for field in ("m", "v", "n", "g", "m1", "m2"):
        moment = f"opt.0.{field}.dense.kernel"
        assert "optimizer" in guess(moment, (8, 6), layout="jax", others=beside).skipped
    for top in ("g", "v"):  # of a part that is called like a field
        moment, of_it = f"{top}.opt.0.mu.dense.kernel", {f"{top}.opt.0.count": ()}
        of_it |= {f"{top}.params.dense.kernel": (8, 6)}
        assert "optimizer" in guess(moment, (8, 6), layout="jax", others=of_it).skipped
    # A model's own: for a mean, of another size, of another framework.
    beside |= {"params.blocks.1.v.dense.kernel": (8, 6)}
    own = {"params.heads.0.mu.kernel": "jax", "params.0.mu.dense.kernel": "torch"}
    own |= {"params.blocks.0.v.dense.kernel": "jax"}
    own |= {"stages.0.mu.dense.kernel": "jax"}
    for name, layout in own.items():
        assert guess(name, (8, 6), layout=layout, others=beside).geometry == Dense(
            out_axes=(-1,) if layout == "jax" else (0,)
        )
    assert guess("opt.0.mu.dense.kernel", (9, 6), layout="jax", others=beside).geometry is not None
    assert guess("conv.0.0", (8, 6), layout="jax", others={"x.0.0": (8, 6)}).geometry is not None


@pytest.mark.parametrize("name", ["layers/depthwise_conv2d/vars/0", "separable_conv2d/vars/0"])
def test_depthwise_kernels_of_keras_are_seen_in_groups(name: str) -> None:
    found = guess(name, (3, 3, 8, 2), layout="keras")
    assert found.geometry == Conv(None, groups=8, layout="*IO")
    assert found.shape == (3, 3, 1, 16)
    found.geometry.sizes(found.shape)
    assert guess("separable_conv2d/vars/1", (1, 1, 8, 2), layout="keras").shape is None


@pytest.mark.parametrize(
    ("name", "shape", "hints", "geometry"),
    [
        ("c.weight", (8, 3, 3, 3), {"padding": 0}, Conv((8, 8), padding=0)),
        ("c.weight", (8, 3, 3, 3), {"padding": "valid"}, Conv((8, 8), padding="valid")),
        ("c.weight", (8, 3, 4, 4), {"padding": 1, "stride": 2}, Conv((8, 8), stride=2, padding=1)),
        ("c.weight", (8, 3, 3, 3), {"dilation": 2}, Conv((8, 8), dilation=2, padding=2)),
        (
            "up.deconv.weight",
            (8, 3, 4, 4),
            {"padding": 1, "stride": 2},
            Conv((8, 8), stride=2, padding=1, transposed=True, layout="IO*"),
        ),
        (
            "up.deconv.weight",
            (8, 3, 3, 3),
            {"padding": 1, "stride": 2},
            Conv((8, 8), stride=2, padding=1, output_padding=1, transposed=True, layout="IO*"),
        ),
    ],
)
def test_paddings_and_dilations_that_are_given(
    name: str, shape: Any, hints: dict[str, Any], geometry: Conv
) -> None:
    patterns = {key: {"*": value} for key, value in hints.items()}
    found = guess(name, shape, input_size={"*": (8, 8)}, **patterns).geometry
    assert found.sizes(shape) == geometry.sizes(shape)
    assert found.transposed == geometry.transposed
    unsized = guess(name, shape, **patterns)
    assert unsized.geometry.grid is None
    assert ("counts only where zeros end" in unsized.why) == ("padding" in hints)


@pytest.mark.parametrize("option", ["stride", "dilation", "groups"])
def test_counts_below_one_are_told(option: str) -> None:
    found = guess("c.weight", (8, 3, 3, 3), input_size={"*": (8, 8)}, **{option: {"*": 0}})
    assert found.skipped == f"{option} must be at least 1, got 0"


def test_hints_that_do_not_fit_are_said() -> None:
    found = guess("c.weight", (8, 3, 3, 3), groups={"*": 3})
    assert found.geometry is None
    assert "group" in found.skipped
    found = guess("c.weight", (8, 3, 3), input_size={"*": (8, 8)})
    assert "spatial" in found.skipped
    assert guess("c.weight", (8, 3, 3), input_size={"*": (8,)}).geometry.grid == (8,)
    square = guess("c.weight", (8, 3, 5, 5), input_size={"*": (8,)}, stride={"*": 2}).geometry
    assert square == Conv((8, 8), stride=2, padding=(2, 2))
    even = guess("c.weight", (8, 3, 4, 4), input_size={"*": (8, 8)})
    assert even.geometry == Conv((8, 8))
    assert "padding 'same' assumed" in even.why
    assert np.prod(square.grid) == 64


def test_quantised_weights_are_known_by_their_scales() -> None:
    names = ("a.weight", "a.weight_scale_inv", "q.qweight", "q.scales")
    more = ("p.weight_packed", "p.weight_scale", "c.weight", "c.scale_weight")
    others = dict.fromkeys((*names, *more), (2, 2))
    for name in ("a.weight", "c.weight"):
        weight = guess(name, (8, 8), "float8_e4m3fn", others=others)
        assert not weight.harmless
        assert "quantised" in weight.skipped
    for name in ("a.weight_scale_inv", "q.scales", "p.weight_scale"):
        scales = guess(name, (2, 2), others=others)
        assert scales.skipped == "scales of a quantised weight"
        assert scales.harmless
    assert guess("a.weight", (8, 8), "float8_e4m3fn").geometry == Dense()
    assert guess("own.scales", (8, 8)).geometry == Dense()


def test_scales_of_other_packages() -> None:
    pairs = {"a.weight._scale": "a.weight._data", "b._weight_scale": "b._weight_qdata"}
    for name, packed in (pairs | {"c.zero": "c.W_q", "c.scale": "c.W_q"}).items():
        assert "quantised" in guess(name, (8, 1), others={packed: (8, 8)}).skipped


def test_the_matrix_b_of_a_state_space_is_no_bias() -> None:
    assert guess("ssm.B", (8, 3), others={"ssm.A": (8, 8)}).geometry == Dense()
    assert "bias" in guess("dense/b", (8, 3), layout="jax").skipped


def test_filters_among_matrices_are_no_stem() -> None:
    blocks = {f"blocks.{i}.{n}.weight": (16, 16) for i in range(2) for n in ("up", "down")}
    name = "blocks.{}.conv1d.conv.weight"
    found = guess(name.format(0), (16, 1, 4), others=blocks)
    assert geometries(found) == [Conv(None, groups=16), Conv(None)]
    found = guess(name.format(0), (16, 1, 4), others={**blocks, name.format(1): (16, 1, 4)})
    assert geometries(found) == [Conv(None, groups=16)]
    # The first of every discriminator.
    plain = {f"d.{i}.convs.{j}.weight": (8, 8, 5) for i in range(2) for j in (1, 2)}
    found = guess(
        "d.0.convs.0.weight", (8, 1, 5), others={**plain, "d.1.convs.0.weight": (8, 1, 5)}
    )
    assert geometries(found) == [Conv(None)]


@pytest.mark.parametrize(
    "lengths",
    [
        {"patch_size": 4, "tubelet_size": 2},
        {"patch_size": 4, "temporal_patch_size": 2},
        {"tubelet_size": [2, 4, 4]},
    ],
)
def test_patches_of_films_have_a_length(lengths: dict[str, Any]) -> None:
    values = {"model_type": "videomae", **lengths}
    told = Configuration("config.json", values=values)
    found = guess("patch_embeddings.projection.weight", (8, 3, 2, 4, 4), configuration=told)
    assert found.geometry.stride == (2, 4, 4)


def test_parts_of_reparametrised_weights_say_so() -> None:
    assert "reparametrised" in guess("c.weight_v", (64, 3, 3, 3)).why
    original = guess("c.parametrizations.weight.original", (64, 3))
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


def test_files_that_sort_their_names_are_read_in_the_order_of_numbers() -> None:
    around = {"before": {"c.10.weight": (8, 1, 3, 3)}, "others": {"c.9.weight": (8, 3, 3, 3)}}
    found = guess("c.10.weight", (8, 1, 3, 3), layout="", **around)
    assert geometries(found) == [Conv(None, groups=8)]


def test_bare_names() -> None:
    assert bare_name("_orig_mod.module.model.fc.weight") == "fc.weight"
    assert bare_name("state_dict.module.fc.weight") == "fc.weight"
    assert bare_name("models.fc") == "models.fc"
    assert matches("module.blocks[0].w", "blocks[0].w")
    hints = Hints(stride={"fc*": 2})
    assert hints.of("module.fc.weight", "stride") == 2


def test_strides_of_overlapping_patches_stage_by_stage() -> None:
    told = Configuration("config.json", values={"model_type": "glpn", "strides": [4, 2]})
    for stage, stride in enumerate((4, 2, None)):
        name = f"encoder.patch_embeddings.{stage}.proj.weight"
        shapes = {"encoder.stem.weight": (8, 3)}
        found = guess(name, (8, 3, 3, 3), others=shapes, configuration=told)
        strides = {r.geometry.stride for r in found.readings}
        assert strides == ({stride} if stride else {1, 3})


def test_experts_in_one_matrix_are_said_to_be_one() -> None:
    assert "experts together" in guess("ffn.experts.mlp.w1", (72, 16)).why
    for name in ("mlp.experts.0.w1.weight", "mlp.shared_experts.w1.weight", "mlp.gate.weight"):
        assert "experts together" not in guess(name, (72, 16)).why


def test_what_is_looked_up_is_a_table() -> None:
    for name in ("latent_query", "encoder.position_enc", "qformer.query_tokens"):
        assert "table" in guess(name, (64, 32)).why


def test_queries_keys_and_values_of_a_convolution_are_said_to_be_one_map() -> None:
    assert "one map" in guess("mid.qkv.weight", (12, 4, 1, 1)).why
    assert "one map" not in guess("mid.proj_out.weight", (4, 4, 1, 1)).why


@pytest.mark.parametrize("kind", ["uint8", "float32"])
def test_files_of_many_matrices_are_not_gone_through_for_each(kind: str) -> None:
    shapes = Looked()
    for i in range(40):
        shapes[f"layers.{i}.mlp.up.weight"] = (8, 4)
        shapes[f"layers.{i}.mlp.up.weight_scale_inv"] = (1, 1)
    context = Context(shapes, "torch")
    for name in list(dict.keys(shapes)):
        assume(name, shapes[name], kind if name.endswith("weight") else "float32", context)
    assert shapes.times < 10


def test_what_comes_before_a_kernel_is_looked_for_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where nothing is sure each of many kernels that are alike asks all others."""
    before, asked = Context.before, []

    def counted(context: Context, name: str) -> Any:
        asked.append(name)
        return before(context, name)

    monkeypatch.setattr(Context, "before", counted)
    names = [f"layers.{i}.conv.weight" for i in range(30)]
    context = Context(dict.fromkeys(names, (4, 2, 3, 3)), "torch")
    for name in names:
        assume(name, (4, 2, 3, 3), "float32", context)
    assert sorted(asked) == sorted(names)


def test_names_that_differ_in_what_separates_their_parts_are_no_sequence() -> None:
    found = guess("a/kernel", (3, 3, 2, 4), before={"a.kernel": (3, 3, 2, 4)}, layout="jax")
    assert geometries(found) == [Conv(None, layout="*IO", groups=n) for n in (2, 1)]
