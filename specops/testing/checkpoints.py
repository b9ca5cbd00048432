"""Checks that a resumed training is the one that was interrupted."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

from specops.plan import Plan
from specops.rules import ClipSpectralNorm, SpectralNormalization, SpectralNormPenalty
from specops.testing.base import BOUND, SuiteBase, advanced, changed, listed

# Three steps are no multiple of the interval: a counter that is lost shows.
_BEFORE, _AFTER = 3, 4
_RTOL = 1e-4
_PLANS: Mapping[str, Plan] = {
    "weights": Plan([("*", ClipSpectralNorm(BOUND))], every=2),
    "gradients": Plan([("*", SpectralNormPenalty(0.5, norm="operator"))], every=2),
    "forward": Plan([("*", SpectralNormalization(norm="operator"))], every=2),
}


class CheckpointChecks(SuiteBase):
    """Save, go on; restore into a fresh start, go on: the same."""

    @pytest.mark.parametrize("stage", list(_PLANS))
    def test_a_resumed_training_is_the_same(self, stage: Any) -> None:
        """Weights and firings of the steps after the checkpoint agree."""
        if not self.capabilities.checkpoints:
            pytest.skip("the adapter does not claim checkpoints")
        self.needs(stage)
        training = advanced(self.start(self.model(), _PLANS[stage]), _BEFORE)
        saved, at_save = training.save(), training.weights()
        advanced(training, _AFTER)
        resumed = self.start(self.model(), _PLANS[stage])
        resumed.restore(saved)
        moved = changed(resumed.weights(), at_save, _RTOL)
        assert not moved, (
            f"right after restore() {listed(moved)} are not as they were saved (relative "
            f"change). Likely cause: save() returned references that later steps changed"
        )
        advanced(resumed, _AFTER)
        due = [step for step in range(_BEFORE + 1, _BEFORE + _AFTER + 1) if step % 2 == 0]
        for what, run in (("uninterrupted", training), ("resumed", resumed)):
            steps = sorted({r["step"] for r in run.history() if r["step"] > _BEFORE})
            assert steps == due, (
                f"every=2, saved after step {_BEFORE}: the {what} training fired at steps "
                f"{steps}, due were {due}. Likely cause: the count of steps is not in the "
                f"checkpoint"
            )
        moved = changed(resumed.weights(), training.weights(), _RTOL)
        assert not moved, (
            f"{_AFTER} steps after restoring, {listed(moved)} differ from the uninterrupted "
            f"training (relative change). Likely cause: the rule's state, the count of steps or "
            f"the optimizer's state is not in the checkpoint"
        )
