"""Checks of rules that act after the step, of reports and of histories."""

from __future__ import annotations

import pytest

from specops.rules import ClipSpectralNorm, Monitor
from specops.testing.base import (
    BOUND,
    SLACK,
    SuiteBase,
    advanced,
    changed,
    listed,
    norm_of,
    norms_of,
)
from specops.training.plan import Plan

_CLIP = ClipSpectralNorm(BOUND)


class WeightChecks(SuiteBase):
    """Rules of stage "weights": what they reach, and when."""

    def test_norms_stay_below_the_bound(self) -> None:
        """After each step every constrained weight has a norm of at most the bound."""
        self.needs("weights")
        training = self.start(self.model(), _CLIP)
        for step in range(1, 4):
            training.step()
            _assert_inside(norms_of(training), f"after step {step}")

    def test_other_weights_train_as_without_rules(self) -> None:
        """With a rule on one layer, all other weights are as after a step without rules."""
        self.needs("weights")
        for name in self.ruled():
            training = advanced(self.start(self.model(), Plan([(name, _CLIP)])), 1)
            moved = changed(training.weights(), self.plain(1).weights())
            others = {other: by for other, by in moved.items() if other != name}
            assert not others, (
                f"a plan that names {name!r} alone also changed {listed(others)} (relative "
                f"change). Likely cause: patterns are ignored, or parameters share memory"
            )
            assert name in moved, f"a plan that names {name!r} did not change it"

    def test_monitor_changes_nothing(self) -> None:
        """Measuring changes no weight, and leaves figures in the history."""
        self.needs("weights")
        training = advanced(self.start(self.model(), Monitor()), 2)
        moved = changed(training.weights(), self.plain(2).weights())
        assert not moved, f"Monitor() changed {listed(moved)} (relative change)"
        name = self.constrained(training)[0]
        figures = [record for record in training.history() if record.get("name") == name]
        assert figures, f"Monitor() left no record of {name} in the history"
        assert set(figures[-1]) & {"spectral_norm", "norm_upper"}, (
            f"the record of {name} holds {sorted(figures[-1])}: the rule's figures are missing"
        )

    @pytest.mark.parametrize(("every", "start"), [(3, 0), (2, 1)])
    def test_rules_act_at_their_interval(self, every: int, start: int) -> None:
        """At the steps with (step - start) % every == 0, and at no other."""
        self.needs("weights")
        fires = start + every
        training = self.start(self.model(), Plan([("*", _CLIP)], every=every, start=start))
        plain = self.plain()
        for step in range(1, fires):
            training.step()
            plain.step()
            moved = changed(training.weights(), plain.weights())
            assert not moved, (
                f"every={every}, start={start}: the rule acted at step {step}, due is step "
                f"{fires}; {listed(moved)} changed (relative change). Likely cause: the adapter "
                f"does not ask plan.fires(step), or counts steps from 0"
            )
        training.step()
        _assert_inside(
            norms_of(training),
            f"at step {fires}, where every={every}, start={start} is due (steps count from 1)",
        )

    def test_an_interval_of_ones_own(self) -> None:
        """The third entry of a plan's item takes precedence over the plan's interval."""
        self.needs("weights")
        first = self.ruled()[0]
        plan = Plan([(first, _CLIP, 2), ("*", _CLIP)])
        training = advanced(self.start(self.model(), plan), 1)
        norms = norms_of(training)
        assert norms.pop(first) > BOUND * (1 + SLACK), (
            f"{first} has an interval of its own, 2, but the rule acted at step 1. Likely "
            f"cause: the plan's every is used instead of the assignment's"
        )
        _assert_inside(norms, f"at step 1; only {first} was to wait")
        training.step()
        _assert_inside(norms_of(training), f"at step 2, where {first} is due as well")

    def test_rules_stop(self) -> None:
        """No rule acts from step `stop` on."""
        self.needs("weights")
        training = advanced(self.start(self.model(), Plan([("*", _CLIP)], stop=3)), 2)
        _assert_inside(norms_of(training), "at step 2, before stop=3")
        norms = norms_of(advanced(training, 3))
        assert any(norm > BOUND * (1 + SLACK) for norm in norms.values()), (
            f"stop=3, but after step 5 all norms are still at most {BOUND} ({listed(norms)}): "
            f"the rule goes on acting. Likely cause: the adapter does not ask plan.fires(step)"
        )
        steps = sorted({record["step"] for record in training.history()})
        assert steps == [1, 2], f"stop=3, but the history has records of steps {steps}"

    def test_enforce_acts_at_once(self) -> None:
        """enforce() acts even if no step of the interval is due."""
        self.needs("weights")
        training = advanced(self.start(self.model(), Plan([("*", _CLIP)], every=100)), 1)
        training.enforce()
        _assert_inside(norms_of(training), "after step 1 of every=100 and enforce()")

    def test_project_acts_once(self) -> None:
        """The model that project() was given obeys the rule."""
        self.needs("weights")
        self.needs_a_changed_model()
        model = self.model()
        self.project(model, _CLIP)
        training = self.start(model, Monitor())
        weights = training.weights()
        training.step()
        norms = {name: norm_of(weights[name], g) for name, g in training.geometries.items()}
        _assert_inside(norms, f"after project(model, {_CLIP!r})")

    def test_weights_keep_their_dtype(self) -> None:
        """Neither dtypes nor shapes change."""
        self.needs("weights")
        training = self.start(self.model(), _CLIP)
        before = {name: (w.dtype, w.shape) for name, w in training.weights().items()}
        after = {name: (w.dtype, w.shape) for name, w in advanced(training, 1).weights().items()}
        assert after == before, (
            f"a step under {_CLIP!r} changed dtypes and shapes from {before} to {after}. Likely "
            f"cause: write() stores what it is given as it is, or read() gives another dtype"
        )

    def test_frozen_weights_are_left_alone(self) -> None:
        """A rule for all weights does not act on frozen ones."""
        self.needs("weights")
        name = self.ruled()[0]
        model = self.model()
        self.freeze(model, name)
        training = self.start(model, _CLIP)
        before = training.weights()
        moved = changed(advanced(training, 2).weights(), before, 0.0)
        assert name not in moved, (
            f"{name} is frozen, and {_CLIP!r} changed it by {moved[name]:.3g} (relative). Likely "
            f"cause: its Weight is not `skipped`, nor does Parameter.frozen() say why it is idle"
        )
        assert moved, "one frozen weight keeps all others from training"

    def test_report_accounts_for_every_parameter(self) -> None:
        """Each is under a rule, with its true norm, or left alone with a reason."""
        self.needs("weights")
        training = advanced(self.start(self.model(), _CLIP), 2)
        report, weights = training.report(), training.weights()
        rows = {row.name: row for row in report.rows}
        assert rows.keys() == weights.keys(), (
            f"the report lists {sorted(rows)}, the model has {sorted(weights)}: every parameter "
            f"must be accounted for, by the same names"
        )
        for name, row in rows.items():
            assert tuple(row.shape) == weights[name].shape, (
                f"{name}: the report says shape {row.shape}, it is {weights[name].shape}"
            )
            dtype = weights[name].dtype.name
            assert row.dtype.rpartition(".")[2] == dtype, (
                f"{name}: the report says dtype {row.dtype}, it is {dtype}"
            )
            assert bool(row.rule) != bool(row.reason), (
                f"{name}: a row has either a rule or a reason why there is none, got "
                f"rule={row.rule!r}, reason={row.reason!r}"
            )
        for name, geometry in training.geometries.items():
            row, true = rows[name], norm_of(weights[name], geometry)
            assert row.norm is not None, f"{name} is under a rule, but the report has no norm"
            tolerance = 1e-3 * true
            if row.norm_is == "upper bound":
                assert row.norm >= true - tolerance, (
                    f"{name}: the report's upper bound {row.norm:.6g} is below the norm {true:.6g}"
                )
            else:
                assert abs(row.norm - true) <= tolerance, (
                    f"{name}: the report says norm {row.norm:.6g} ({row.norm_is}), it is "
                    f"{true:.6g}. Likely cause: measured before the rule acted, or not the "
                    f"operator's norm"
                )

    def test_detached_rules_act_no_more(self) -> None:
        """Detaching leaves the weights as they are; from then on no rule acts."""
        self.needs("weights")
        training = advanced(self.start(self.model(), _CLIP), 2)
        before, geometries = training.weights(), dict(training.geometries)
        training.detach()
        moved = changed(training.weights(), before)
        assert not moved, f"detach() itself changed {listed(moved)} (relative change)"
        weights = advanced(training, 3).weights()
        norms = {name: norm_of(weights[name], g) for name, g in geometries.items()}
        assert any(norm > BOUND * (1 + SLACK) for norm in norms.values()), (
            f"three steps after detach() all norms are still at most {BOUND} ({listed(norms)}): "
            f"the rule goes on acting, or step() no longer trains"
        )


def _assert_inside(norms: dict[str, float], when: str) -> None:
    above = {name: norm for name, norm in norms.items() if norm > BOUND * (1 + SLACK)}
    assert not above, (
        f"{when} the norms of {listed(above)} are above the bound {BOUND}. Likely cause: the "
        f"rule did not act at this step, its result was not written back, or the optimizer "
        f"stepped after it"
    )
