"""Rules and the plans that place them."""

from __future__ import annotations

import copy
import io
import pickle
from functools import partial
from typing import Any

import numpy as np
import pytest

import specops
from specops import ClipSpectralNorm, Conv, Dense, Monitor, Plan, errors
from specops.maps.convolution import ConvOperator
from specops.rules import Rule
from specops.spectra import spectral_norm_bounds
from specops.training.declared import override_geometries
from specops.training.plan import Weight
from specops.training.report import Report, ReportRow, measured_norm, plan_rows
from tests.backends import Backend

CLIP = ClipSpectralNorm(1.0)


def weights() -> list[Weight]:
    return [
        Weight("conv.weight", (4, 3, 3, 3), "float32", Conv(None)),
        Weight("conv.bias", (4,), "float32", skipped="1-d: a bias or scale, no matrix"),
        Weight("embed.weight", (10, 4), "float32", Dense(), opt_in="an embedding"),
        Weight("odd.weight", (4, 4), "float32", obstacle="no geometry is known"),
        Weight("head.weight", (2, 4), "float32", Dense()),
    ]


def cosine(step: int, name: str, geometry: Any) -> float:
    return 1.0


@pytest.mark.parametrize(
    ("rule", "text"),
    [
        (ClipSpectralNorm(cosine), "ClipSpectralNorm(max_norm=cosine)"),
        (ClipSpectralNorm(partial(cosine)), "ClipSpectralNorm(max_norm=cosine)"),
        (
            specops.SpectralNormPenalty(lambda *_: 0.1, norm="operator"),
            "SpectralNormPenalty(strength=<lambda>, norm='operator', iterations=1)",
        ),
        (
            specops.ProjectStableRank(target=2.0, norm="reshaped"),
            "ProjectStableRank(ratio=None, target=2.0, preserve=0, norm='reshaped')",
        ),
        (Monitor(), "Monitor()"),
    ],
)
def test_texts_name_schedules_and_not_their_addresses(rule: Any, text: str) -> None:
    assert repr(rule) == text


@pytest.mark.parametrize("rule", [CLIP, Monitor()])
def test_rules_follow_the_protocol(rule: Any) -> None:
    assert isinstance(rule, Rule)
    assert hash(rule) == hash(copy.deepcopy(rule))
    assert pickle.loads(pickle.dumps(rule)) == rule


def test_clip_projects_and_reports(backend: Backend) -> None:
    w = backend.array(np.diag([3.0, 0.5]).astype(np.float32))

    def fire(x: Any) -> Any:
        new, _, figures = CLIP.update(x, Dense(), CLIP.init(x, Dense(), "w"))
        return new, figures

    new, figures = backend.call(fire, w)
    np.testing.assert_allclose(backend.numpy(new), np.diag([1.0, 0.5]), atol=1e-6)
    assert float(figures["norm_before"]) == pytest.approx(3.0)
    assert float(figures["norm_after"]) == pytest.approx(1.0, abs=1e-5)


def test_schedule_sees_step_name_and_geometry() -> None:
    seen = []

    def bound(step: int, name: str, geometry: Any) -> float:
        seen.append((step, name, geometry))
        return 2.0

    rule = ClipSpectralNorm(bound)
    new, _, _ = rule.update(np.diag([3.0, 1.0]), Dense(), {}, step=7, name="w")
    assert seen == [(7, "w", Dense())]
    assert specops.spectral_norm(new) == pytest.approx(2.0)


def test_monitor_measures_and_changes_nothing() -> None:
    w = np.diag([2.0, 1.0])
    new, state, figures = Monitor().update(w, Dense(), {})
    assert new is w
    assert state == {}
    assert (float(figures["spectral_norm"]), float(figures["stable_rank"])) == (2.0, 1.25)
    _, _, figures = Monitor().update(np.ones((1, 1, 3)), Conv(None), {})
    assert 3.0 <= float(figures["norm_upper"]) < 3.1


def test_firing_steps() -> None:
    plan = Plan([("*", CLIP)], every=3, start=4, stop=12)
    assert [s for s in range(1, 30) if plan.fires(s)] == [7, 10]
    assert [s for s in range(1, 12) if plan.fires(s, 2)] == [6, 8, 10]
    assert [s for s in range(1, 6) if Plan.of(CLIP).fires(s)] == [1, 2, 3, 4, 5]
    assert Plan.of(Plan([("*", CLIP)], every=5), every=2).every == 2
    assert Plan.of(Plan([("*", CLIP)], every=5)).every == 5


def test_bare_rule_is_lenient_and_accounts_for_everything() -> None:
    assignments = Plan.of(CLIP).assign(weights())
    assert [a.weight.name for a in assignments] == [w.name for w in weights()]
    rules = {a.weight.name: a.rule for a in assignments}
    assert [name for name, rule in rules.items() if rule is not None] == [
        "conv.weight",
        "head.weight",
    ]
    assert all(a.reason for a in assignments if a.rule is None)


