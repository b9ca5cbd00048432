"""Checks of the records of firings, which also tell how often a rule has acted."""

from __future__ import annotations

from typing import Any

import pytest

from specops.rules import ClipSpectralNorm, SpectralNormalization, SpectralNormPenalty
from specops.testing.base import BOUND, SuiteBase, advanced
from specops.training.plan import Plan

_RULES = {
    "weights": ClipSpectralNorm(BOUND),
    "gradients": SpectralNormPenalty(0.5, norm="reshaped"),
    "forward": SpectralNormalization(norm="reshaped"),
}


class HistoryChecks(SuiteBase):
    """A record for each weight and firing."""

    @pytest.mark.parametrize("stage", list(_RULES))
    def test_history_has_the_steps_that_fired(self, stage: Any) -> None:
        """One record for each weight and firing, with the step and the name."""
        self.needs(stage)
        rule, first = _RULES[stage], self.ruled()[0]
        plan = Plan([(first, rule, 3), ("*", rule)], every=2, stop=6)
        training = advanced(self.start(self.model(), plan), 7)
        got = sorted((record["step"], record["name"]) for record in training.history())
        # A forward rule acts in every forward pass, and so its vectors advance to the end.
        last = 7 if stage == "forward" else 5
        expected = sorted(
            (step, name)
            for name in self.constrained(training)
            for step in range(1, last + 1)
            if step % (3 if name == first else 2) == 0
        )
        assert got == expected, (
            f"a rule of stage {stage!r} with every=2, for {first} every=3, and stop=6: the history "
            f"of 7 steps has records of {got}, expected {expected}. Likely cause: the adapter does "
            f"not ask fires() of the attachment, calls step() or before_step() more or less than "
            f"once for each step of the optimizer, or keeps no records"
        )
