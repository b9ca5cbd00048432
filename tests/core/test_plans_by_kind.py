"""Plans by kinds of maps, rules that can never act, and declared maps that contradict layers."""

from __future__ import annotations

import warnings

import pytest

from specops import ClipSpectralNorm, Conv, Dense, Plan, SpectralNormalization
from specops.errors import CautionWarning, PlanError
from specops.training.coverage import warn_of_coverage
from specops.training.declared import override_geometries
from specops.training.weight import Weight

WEIGHTS = [
    Weight("conv.weight", (4, 3, 3, 3), "float32", Conv((8, 8), padding=1)),
    Weight("fc.weight", (4, 3), "float32", Dense()),
    Weight("embed.weight", (9, 3), "float32", Dense(), opt_in="an embedding"),
    Weight("odd.weight", (2, 3), "float32", obstacle="of no known layer"),
]
ONE, TWO = ClipSpectralNorm(1.0), ClipSpectralNorm(2.0)


def rules(*entries: tuple[str, object]) -> list[object]:
    return [a.rule for a in Plan(list(entries)).assign(WEIGHTS)]


def test_each_kind_has_its_rule() -> None:
    assert rules(("conv:*", ONE), ("dense:*", TWO)) == [ONE, TWO, None, None]
    assert rules(("conv:*", None), ("*", TWO)) == [None, TWO, None, None]
    assert rules(("embedding:*", ONE), ("*", TWO)) == [TWO, TWO, ONE, None]
    assert rules(("dense:f*", ONE), ("*", TWO)) == [TWO, ONE, None, None]


def test_a_kind_that_is_not_there_is_named() -> None:
    with pytest.raises(PlanError, match="no conv maps"):
        rules(("conv:fc.*", ONE), ("*", TWO))
    with pytest.raises(PlanError, match="matches no parameter"):
        Plan([("conv:*", ONE)]).assign(WEIGHTS[1:])
    with pytest.raises(PlanError, match="matches no parameter"):
        rules(("kernel:0", ONE))  # a colon within a name means nothing


def test_a_name_is_a_pattern_of_its_own() -> None:
    """Names with brackets were said to match nothing, in a list of parameters with that name."""
    named = [Weight(f"head[{i}].weight", (4, 3), "float32", Dense()) for i in range(2)]
    plan = Plan([("head[1].weight", ONE), ("dense:head[0].weight", TWO)])
    assert [a.rule for a in plan.assign(named)] == [TWO, ONE]
    declared = override_geometries(named, {"head[0].weight": Dense(out_axes=(1,))})
    assert [w.geometry for w in declared] == [Dense(out_axes=(1,)), Dense()]


def test_a_rule_that_never_acts_is_refused() -> None:
    with pytest.raises(PlanError, match="never acts"):
        Plan([("*", ONE)], every=10, stop=10)
    with pytest.raises(PlanError, match="never acts"):
        Plan([("fc.*", ONE, 50), ("*", TWO)], start=5, stop=55)
    Plan([("*", ONE)], every=10, stop=11)
    Plan([("*", SpectralNormalization(norm="reshaped"))], every=10, stop=10)


def test_most_matrices_left_alone_are_said() -> None:
    unknown = [Weight(f"h.{i}.c.weight", (3, 3), "f", obstacle="unknown") for i in range(12)]
    plan = Plan([("*", ONE)])
    with pytest.warns(CautionWarning, match=r"only 2 of 15 .*'h\.\*\.c\.weight' \(3, 3\)"):
        warn_of_coverage(plan.assign([*WEIGHTS, *unknown]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_of_coverage(plan.assign(WEIGHTS))
        excluded = Plan([("h.*", None), ("*", ONE)])
        warn_of_coverage(excluded.assign([*WEIGHTS, *unknown]))
        warn_of_coverage(Plan([("fc.*", ONE)]).assign([*WEIGHTS, *unknown]))


@pytest.mark.parametrize(
    ("geometry", "said"),
    [
        (Conv((8, 8), layout="IO*"), "layout='IO*' is given, and its layer"),
        (Conv((8, 8), stride=2), r"stride=\(2, 2\)"),
        (Conv((8, 8), boundary="circular"), ""),
        (Conv(None), ""),
        (Dense(), ""),
    ],
)
def test_a_declared_map_that_contradicts_its_layer(geometry: object, said: str) -> None:
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        override_geometries([WEIGHTS[0]], {"conv.*": geometry})
    assert len(seen) == bool(said)
    if said:
        with pytest.warns(CautionWarning, match=said.replace("*", r"\*")):
            override_geometries([WEIGHTS[0]], {"conv.*": geometry})


@pytest.mark.parametrize(
    ("shape", "layout", "doubted"),
    [
        ((3, 3, 16, 32), "OI*", True),
        ((3, 3, 16, 32), "*IO", False),
        ((16, 32, 3, 3), "*IO", True),
        ((16, 32, 3, 3), "OI*", False),
        ((16, 3, 31, 31), "OI*", False),
        ((3, 3, 5, 5), "OI*", False),
    ],
)
def test_a_kernel_that_looks_like_another_layout(
    shape: tuple[int, ...], layout: str, doubted: bool
) -> None:
    weight = Weight("k", shape, "float32", obstacle="no geometry is known for it")
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        override_geometries([weight], {"k": Conv((64, 64), layout=layout)})  # type: ignore[arg-type]
    assert [x.category for x in seen] == [CautionWarning] * doubted


def test_messages_say_that_there_are_more_names_only_where_there_are() -> None:
    with pytest.raises(PlanError, match=r"called 'fc.weight'$"):
        Plan([("head", ONE)]).assign(WEIGHTS[1:2])
    with pytest.raises(PlanError, match=r"called 'fc.weight'$"):
        override_geometries(WEIGHTS[1:2], {"head": Dense()})
    with pytest.raises(PlanError, match=r"called 'conv.weight', .*…$"):
        override_geometries(WEIGHTS, {"covn.weight": Dense()})