def test_first_match_wins_and_none_excludes() -> None:
    plan = Plan([("head.*", None), ("embed.*", Monitor(), 5), ("*", CLIP)])
    by_name = {a.weight.name: a for a in plan.assign(weights())}
    assert by_name["head.weight"].rule is None
    assert "excluded" in by_name["head.weight"].reason
    assert (by_name["embed.weight"].rule, by_name["embed.weight"].every) == (Monitor(), 5)
    assert by_name["conv.weight"].rule == CLIP


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ([("odd.*", CLIP)], "odd.weight .* cannot be constrained: no geometry is known"),
        ([("haed.*", CLIP)], "matches no parameter.*head.weight"),
        ([("conv.bias", CLIP)], "constrains nothing.*1-d"),
        ([("*", CLIP), ("head.*", CLIP)], "an earlier pattern took"),
        ([("head.*", CLIP), ("head.*", Monitor())], "an earlier pattern took"),
        ([("haed.*", None), ("*", CLIP)], "matches no parameter.*head.weight"),
        ([("head", CLIP)], "for the whole layer write 'head.*'"),
    ],
)
def test_plans_that_do_not_fit(entries: list[Any], message: str) -> None:
    with pytest.raises(errors.PlanError, match=message):
        Plan(entries).assign(weights())


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Plan([]), "empty"),
        (lambda: Plan({"a": CLIP}), "takes a list"),
        (lambda: Plan.of([("a", CLIP)]), "wrap several rules in a plan"),
        (lambda: Plan([CLIP]), "must be .pattern, rule"),
        (lambda: Plan([("a", "clip")]), "is no rule"),
        (lambda: Plan([("a", ClipSpectralNorm)]), "pass an instance"),
        (lambda: Plan([("", CLIP)]), "non-empty string"),
        (lambda: Plan([("a", CLIP, 0)]), "every must be at least 1"),
        (lambda: Plan([("a", CLIP)], every=0), "every must be at least 1"),
        (lambda: Plan([("a", CLIP)], start=-1), "start must be at least 0"),
        (lambda: Plan([("a", CLIP)], start=10, stop=5), "stop must be at least 12"),
    ],
)
def test_bad_plans(build: Any, message: str) -> None:
    with pytest.raises(errors.PlanError, match=message):
        build()


def test_overriding_geometries() -> None:
    changed = override_geometries(weights(), {"odd.*": Dense(), "embed.*": Dense()})
    by_name = {a.weight.name: a for a in Plan.of(CLIP).assign(changed)}
    assert by_name["odd.weight"].rule == CLIP
    assert by_name["embed.weight"].rule == CLIP
    with pytest.raises(errors.PlanError, match=r"od\.weight"):
        override_geometries(weights(), {"od.weight": Dense()})


class Read(tuple[ReportRow, ...]):
    """Rows that count how often all of them are gone through."""

    times = 0

    def __iter__(self) -> Any:
        self.times += 1
        return super().__iter__()


def test_reports_go_through_their_rows_a_few_times() -> None:
    rows = Read(ReportRow(f"layers.{i}.weight", (2, 2), "float32") for i in range(50))
    report = Report(rows)
    str(report), report._repr_html_()
    assert rows.times < 20


def test_reports_bound_layers_without_iterating_on_their_operators(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    kernel, layer = np.random.default_rng(5).standard_normal((16, 16, 3, 3)), Conv((16, 16))
    upper = spectral_norm_bounds(kernel, layer).upper

    def product(*_: Any) -> None:
        pytest.fail("a product with the operator")

    monkeypatch.setattr(ConvOperator, "matvec", product)
    monkeypatch.setattr(ConvOperator, "rmatvec", product)
    assert measured_norm(kernel, layer) == {"norm": float(upper), "norm_is": "upper bound"}


def test_report_renders_everywhere() -> None:
    report = Report(tuple(plan_rows(Plan.of(CLIP, every=4).assign(weights()))))
    assert len(report.rows) == len(weights())
    assert {r.name for r in report.constrained} == {"conv.weight", "head.weight"}
    assert all(r.reason for r in report.skipped)
    text = str(report)
    for weight in weights():
        assert weight.name in text
    assert "ClipSpectralNorm(max_norm=1.0) every 4" in text
    assert "2 of 5 parameters under a rule" in text
    assert report._repr_html_().count("<tr>") == 6
    assert report["head.weight"].rule
    with pytest.raises(KeyError):
        report["nothing"]
    rich = pytest.importorskip("rich.console")
    console = rich.Console(width=200, record=True, file=io.StringIO())
    console.print(report)
    assert "an embedding" in console.export_text()
